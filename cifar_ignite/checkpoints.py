"""What a run leaves on disk for later: whole training states and models, written durably, read with suspicion.

A checkpoint is a zip of plain state dicts, the configuration and a few numbers. It loads with `weights_only=True` on
any machine, and alone it rebuilds the model.
"""

import contextlib
import itertools
import logging
import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Any, Literal

import torch
from ignite.handlers.checkpoint import BaseSaveHandler
from pydantic import ConfigDict, JsonValue, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor
from typing_extensions import TypedDict

from cifar_ignite.config import InputError, flatten

FORMAT: Literal[1] = 1
TEMPORARY = ".tmp"

logger = logging.getLogger(__name__)


class Row(TypedDict):
    """One epoch: a row of metrics.csv."""

    epoch: int
    train_loss: float
    train_acc: float
    val_loss: float | None
    val_acc: float | None
    lr: float
    seconds: float
    images_per_second: float


@dataclass(config=ConfigDict(extra="forbid"))
class RunRecord:
    """What a checkpoint tells about its run, besides weights.

    Attributes:
        run: name of the run folder.
        config: the resolved configuration as JSON has it.
        class_names: in label order.
        history: one row an epoch, the columns of metrics.csv.
        format: version of the layout of the checkpoint.
    """

    run: str
    config: dict[str, JsonValue]
    class_names: list[str]
    history: list[Row] = field(default_factory=list)
    format: Literal[1] = FORMAT

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self.history[-1]["epoch"] if self.history else 0

    @property
    def val_acc(self) -> float | None:
        """Validation accuracy in [0, 1] of the newest epoch; None without validation."""
        return self.history[-1]["val_acc"] if self.history else None

    @property
    def best(self) -> Row | None:
        """The row of the highest validation accuracy, the first of equals; None without validation."""
        judged = [row for row in self.history if row["val_acc"] is not None]
        return max(judged, key=lambda row: row["val_acc"] or 0.0, default=None)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the past; the configuration stays that of the present."""
        self.history = list(state["history"])


class DurableSaver(BaseSaveHandler):
    """Ignite's save handler that never has fewer complete files than before.

    `Checkpoint` asks to remove the old file before it saves the new one; here the old file goes once the new one is on
    the disk, and a file that somebody else deleted is not missed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._superseded: set[str] = set()

    def __call__(self, checkpoint: Mapping, filename: str, metadata: Mapping | None = None) -> None:
        write_checkpoint(self.folder / filename, checkpoint)
        for name in self._superseded - {filename}:
            (self.folder / name).unlink(missing_ok=True)
        self._superseded.clear()

    def remove(self, filename: str) -> None:
        self._superseded.add(filename)


def write_checkpoint(path: Path, checkpoint: Mapping) -> None:
    """Write a temporary file, flush it to the disk, rename it: `path` holds the old or the new whole, never a part."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(dict(checkpoint), file)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy durably: `target` holds the old or the new whole, never a part."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
    _sync_folder(target.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place at the end, or goes if there was an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sweep_temporaries(folder: Path, older_than: float = 0) -> None:
    """Remove what a killed process left half-written, if it is older than so many seconds."""
    for path in folder.glob(f".*{TEMPORARY}"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime >= older_than:
                path.unlink()


def _sync_folder(folder: Path) -> None:
    """A rename survives a power cut only once the folder itself is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this project, running no code from it.

    Returns:
        The state dicts by name ("model", and for a training state also "optimizer" and more), on the CPU, and "record".

    Raises:
        InputError: missing, truncated, damaged, hostile or foreign.
    """
    try:
        # torch.load does not compare the zip's checksums with the data: a flipped bit would be a silent wrong weight.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise InputError(f"{path}: damaged checkpoint: the checksum of {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, not a checkpoint") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read the checkpoint: {error.strerror or error}") from None
    except zipfile.BadZipFile:
        raise InputError(f"{path}: not a checkpoint, or truncated") from None
    except pickle.UnpicklingError:
        raise InputError(f"{path}: refused: it holds more than plain tensors and containers") from None
    except InputError:
        raise
    except Exception as error:  # damage raises nearly anything: RuntimeError, KeyError, zlib.error, struct.error
        raise InputError(f"{path}: damaged checkpoint: {type(error).__name__}") from None
    if not isinstance(checkpoint, dict) or not {"model", "record"} <= checkpoint.keys():
        raise InputError(f"{path}: not a checkpoint of cifar_ignite (no model and record in it)")
    for name in {"model", "ema"} & checkpoint.keys():
        weights = checkpoint[name]
        pairs = weights.items() if isinstance(weights, dict) else [(None, None)]
        if not all(isinstance(key, str) and isinstance(weight, Tensor) for key, weight in pairs):
            raise InputError(f"{path}: not a checkpoint of cifar_ignite ({name} is no state dict)")
    try:
        return checkpoint | {"record": RunRecord(**checkpoint["record"])}
    except (TypeError, ValidationError):
        raise InputError(f"{path}: not a checkpoint of this version of cifar_ignite (its record is another)") from None


def newest(paths: Iterable[Path]) -> Path | None:
    """The file written last."""
    return max(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), default=None)


def create_unique_dir(parent: Path, name: str) -> Path:
    """Make `parent`/`name`, or `name`_2, `name`_3, ... where that exists; two processes never get the same."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}_{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            break
    return folder


def best_model_path(output_dir: Path, experiment: str, *, selected: bool) -> Path:
    """Where an experiment's best model lies; `selected` is false for runs without validation, which select nothing."""
    return (
        output_dir / "best_models" / (f"{experiment}_best.pth" if selected else f"{experiment}_val_acc_none_best.pth")
    )


def publish_best(source: Path, target: Path) -> str:
    """Copy a run's best model to `target`, unless a better one, or one that cannot be compared, is there.

    Models compare when the same validation images judged them. Without validation the newest replaces.

    Returns:
        One line that says whose model `target` holds now.
    """
    record: RunRecord = load_checkpoint(source)["record"]
    if record.val_acc is not None and target.exists() and (other := _readable_record(target)):
        if not _same_validation(record, other):
            return f"{target} stays: other validation images judged it (--set experiment=NAME publishes elsewhere)"
        # A run that was killed while it published the same model does it again.
        again = other.run == record.run and other.val_acc == record.val_acc
        if other.val_acc is not None and other.val_acc >= record.val_acc and not again:
            return f"{target} stays: run {other.run} reached {other.val_acc:.2%}"
    copy_checkpoint(source, target)
    return f"{target} is this run's"


def _readable_record(path: Path) -> RunRecord | None:
    try:
        return load_checkpoint(path)["record"]
    except InputError as error:
        logger.warning("%s; it is replaced", error)
        return None


def _same_validation(one: RunRecord, other: RunRecord) -> bool:
    ours, theirs = flatten(one.config), flatten(other.config)
    keys = ["data.source", "data.validation", "data.split_seed"]
    if ours["data.source"] == "synthetic":
        keys += [key for key in ours if key.startswith("data.synthetic.")]
    return all(ours[key] == theirs.get(key) for key in keys)

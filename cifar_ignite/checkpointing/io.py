"""Reading and writing checkpoint files.

A checkpoint is a zip file of plain state dicts, the configuration and a few numbers. It loads with `weights_only=True`
on any machine, and is enough to rebuild the model.
"""

import math
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from cifar_ignite.checkpointing.run_record import FORMAT, RunRecord
from cifar_ignite.errors import InputError
from cifar_ignite.files import atomic_write, fsync_directory, fsync_file


def save_checkpoint(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically (temporary file, fsync, rename): `path` holds the previous or the new file.

    Raises:
        OSError, RuntimeError: If the file cannot be written; torch's zip writer raises RuntimeError on a full disk.
    """
    with atomic_write(path) as temp_path:
        with temp_path.open("wb") as file:
            torch.save(dict(checkpoint), file)
        fsync_file(temp_path)
    fsync_directory(path.parent)


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy a checkpoint atomically: `target` holds the previous or the new file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as temp_path:
        shutil.copyfile(source, temp_path)
        fsync_file(temp_path)
    fsync_directory(target.parent)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint of this project without executing code from it.

    Returns:
        State dicts by name on the CPU ("model", and in a full checkpoint "optimizer" and more), a `RunRecord` under
        "record", and in a best model that was validated "temperatures".

    Raises:
        InputError: If the file is missing, truncated, damaged, malicious, or not a checkpoint of this version.
    """
    checkpoint = _load_file(path)
    if not isinstance(checkpoint, dict) or not {"model", "record"} <= checkpoint.keys():
        raise InputError(f"{path}: not a checkpoint of cifar_ignite (it has no model and record)")
    for name in {"model", "ema"} & checkpoint.keys():
        if not _is_state_dict(checkpoint[name]):
            raise InputError(f"{path}: not a checkpoint of cifar_ignite ({name} is not a state dict)")
    if not _are_temperatures(checkpoint.get("temperatures", {})):
        raise InputError(f"{path}: not a checkpoint of cifar_ignite (its temperatures are not positive numbers)")
    record = checkpoint["record"]
    if isinstance(record, dict) and record.get("format") == 1:
        raise InputError(
            f"{path}: checkpoint format 1, written before configuration keys were renamed; this version reads format "
            f"{FORMAT}: use the version that wrote it, or train again"
        )
    try:
        return checkpoint | {"record": RunRecord(**record)}
    except (TypeError, ValidationError):
        raise InputError(f"{path}: not a checkpoint of this version of cifar_ignite (invalid record)") from None


def _load_file(path: Path) -> Any:
    """Return the content of a checkpoint file.

    Raises:
        InputError: If the file is missing, truncated, damaged or malicious.
    """
    try:
        # torch.load does not verify the zip's checksums: a flipped bit would silently change a weight.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise InputError(f"{path}: damaged checkpoint: the checksum of {damaged} does not match")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a directory, not a checkpoint") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read the checkpoint: {error.strerror or error}") from None
    except zipfile.BadZipFile:
        raise InputError(f"{path}: not a checkpoint, or truncated") from None
    except pickle.UnpicklingError:
        raise InputError(f"{path}: refused: contains more than plain tensors and containers") from None
    except InputError:
        raise
    except Exception as error:  # damage raises nearly anything: RuntimeError, KeyError, zlib.error, struct.error
        raise InputError(f"{path}: damaged checkpoint: {type(error).__name__}") from None


def _are_temperatures(temperatures: Any) -> bool:
    return isinstance(temperatures, dict) and all(
        isinstance(value, float) and 0 < value < math.inf for value in temperatures.values()
    )


def _is_state_dict(weights: Any) -> bool:
    return isinstance(weights, dict) and all(
        isinstance(name, str) and isinstance(weight, Tensor) for name, weight in weights.items()
    )

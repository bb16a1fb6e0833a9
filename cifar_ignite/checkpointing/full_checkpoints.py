"""Full checkpoints: which ones a run directory has, and which one is the latest that loads."""

import json
import logging
import re
from pathlib import Path
from typing import Any

from cifar_ignite.checkpointing.io import load_checkpoint
from cifar_ignite.errors import InputError
from cifar_ignite.files import check_listable, latest_file, list_files

logger = logging.getLogger(__name__)


def latest_run(runs: Path, experiment: str) -> Path:
    """Return the run directory of an experiment with the most recently written file.

    Raises:
        InputError: If there is none, or `runs` cannot be listed.
    """
    check_listable(runs)
    files = [
        file
        for run_config in list_files(runs, "*/config.json")
        if _experiment_of(run_config.parent) == experiment
        for file in [run_config, *full_checkpoints(run_config.parent)]
    ]
    found = latest_file(files)
    if found is None:
        raise InputError(f"{runs}: no run of experiment {experiment!r} to resume; start one without RESUME")
    return found.parent if found.name == "config.json" else found.parent.parent


def read_run_config(run_dir: Path | None) -> dict[str, Any]:
    """Return the configuration tree of a run directory.

    Raises:
        InputError: If it has none.
    """
    path = (run_dir or Path()) / "config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except PermissionError as error:
        raise InputError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except (OSError, ValueError, TypeError):
        raise InputError(f"{run_dir}: not a run directory: it has no full checkpoint and no config.json") from None


def _experiment_of(run_dir: Path) -> Any:
    try:
        return read_run_config(run_dir).get("experiment")
    except InputError:
        return None


def full_checkpoints(run_dir: Path) -> list[Path]:
    """Return the full checkpoints of a run, the latest first."""
    return list_checkpoints(run_dir / "checkpoints")


def list_checkpoints(directory: Path, kinds: str = "latest|epoch") -> list[Path]:
    """Return the full checkpoints in a directory, the latest first.

    Args:
        directory: Directory of checkpoints.
        kinds: Regular expression of the kinds. A number follows in the name, unlike in "latest_000000008 copy.pt".
    """
    return [path for path in list_files(directory, "*.pt") if re.fullmatch(rf"({kinds})_\d+\.pt", path.name)]


def load_latest_valid(paths: list[Path]) -> tuple[Path | None, dict[str, Any]]:
    """Return the first checkpoint that loads and its content, with a warning for each one before it."""
    for path in paths:
        try:
            return path, load_full_checkpoint(path)
        except InputError as error:
            logger.warning("%s; falling back to an older checkpoint", error)
    if paths:
        raise InputError(f"{paths[0].parent}: none of the {len(paths)} full checkpoints is valid")
    return None, {}


def load_full_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint that a run can be resumed from.

    Raises:
        InputError: As `load_checkpoint`, or if the file contains weights only.
    """
    saved = load_checkpoint(path)
    if missing := {"optimizer", "trainer", "timer", "metrics"} - saved.keys():
        raise InputError(
            f"{path}: not a full checkpoint (it lacks {', '.join(sorted(missing))}); "
            "resume from a latest_*.pt or an epoch_*.pt"
        )
    try:
        counters = [saved["trainer"]["iteration"], saved["trainer"]["epoch_length"], *saved["optimizer"]["state"]]
        counters += [saved["early_stopping"]["counter"]] if "early_stopping" in saved else []
        is_valid = all(isinstance(counter, int) for counter in counters) and counters[1] > 0
        float(saved["timer"]["seconds"])
    except (TypeError, KeyError, ValueError):
        is_valid = False
    if not is_valid:
        raise InputError(f"{path}: not a full checkpoint of this version of cifar_ignite")
    return saved

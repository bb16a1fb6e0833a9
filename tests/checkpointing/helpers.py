"""Checkpoint files for the tests, and failing disks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_ignite.checkpointing import io
from cifar_ignite.checkpointing.run_record import RunRecord
from cifar_ignite.config import Config
from tests.helpers import epoch_metrics


def create_record(
    val_acc: float | None = 0.5, run: str = "2026", val_images: str | None = "these", data: dict[str, Any] | None = None
) -> RunRecord:
    """Return the record of a run after three epochs; `val_images` stands for the images that it was validated on."""
    history = [epoch_metrics(3, val_acc)]
    tree = Config.model_validate({"data": data or {}}).model_dump(mode="json")
    return RunRecord(run, tree, ["a", "b"], history, val_fingerprint=val_images)


def write_checkpoint(path: Path, *values: Any, **options: Any) -> Path:
    """Write a checkpoint with 300 weights drawn from seed 0 and a record, see `create_record`; return `path`."""
    weight = torch.randn(300, generator=torch.Generator().manual_seed(0))
    record = create_record(*values, **options)
    io.save_checkpoint(path, {"model": {"weight": weight}, "record": record.state_dict()})
    return path


def fail_saves(monkeypatch: pytest.MonkeyPatch, is_full: Callable[[], bool]) -> None:
    """Let torch.save fail as on a full disk, after half of the file, whenever `is_full` returns true."""
    original = torch.save

    def save(content: Any, file: Any) -> None:
        if is_full():
            file.write(b"half of the file")
            raise OSError(28, "No space left on device")
        original(content, file)

    monkeypatch.setattr(io.torch, "save", save)


def names_in(directory: Path) -> list[str]:
    """Return the names of all files in a directory, sorted."""
    return sorted(path.name for path in directory.iterdir())

"""Helpers shared by the tests: tiny inputs, and comparisons of directories and runs."""

import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ignite.engine import Engine, Events
from PIL import Image

from benchmarks.run_diff import diff_runs
from cifar_ignite.checkpointing.run_record import RunRecord
from cifar_ignite.data.cifar10 import CIFAR10_CLASSES

posix_only = pytest.mark.skipif(os.name == "nt", reason="requires fork, signals, permissions or names of POSIX")
REPOSITORY = Path(__file__).parents[2]
TINY = {
    "experiment": "tiny",
    "data": {"batch_size": 32, "val_size": 20},
    "model": {"name": "hybrid_resnet", "width": 2},
    "train": {"epochs": 2, "checkpoint_every": 2, "log_every": 1, "patience": None},
}


def write_batch(path: Path, count: int, seed: int) -> None:
    """Write a labeled CIFAR-10 batch whose classes differ in brightness, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    labels = [int(label) for label in np.arange(count) % 10]
    data = (rng.integers(0, 100, (count, 3072)) + 15 * np.array(labels)[:, None]).astype(np.uint8)
    batch = {b"data": data, b"labels": labels, b"batch_label": b"tiny", b"filenames": [b"x.png"] * count}
    path.write_bytes(pickle.dumps(batch, protocol=2))


def write_cifar10(root: Path) -> Path:
    """Write 5 x 24 training and 30 test images in the official format of CIFAR-10; return `root`."""
    directory = root / "cifar-10-batches-py"
    directory.mkdir(parents=True)
    for number in range(1, 6):
        write_batch(directory / f"data_batch_{number}", 24, number)
    write_batch(directory / "test_batch", 30, 9)
    (directory / "batches.meta").write_bytes(pickle.dumps({b"label_names": [c.encode() for c in CIFAR10_CLASSES]}))
    return root


def snapshot(directory: Path) -> dict[str, bytes | None]:
    """Return every path below a directory, with the bytes of the files."""
    return {
        os.path.relpath(path, directory): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")
    }


def epoch_metrics(epoch: int, val_acc: float | None) -> dict[str, Any]:
    """Return one row of a run's history."""
    return {
        "epoch": epoch,
        "train_loss": 1.0,
        "train_acc": 0.5,
        "val_loss": None if val_acc is None else 1.0,
        "val_acc": val_acc,
        "lr": 0.1,
        "seconds": 2.0,
        "images_per_second": 50.0,
    }


def only_run(directory: Path) -> Path:
    """Return the only run directory below directory/outputs."""
    (run_dir,) = (directory / "outputs" / "training_runs").iterdir()
    return run_dir


def assert_same_training(run_dir: Path, other: Path) -> None:
    """Assert bit-identical weights, EMA, momentum buffers, counters and metrics of two runs; only times differ."""
    assert diff_runs(run_dir, other) == []


def run_with_scores(scores: Sequence[float | None], attach: Callable[[Engine, RunRecord], Any]) -> tuple[int, Any]:
    """Run an engine for one epoch per validation accuracy; return the epochs that ran and the result of `attach`."""
    record = RunRecord("run", {}, [])
    trainer = Engine(lambda engine, batch: None)

    @trainer.on(Events.EPOCH_COMPLETED)
    def append(engine: Engine) -> None:
        record.history.append(epoch_metrics(engine.state.epoch, scores[engine.state.epoch - 1]))  # type: ignore[arg-type]

    attached = attach(trainer, record)
    trainer.run([0], max_epochs=len(scores))
    return trainer.state.epoch, attached


def save_blank_figure(figure: object, path: Path, **options: object) -> None:
    """Write one white pixel in place of a figure, as `Figure.savefig`."""
    Image.new("L", (1, 1), 255).save(path, format="PNG")


def write_cifar100(root: Path, train: int, test: int) -> Path:
    """Write generated images in the official format of CIFAR-100; return `root`."""
    directory = root / "cifar-100-python"
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in (("train", train), ("test", test)):
        labels = np.arange(count) % 100
        brightness = 2 * labels[:, None]
        data = (rng.integers(0, 40, (count, 3072)) + brightness).astype(np.uint8)
        batch = {b"data": data, b"fine_labels": labels.tolist(), b"coarse_labels": (labels // 5).tolist()}
        (directory / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = {b"fine_label_names": [b"class %02d" % label for label in range(100)], b"coarse_label_names": [b"x"] * 20}
    (directory / "meta").write_bytes(pickle.dumps(names, protocol=2))
    return root

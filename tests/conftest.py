"""A tiny CIFAR-10 in the real file format, and a run of it that takes about a second."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events

from benchmarks.faults import differences
from cifar_ignite.__main__ import main
from cifar_ignite.checkpoints import RunRecord
from cifar_ignite.config import parse_config
from cifar_ignite.data import CIFAR10_CLASSES

REPOSITORY = Path(__file__).parent.parent
TINY = {
    "experiment": "tiny",
    "data": {"batch_size": 32, "validation": 20},
    "model": {"name": "hybrid_resnet", "width": 2},
    "train": {"epochs": 2, "checkpoint_every": 2, "log_every": 1, "patience": None},
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny tensors: threads cost more than they bring."""
    torch.set_num_threads(1)


def write_batch(path: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = [int(label) for label in np.arange(count) % 10]
    # The class shows in the brightness, so that there is something to learn.
    data = (rng.integers(0, 100, (count, 3072)) + 15 * np.array(labels)[:, None]).astype(np.uint8)
    batch = {b"data": data, b"labels": labels, b"batch_label": b"tiny", b"filenames": [b"x.png"] * count}
    path.write_bytes(pickle.dumps(batch, protocol=2))


@pytest.fixture
def cifar_root(tmp_path: Path) -> Path:
    """data/cifar-10-batches-py with 5 x 24 training and 30 test images."""
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for number in range(1, 6):
        write_batch(folder / f"data_batch_{number}", 24, number)
    write_batch(folder / "test_batch", 30, 9)
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [c.encode() for c in CIFAR10_CLASSES]}))
    return tmp_path / "data"


def merge(tree: dict, changes: dict) -> dict:
    """Deep update of a copy."""
    merged = dict(tree)
    for key, value in changes.items():
        merged[key] = merge(merged.get(key, {}), value) if isinstance(value, dict) else value
    return merged


@pytest.fixture
def tiny_tree(tmp_path: Path, cifar_root: Path) -> dict:
    return merge(TINY, {"output_dir": str(tmp_path / "outputs"), "data": {"root": str(cifar_root)}})


@pytest.fixture
def tiny_file(tmp_path: Path, tiny_tree: dict) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(tiny_tree))
    return path


@pytest.fixture
def tiny_config(tiny_tree: dict):
    """A function: the tiny configuration with changes, for example tiny_config(train={"epochs": 1})."""
    return lambda **changes: parse_config(merge(tiny_tree, changes), "test")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Run the command line in a scratch folder: returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        return status, *capsys.readouterr()

    return run


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the bytes of the files."""
    return {os.path.relpath(path, folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def row(epoch: int, val_acc: float | None) -> dict:
    """A row of a run's history."""
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


def the_run(folder: Path) -> Path:
    """The only run folder below folder/outputs."""
    (run_dir,) = (folder / "outputs" / "training_runs").iterdir()
    return run_dir


def assert_same_training(one: Path, other: Path) -> None:
    """Bit-identical weights, averages, momenta, counters and metrics of two run folders; only times differ."""
    assert differences(one, other) == []


def scored(scores, attach):
    """Run an engine for as many epochs as there are validation accuracies; returns how many it ran."""
    record = RunRecord("run", {}, [])
    trainer = Engine(lambda engine, batch: None)

    @trainer.on(Events.EPOCH_COMPLETED)
    def append(engine):
        record.history.append(row(engine.state.epoch, scores[engine.state.epoch - 1]))

    attached = attach(trainer, record)
    trainer.run([0], max_epochs=len(scores))
    return trainer.state.epoch, attached

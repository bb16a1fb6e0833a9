"""Listings of checkpoints, runs, best models and evaluations with entries that are not the project's."""

import glob
import json
import os
import shutil

import pandas as pd
import pytest
from ignite.engine import Engine

from cifar_ignite import files
from cifar_ignite.checkpointing.best_model import list_best_models
from cifar_ignite.checkpointing.full_checkpoints import full_checkpoints, latest_run
from cifar_ignite.checkpointing.resume import resolve_resume
from cifar_ignite.checkpointing.savers import CheckpointSaver, FaultTolerantSaver
from cifar_ignite.compare import load_latest_evaluations
from cifar_ignite.config import TrainConfig
from cifar_ignite.config_io import load_config
from cifar_ignite.errors import InputError
from cifar_ignite.evaluation.trained_model import find_best_model
from tests.helpers import only_run, posix_only

OLD, NEW = 100, 200
pytestmark = pytest.mark.usefixtures("blank_figures")


def write(path, modified=OLD, text="x"):
    """Write a file with a time of modification; return `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (modified, modified))
    return path


def add_foreign_entries(directory, name):
    """Add entries newer than all others: hidden, dangling, a directory, and what file managers add."""
    write(directory / f"._{name}", NEW)
    write(directory / "Thumbs.db", NEW)
    (directory / f"dangling_{name}").symlink_to(directory / "gone")
    (directory / f"loop_{name}").symlink_to(f"loop_{name}")
    (directory / f"directory_{name}").mkdir()


@pytest.fixture
def run_dir(train, make_once):
    """A run of one epoch, of four iterations, without a checkpoint that is kept."""
    return make_once("one_epoch", lambda *words: train("--set", "train.epochs=1", *words))


def hide_from_stat(monkeypatch, name):
    """Let listings find one more file, which another process has deleted before they read its time."""
    original = glob.glob
    monkeypatch.setattr(files.glob, "glob", lambda *args, **options: [*original(*args, **options), name])


# --- Files --------------------------------------------------------------------------------------------------------


@posix_only
def test_list_files_skips_foreign_entries(tmp_path):
    kept = [write(tmp_path / "b_best.pth"), write(tmp_path / "a_best.pth")]
    add_foreign_entries(tmp_path, "x_best.pth")
    assert files.list_files(tmp_path, "*_best.pth") == kept
    assert files.list_files(tmp_path / "missing", "*") == []


def test_list_files_skips_files_that_vanish(tmp_path, monkeypatch):
    kept = write(tmp_path / "a.pt")
    hide_from_stat(monkeypatch, "gone.pt")
    assert files.list_files(tmp_path, "*.pt") == [kept]


def test_list_files_lists_again_if_all_files_have_vanished(tmp_path, monkeypatch):
    def rotate(*_, **__):
        write(tmp_path / "2.pt")
        monkeypatch.undo()
        return ["1.pt"]

    monkeypatch.setattr(files.glob, "glob", rotate)
    assert files.list_files(tmp_path, "*.pt") == [tmp_path / "2.pt"]


def test_list_files_skips_unreadable_files(tmp_path, monkeypatch):
    kept, unreadable = write(tmp_path / "a.pt"), write(tmp_path / "b.pt", NEW)
    monkeypatch.setattr(files.os, "access", lambda path, mode: path != unreadable)
    assert files.list_files(tmp_path, "*.pt") == [kept]


def test_check_listable_accepts_missing_directory_and_refuses_file(tmp_path):
    files.check_listable(tmp_path / "missing")
    with pytest.raises(InputError, match=r"occupied: cannot read the directory: Not a directory"):
        files.check_listable(write(tmp_path / "occupied"))


# --- Best models --------------------------------------------------------------------------------------------------


@posix_only
def test_list_best_models_skips_foreign_entries(tmp_path):
    demo = write(tmp_path / "best_models" / "demo_best.pth")
    add_foreign_entries(demo.parent, "demo_best.pth")
    assert list_best_models(tmp_path) == [demo]
    with pytest.raises(InputError, match=r"available: demo$"):
        find_best_model(tmp_path, "se", lambda record: True)


@posix_only
def test_find_best_model_that_is_named_but_cannot_be_read_is_refused(tmp_path):
    write(tmp_path / "best_models" / "demo_best.pth")
    (tmp_path / "best_models" / "se_best.pth").symlink_to("gone")
    with pytest.raises(InputError, match=r"se_best\.pth: no such checkpoint"):
        find_best_model(tmp_path, "se", lambda record: True)


# --- Checkpoints --------------------------------------------------------------------------------------------------


@posix_only
def test_full_checkpoints_skip_foreign_entries_and_copies(tmp_path):
    directory = tmp_path / "checkpoints"
    kept = [write(directory / "latest_000000008.pt", OLD + 1), write(directory / "epoch_0001.pt", OLD)]
    for name in ("latest_000000004.pt", "epoch_0002.pt"):
        add_foreign_entries(directory / name, name)
    for name in ("latest_000000004 copy.pt", "latest_backup.pt", "epoch_0001 (1).pt"):
        write(directory / name, NEW)
    (directory / "latest_000000012.pt").symlink_to("gone")
    assert full_checkpoints(tmp_path) == kept


def test_full_checkpoints_skip_rotated_file(tmp_path, monkeypatch):
    kept = write(tmp_path / "checkpoints" / "latest_000000008.pt")
    hide_from_stat(monkeypatch, "latest_000000004.pt")
    assert full_checkpoints(tmp_path) == [kept]


@posix_only
def test_rotation_keeps_files_that_it_did_not_write(tmp_path):
    backup, hidden = write(tmp_path / "latest_backup.pt"), write(tmp_path / "._latest_000000001.pt")
    (tmp_path / "latest_000000000.pt").symlink_to("gone")
    trainer = Engine(lambda engine, batch: None)
    checkpoints = CheckpointSaver(FaultTolerantSaver(tmp_path, 0), {"model": trainer, "other": trainer}, lambda: None)
    checkpoints.attach(trainer, TrainConfig(checkpoint_every=1000), check_every=1)
    trainer.run([0], max_epochs=4)
    assert backup.exists()
    assert hidden.exists()
    numbers = sorted(path.name for path in tmp_path.glob("latest_*[1-9].pt"))
    assert numbers == ["latest_000000003.pt", "latest_000000004.pt"]


@posix_only
def test_latest_run_skips_foreign_runs(tmp_path):
    config = write(tmp_path / "run" / "config.json", OLD, '{"experiment": "se"}')
    write(tmp_path / ".hidden" / "config.json", NEW, '{"experiment": "se"}')
    write(tmp_path / "list" / "config.json", NEW, "[]")
    write(tmp_path / "binary" / "config.json", NEW).write_bytes(b"\xff")
    write(tmp_path / "file", NEW)
    (tmp_path / "loop").symlink_to("loop")
    assert latest_run(tmp_path, "se") == config.parent


# --- Compare ------------------------------------------------------------------------------------------------------


@posix_only
def test_compare_skips_foreign_entries(command, run_dir, tmp_path):
    shutil.copytree(run_dir, run_dir.parent / ".hidden")
    (run_dir.parent / "empty").mkdir()
    (run_dir.parent / "dangling").symlink_to("gone")
    write(run_dir.parent / "._run", NEW)
    shutil.copytree(run_dir, run_dir.parent / "without_rows")
    history = run_dir.parent / "without_rows" / "logs" / "metrics.csv"
    history.write_text(history.read_text().splitlines()[0] + "\n")
    status, out, err = command("compare")
    assert (status, err) == (0, "")
    assert "skipped: without_rows: no completed epoch" in out
    assert pd.read_csv(tmp_path / "outputs" / "comparison.csv")["run"].tolist() == [run_dir.name]


@posix_only
@pytest.mark.parametrize(
    "metrics",
    [
        {"accuracy": "high"}, {"accuracy": None}, {"accuracy": 0.5, "tta": None}, {"accuracy": 0.5, "tta": {}},
        {"accuracy": 0.5, "run": []}, ["accuracy"], 7,
    ],
)  # fmt: skip
def test_load_latest_evaluations_skips_foreign_metrics(tmp_path, metrics):
    valid = {"run": "a", "accuracy": 0.5}
    write(tmp_path / "valid" / "metrics.json", OLD, json.dumps(valid))
    text = json.dumps({"run": "a"} | metrics if isinstance(metrics, dict) else metrics)
    write(tmp_path / "foreign" / "metrics.json", NEW, text)
    write(tmp_path / ".hidden" / "metrics.json", NEW, json.dumps(valid | {"accuracy": 0.9}))
    (tmp_path / "dangling").symlink_to("gone")
    assert load_latest_evaluations(tmp_path) == {"a": valid}


# --- Resuming by path ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inside", [".", "checkpoints", "checkpoints/", "checkpoints/..", "checkpoints/latest_000000004.pt"]
)
def test_resume_accepts_run_checkpoints_and_file(run_dir, tiny_file, inside):
    state = resolve_resume(load_config(tiny_file), f"{run_dir}/{inside}", (), False)
    assert state.run_dir == run_dir
    assert state.path == run_dir / "checkpoints" / "latest_000000004.pt"
    assert state.epoch == 1


def test_resume_of_copied_checkpoints_continues_in_new_run(run_dir, tiny_file, tmp_path):
    for name in ("copied", "checkpoints"):
        shutil.copytree(run_dir / "checkpoints", tmp_path / name)
        state = resolve_resume(load_config(tiny_file), str(tmp_path / name), (), False)
        assert state.run_dir is None
        assert state.path == tmp_path / name / "latest_000000004.pt"


def test_resume_expands_home_directory(run_dir, command, tiny_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = f"~/{run_dir.relative_to(tmp_path)}/checkpoints"
    status, out, err = command("train", "--config", tiny_file, "--resume", path, "--set", "train.epochs=2")
    assert (status, err) == (0, "")
    assert "resuming after epoch 1, iteration 4" in out
    assert only_run(tmp_path) == run_dir


@pytest.mark.usefixtures("run_dir")
def test_resume_of_other_directory_is_refused(tiny_file, tmp_path):
    with pytest.raises(InputError, match="not a run directory"):
        resolve_resume(load_config(tiny_file), str(tmp_path / "outputs" / "training_runs"), (), False)

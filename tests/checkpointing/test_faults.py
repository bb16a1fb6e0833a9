"""Faults in the middle of a run: full disks, deleted files, exhausted memory, diverging training, killed processes.

Either training continues with a warning, or it ends with one line and valid checkpoints that it can be resumed from.
"""

import builtins
import logging
import math
import re
import shutil
import sys

import pytest
import torch
from ignite.engine import Events
from tensorboardX.event_file_writer import EventsWriter

from benchmarks import faults
from cifar_ignite import plots
from cifar_ignite.checkpointing import io
from cifar_ignite.checkpointing.io import load_checkpoint
from cifar_ignite.training import handlers, loggers
from cifar_ignite.training.engines import TrainingEvents
from tests.helpers import assert_same_training, only_run, posix_only
from tests.helpers.runs import STATEFUL, call_at_iteration, latest_checkpoint, raise_disk_full, set_options

RESUME = ("--resume", "latest")


def set_val_accs(val_accs):
    """Return an `attach` of `train` that replaces the validation accuracies of a run."""

    def attach(state):
        state.evaluator.add_event_handler(
            Events.COMPLETED, lambda engine: engine.state.metrics.update(accuracy=val_accs[state.record.epoch])
        )

    return attach


# --- Logs ---------------------------------------------------------------------------------------------------------


def test_failing_logs_warn_once_each_and_training_continues(train, uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(loggers, "write_history", raise_disk_full)
        patched.setattr(plots, "plot_training_curves", raise_disk_full)
        patched.setattr(EventsWriter, "write_event", raise_disk_full)
        patched.setattr(logging, "FileHandler", raise_disk_full)
        status, out, err = train(*STATEFUL)
    assert (status, err) == (0, "")
    for what in ("metrics.csv", "figures", "TensorBoard events", "training.log"):
        assert out.count(f"{what} (") == 1, what
    assert out.count("training continues without it") == 4
    run_dir = only_run(tmp_path)
    assert not (run_dir / "logs" / "metrics.csv").exists()
    weights, expected = (load_checkpoint(latest_checkpoint(run))["model"] for run in (run_dir, uninterrupted))
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


def test_failing_import_of_matplotlib_warns_once(train, monkeypatch):
    """It writes to the home directory when it is imported."""
    original = builtins.__import__

    def refuse(name, *arguments, **options):
        if name == "cifar_ignite.plots":
            raise PermissionError(13, "Permission denied")
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    status, out, _ = train(*set_options({"train.checkpoint_every": 1}))
    assert status == 0
    assert out.count("cannot write figures") == 1


def test_log_directories_replaced_by_files_warn_once(train, tmp_path):
    """A real failure of the file system."""

    def occupy(state):
        for name in ("figures", "tensorboard"):
            (only_run(tmp_path) / "logs" / name).touch()

    status, out, err = train(attach=occupy)
    assert (status, err) == (0, "")
    assert out.count("cannot write figures") == 1
    assert out.count("cannot write TensorBoard events") == 1


# --- Checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("blank_figures")
def test_failing_checkpoints_end_run_with_previous_ones_valid(train, tmp_path, monkeypatch):
    num_saves = 0
    original = torch.save

    def save(*arguments):
        nonlocal num_saves
        num_saves += 1
        if num_saves > 3:
            raise_disk_full()
        original(*arguments)

    monkeypatch.setattr(io.torch, "save", save)
    status, out, err = train(*STATEFUL, *set_options({"train.epochs": 9, "train.max_save_failures": 2}))
    assert status == 1
    assert "cannot write a checkpoint to" in err
    assert "No space left on device" in err
    assert "consecutive failures: 3; latest checkpoint before it: " in err
    assert err.count("\n") == 1
    assert out.count("previous checkpoints are kept, training continues") == 2
    paths = list((only_run(tmp_path) / "checkpoints").iterdir())
    assert paths
    for path in paths:
        load_checkpoint(path)


@pytest.mark.usefixtures("blank_figures")
def test_deleted_run_directory_ends_run_with_one_line(train, tmp_path):
    attach = call_at_iteration(6, lambda: shutil.rmtree(only_run(tmp_path)))
    status, out, err = train(*STATEFUL, *set_options({"train.max_save_failures": 1}), attach=attach)
    assert status == 1
    assert "cannot write a checkpoint to" in err
    assert err.count("\n") == 1
    assert out.count("cannot write metrics.csv") == 1


@pytest.mark.usefixtures("blank_figures")
def test_failed_save_of_last_best_model_is_repeated_by_resume(train, tmp_path, monkeypatch):
    """It ends the run with status 1, because no later epoch would save it."""
    attach = set_val_accs([0.1, 0.2])
    original = torch.save

    def save(checkpoint, file, *rest):
        if "best_epoch_0002" in str(getattr(file, "name", file)):
            raise_disk_full()
        original(checkpoint, file, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(io.torch, "save", save)
        status, _, err = train(attach=attach)
    assert status == 1
    assert "cannot write a checkpoint" in err
    assert train(*RESUME, attach=attach)[0] == 0
    promoted = load_checkpoint(tmp_path / "outputs" / "best_models" / "tiny_best.pth")["record"]
    assert promoted.epoch == 2


@pytest.mark.usefixtures("blank_figures")
def test_deleted_best_model_is_reported_at_the_end(train):
    status, out, err = train(
        attach=lambda state: state.trainer.add_event_handler(Events.COMPLETED, lambda: state.best.path.unlink())
    )
    assert (status, err) == (0, "")
    assert "best model  not updated: " in out


@pytest.mark.usefixtures("blank_figures")
def test_end_of_run_reports_whose_model_is_the_best(train, tmp_path):
    """Also if the last epoch is not the best one."""
    assert "tiny_best.pth updated by this run" in train(*STATEFUL, attach=set_val_accs([0.3, 0.5, 0.4, 0.2]))[1]
    first = only_run(tmp_path).name
    out = train(*STATEFUL, attach=set_val_accs([0.3, 0.4, 0.45, 0.2]))[1]
    assert f"tiny_best.pth unchanged: run {first} reached 50.00%" in out
    best = load_checkpoint(tmp_path / "outputs" / "best_models" / "tiny_best.pth")["record"]
    assert (best.run, best.epoch, best.val_acc) == (first, 2, 0.5)


# --- Memory and divergence ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("blank_figures")
def test_exhausted_memory_ends_run_with_one_line(train):
    """Whatever the allocator raises: the errors are in tests/test_errors.py."""

    def fail():
        raise RuntimeError("CUDA error: out of memory")

    status, _, err = train(attach=call_at_iteration(6, fail))
    assert status == 1
    assert err.count("\n") == 1
    assert "out of memory" in err
    assert "data.batch_size" in err
    assert re.search(r"latest checkpoint before it: .*latest_000000004\.pt\n$", err)


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("iteration", [1, 7])
def test_non_finite_gradient_ends_run_and_resume_is_bit_identical(
    train, uninterrupted, tmp_path, monkeypatch, iteration
):
    original = handlers.attach_grad_clipping

    def attach(trainer, model, *rest):
        def spoil(engine):
            if engine.state.iteration == iteration:
                next(model.parameters()).grad[0] = math.nan

        trainer.add_event_handler(TrainingEvents.BACKWARD_COMPLETED, spoil)
        return original(trainer, model, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(handlers, "attach_grad_clipping", attach)
        status, _, err = train(*STATEFUL)
    assert status == 1
    epoch = (iteration - 1) // 4
    path = only_run(tmp_path) / "checkpoints" / f"latest_{4 * epoch:09d}.pt"
    where = rf"not finite at epoch {epoch + 1}, iteration {iteration}, lr [\d.e-]+"
    assert re.search(rf"{where}; latest checkpoint before it: {path if epoch else 'none yet'}\n$", err)
    assert train(*STATEFUL, *RESUME)[0] == 0
    assert_same_training(uninterrupted, only_run(tmp_path))


# --- Killed processes ---------------------------------------------------------------------------------------------


@posix_only
@pytest.mark.usefixtures("blank_figures")
def test_runs_killed_at_random_moments_are_bit_identical(monkeypatch, capsys):
    """The benchmark itself, shortened: 3 runs, stopped by SIGKILL, SIGTERM and SIGINT, also while saving."""
    monkeypatch.setattr(sys, "argv", ["faults", "--runs", "3", "--seed", "1"])
    status = faults.main()
    out, err = capsys.readouterr()
    assert status == 0, out + err
    assert "3 of 3 runs bit-identical" in out

"""Whatever happens to a run, resuming it gives bit for bit what an uninterrupted run gives."""

import builtins
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import assert_same_training, snapshot, the_run
from ignite.engine import Engine, Events

from benchmarks import faults
from cifar_ignite import checkpoints, figures, handlers, reporting, train
from cifar_ignite.checkpoints import load_checkpoint
from cifar_ignite.signals import StopFlag, StopRequested, stop_flag

# 4 iterations an epoch, and all that has a state of its own.
OPTIONS = {"train.epochs": 4, "train.patience": 4, "train.ema_decay": 0.8, "train.checkpoint_every": 3}


def overrides(**changes):
    return [word for key, value in (OPTIONS | changes).items() for word in ("--set", f"{key}={value}")]


@pytest.fixture
def straight(command, tiny_file, tmp_path):
    """The run folder of an uninterrupted run."""
    out = tmp_path / "straight"
    assert command("train", "--config", tiny_file, *overrides(output_dir=out))[0] == 0
    return next((out / "training_runs").iterdir())


def signal_at(monkeypatch, iteration, signum, *, evaluating=False):
    """A real signal to this process in the middle of an iteration of training, or of validation after it."""
    original = handlers.attach_stop

    def attach(trainer, evaluator, flag, every):
        def send(engine):
            if trainer.state.iteration == iteration:
                os.kill(os.getpid(), signum)

        (evaluator if evaluating else trainer).add_event_handler(
            Events.ITERATION_STARTED(once=1 if evaluating else iteration), send
        )
        original(trainer, evaluator, flag, every)

    monkeypatch.setattr(handlers, "attach_stop", attach)


class Killed(BaseException):
    """As if the process were gone."""


def die(*_):
    raise Killed


# --- Stopping and going on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("iteration", "signum", "status"),
    [(1, signal.SIGTERM, 143), (6, signal.SIGINT, 130), (8, signal.SIGUSR1, 0), (11, signal.SIGTERM, 143)],
)
def test_a_signal_stops_after_the_iteration_and_resuming_is_exact(
    command, tiny_file, tmp_path, monkeypatch, straight, iteration, signum, status
):
    """Iteration 8 is the last of its epoch: validation and all else at the epoch's end happen after resuming."""
    with monkeypatch.context() as patched:
        signal_at(patched, iteration, signum)
        got, _, err = command("train", "--config", tiny_file, *overrides())
    assert got == status
    assert err == (
        f"cifar_ignite: stopped by {signum.name} after epoch {(iteration - 1) // 4}, iteration {iteration}; "
        "the state is saved, RESUME=latest (--resume latest) continues\n"
    )
    assert (the_run(tmp_path) / "checkpoints" / f"latest_{iteration:09d}.pt").exists()
    status, out, _ = command("train", "--config", tiny_file, *overrides(), "--resume", "latest")
    assert status == 0
    assert f"iteration {iteration}, from" in out
    assert_same_training(straight, the_run(tmp_path))
    table = pd.read_csv(the_run(tmp_path) / "logs" / "metrics.csv")
    assert table["epoch"].tolist() == [1, 2, 3, 4]
    assert (table["seconds"] > 0).all()
    events = list((the_run(tmp_path) / "logs" / "tensorboard").iterdir())
    assert len(events) == 1
    assert events[0].read_bytes().count(b"train/loss") == 4


def test_a_signal_during_validation_stops_there_and_resuming_is_exact(
    command, tiny_file, tmp_path, monkeypatch, straight
):
    with monkeypatch.context() as patched:
        signal_at(patched, 4, signal.SIGTERM, evaluating=True)
        assert command("train", "--config", tiny_file, *overrides())[0] == 143
    state = load_checkpoint(the_run(tmp_path) / "checkpoints" / "latest_000000004.pt")
    assert state["record"].epoch == 0
    assert command("train", "--config", tiny_file, *overrides(), "--resume", "latest")[0] == 0
    assert_same_training(straight, the_run(tmp_path))


def test_stopped_before_the_end_of_the_last_epoch(command, tiny_file, tmp_path, monkeypatch, straight):
    """All iterations are done; resuming validates, saves and finishes, and trains no further."""
    with monkeypatch.context() as patched:
        signal_at(patched, 16, signal.SIGTERM)
        assert command("train", "--config", tiny_file, *overrides())[0] == 143
    status, out, _ = command("train", "--config", tiny_file, *overrides(), "--resume", "latest")
    assert status == 0
    assert "done after epoch 4" in out
    assert_same_training(straight, the_run(tmp_path))


def test_interrupted_again_and_again(command, tiny_file, tmp_path, monkeypatch, straight):
    for number, iteration in enumerate((3, 4, 5, 12, 14)):
        with monkeypatch.context() as patched:
            signal_at(patched, iteration, signal.SIGINT)
            resume = ["--resume", "latest"] if number else []
            assert command("train", "--config", tiny_file, *overrides(), *resume)[0] == 130
    assert command("train", "--config", tiny_file, *overrides(), "--resume", the_run(tmp_path))[0] == 0
    assert_same_training(straight, the_run(tmp_path))
    assert len(list((the_run(tmp_path) / "checkpoints").glob("latest_*"))) == 2


def test_a_run_stopped_before_its_first_checkpoint_begins_again(command, tiny_file, tmp_path, monkeypatch, straight):
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.torch, "save", die)
        with pytest.raises(Killed):
            command("train", "--config", tiny_file, *overrides())
    assert not list((the_run(tmp_path) / "checkpoints").glob("*.pt"))
    status, out, _ = command("train", "--config", tiny_file, *overrides(), "--resume", "latest")
    assert status == 0
    assert "has no checkpoint yet: it begins again" in out
    assert_same_training(straight, the_run(tmp_path))


def test_a_finished_run_is_left_alone(command, tiny_file, tmp_path):
    """Ignite itself would train it again from epoch 0 over the trained weights."""
    command("train", "--config", tiny_file)
    before = snapshot(tmp_path)
    status, out, _ = command("train", "--config", tiny_file, "--resume", "latest")
    assert status == 0
    assert "already complete after epoch 2" in out
    assert snapshot(tmp_path) == before


def test_a_run_that_stopped_early_is_finished(command, tiny_file, tmp_path):
    early = ["--set", "train.epochs=50", "--set", "train.patience=1", "--set", "optimizer.lr=1e-12"]
    assert command("train", "--config", tiny_file, *early)[0] == 0
    epochs = len(pd.read_csv(the_run(tmp_path) / "logs" / "metrics.csv"))
    assert epochs < 50
    assert (
        f"already complete after epoch {epochs}"
        in command("train", "--config", tiny_file, *early, "--resume", "latest")[1]
    )


def test_more_epochs_than_before_continue_by_the_longer_schedule(command, tiny_file, tmp_path):
    command("train", "--config", tiny_file)
    longer = ["--set", "train.epochs=5"]
    status, out, _ = command("train", "--config", tiny_file, *longer, "--resume", "latest")
    assert status == 0
    assert "train.epochs was 2, now 5: from here on the learning rate is that of a run planned for 5 epochs" in out
    got = pd.read_csv(the_run(tmp_path) / "logs" / "metrics.csv")
    command("train", "--config", tiny_file, *longer, "--set", f"output_dir={tmp_path / 'planned'}")
    (planned,) = (tmp_path / "planned" / "training_runs").iterdir()
    expected = pd.read_csv(planned / "logs" / "metrics.csv")
    assert got["epoch"].tolist() == [1, 2, 3, 4, 5]
    assert got["lr"].tolist()[2:] == pytest.approx(expected["lr"].tolist()[2:], abs=1e-12)
    assert got["lr"][1] != expected["lr"][1]


def test_a_continued_run_keeps_its_own_configuration(command, tiny_file, tmp_path, monkeypatch, straight):
    """What was typed at the start need not be typed again."""
    with monkeypatch.context() as patched:
        signal_at(patched, 6, signal.SIGINT)
        command("train", "--config", tiny_file, *overrides())
    status, out, _ = command("train", "--config", tiny_file, "--resume", "latest")
    assert status == 0
    assert "the run keeps its own train.ema_decay, train.epochs, train.patience (the configuration file says" in out
    assert_same_training(straight, the_run(tmp_path))


def test_a_continued_run_keeps_its_own_device(command, tiny_file, tmp_path, monkeypatch, straight):
    """Also where a GPU is asked for by the file, or would be taken by itself."""
    with monkeypatch.context() as patched:
        signal_at(patched, 6, signal.SIGINT)
        command("train", "--config", tiny_file, *overrides(device="cpu"))
    tiny_file.write_text(json.dumps(json.loads(tiny_file.read_text()) | {"device": "cuda"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    status, _, err = command("train", "--config", tiny_file, "--resume", "latest")
    assert status == 0, err
    assert json.loads((the_run(tmp_path) / "config.json").read_text())["device"] == "cpu"
    assert_same_training(straight, the_run(tmp_path))


def test_a_run_of_a_version_that_lacked_a_key_goes_on(command, tiny_file, tmp_path, monkeypatch, straight):
    """The default of a new key is what the older version did."""
    with monkeypatch.context() as patched:
        signal_at(patched, 6, signal.SIGINT)
        command("train", "--config", tiny_file, *overrides())
    newest = the_run(tmp_path) / "checkpoints" / "latest_000000006.pt"
    state = torch.load(newest, weights_only=True)
    del state["record"]["config"]["train"]["whiten_stem"]
    torch.save(state, newest)
    status, out, err = command("train", "--config", tiny_file, "--resume", "latest")
    assert status == 0, err
    assert "whiten_stem was" not in out
    assert_same_training(straight, the_run(tmp_path))


def test_changes_are_taken_only_when_asked_for(command, tiny_file, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        signal_at(patched, 6, signal.SIGINT)
        command("train", "--config", tiny_file, *overrides())
    changed = overrides(**{"optimizer.lr": 0.01, "data.batch_size": 50})
    resume = ["train", "--config", tiny_file, *changed, "--resume", "latest"]
    status, _, err = command(*resume)
    assert status == 2
    assert "data.batch_size was 32, now 50, optimizer.lr was 0.05, now 0.01 (--allow-changes" in err
    status, out, _ = command(*resume, "--allow-changes")
    assert status == 0
    assert "optimizer.lr was 0.05, now 0.01" in out
    table = pd.read_csv(the_run(tmp_path) / "logs" / "metrics.csv")
    assert table["epoch"].tolist() == [1, 2, 3, 4]
    assert table["lr"][1:].max() <= 0.01  # epoch 2 was repeated in batches of 50
    newest = load_checkpoint(next((the_run(tmp_path) / "checkpoints").glob("latest_*8.pt")))
    assert newest["trainer"]["epoch_length"] == 2


@pytest.mark.parametrize("change", ["optimizer.name=muon", "train.whiten_stem=true"])
def test_momenta_are_left_behind_if_they_would_be_those_of_other_parameters(command, tiny_file, tmp_path, change):
    assert command("train", "--config", tiny_file)[0] == 0
    longer = ["--allow-changes", "--set", "train.epochs=3", "--set", change]
    status, out, err = command("train", "--config", tiny_file, "--resume", "latest", *longer)
    assert status == 0, err
    assert f"momenta begin at zero, because of another {change.partition('=')[0]}" in out
    assert len(pd.read_csv(the_run(tmp_path) / "logs" / "metrics.csv")) == 3


@pytest.mark.parametrize("inside", [".", "checkpoints"])
def test_a_relative_path_means_the_same_run(command, tiny_file, tmp_path, monkeypatch, straight, inside):
    with monkeypatch.context() as patched:
        signal_at(patched, 6, signal.SIGINT)
        command("train", "--config", tiny_file, *overrides())
    folder = the_run(tmp_path)
    before = snapshot(tmp_path).keys()
    monkeypatch.chdir(folder / inside)
    status, _, err = command(
        "train", "--config", tiny_file, "--resume", "." if inside == "." else "latest_000000006.pt"
    )
    assert status == 0, err
    assert_same_training(straight, folder)
    assert all(path.is_relative_to("outputs") for path in map(Path, snapshot(tmp_path).keys() - before))
    assert (tmp_path / "outputs" / "best_models" / "tiny_best.pth").exists()


def test_latest_is_the_newest_run_even_if_it_saved_nothing_yet(command, tiny_file, tmp_path, monkeypatch):
    command("train", "--config", tiny_file)
    older = the_run(tmp_path)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.torch, "save", die)
        with pytest.raises(Killed):
            command("train", "--config", tiny_file)
    (newer,) = set((tmp_path / "outputs" / "training_runs").iterdir()) - {older}
    status, out, _ = command("train", "--config", tiny_file, "--resume", "latest")
    assert status == 0
    assert f"{newer} has no checkpoint yet: it begins again" in out


def test_without_validation_a_run_stopped_at_its_end_still_publishes(command, tiny_file, tmp_path, monkeypatch):
    options = overrides(**{"data.validation": 0})
    with monkeypatch.context() as patched:
        signal_at(patched, 16, signal.SIGTERM)
        assert command("train", "--config", tiny_file, *options)[0] == 143
    published = tmp_path / "outputs" / "best_models" / "tiny_val_acc_none_best.pth"
    assert not published.exists()
    assert command("train", "--config", tiny_file, "--resume", "latest")[0] == 0
    model = load_checkpoint(published)
    assert model["record"].epoch == 4
    last = load_checkpoint(the_run(tmp_path) / "checkpoints" / "latest_000000016.pt")
    assert faults.compare(model["model"], last["ema"], "") == []


def test_other_data_than_the_run_was_trained_on_is_refused(command, tiny_file, tmp_path, cifar_root, monkeypatch):
    """Ignite would silently train epochs of the old length."""
    signal_at(monkeypatch, 6, signal.SIGINT)
    command("train", "--config", tiny_file, *overrides())
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    folder = cifar_root / "cifar-10-batches-py"
    shutil.copy(folder / "test_batch", folder / "data_batch_1")
    before = snapshot(tmp_path)
    # 6 images more are 106 in 4 batches of 32, as before; in batches of 35 there are 4 then and 3 before.
    shutil.copy(folder / "test_batch", folder / "data_batch_2")
    shutil.copy(folder / "test_batch", folder / "data_batch_3")
    shutil.copy(folder / "test_batch", folder / "data_batch_4")
    shutil.copy(folder / "test_batch", folder / "data_batch_5")
    status, _, err = command("train", "--config", tiny_file, *overrides(), "--resume", "latest")
    assert status == 2
    assert "an epoch had 4 iterations and now has 5" in err
    assert {k: v for k, v in snapshot(tmp_path).items() if "outputs" in k} == {
        k: v for k, v in before.items() if "outputs" in k
    }


# --- Damaged files ------------------------------------------------------------------------------------------------


def test_latest_falls_back_to_the_newest_whole_state_and_says_so(command, tiny_file, tmp_path, monkeypatch, straight):
    with monkeypatch.context() as patched:
        signal_at(patched, 10, signal.SIGTERM)
        command("train", "--config", tiny_file, *overrides())
    folder = the_run(tmp_path) / "checkpoints"
    newest = folder / "latest_000000010.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    status, _, err = command("train", "--config", tiny_file, *overrides(), "--resume", newest)
    assert status == 2
    assert "latest_000000010.pt: not a checkpoint, or truncated" in err
    status, out, _ = command("train", "--config", tiny_file, *overrides(), "--resume", "latest")
    assert status == 0
    assert "latest_000000010.pt: not a checkpoint, or truncated; falling back to an older state" in out
    assert "from " + str(folder / "latest_000000008.pt") in out
    assert_same_training(straight, the_run(tmp_path))


def test_no_whole_state_at_all(command, tiny_file, tmp_path):
    command("train", "--config", tiny_file)
    for path in (the_run(tmp_path) / "checkpoints").glob("*.pt"):
        path.write_bytes(b"")
    status, _, err = command("train", "--config", tiny_file, "--resume", "latest")
    assert status == 2
    assert "none of the 3 training states is whole" in err


def test_leftovers_of_a_killed_process_are_swept(command, tiny_file, tmp_path, monkeypatch, straight):
    signal_at(monkeypatch, 5, signal.SIGTERM)
    command("train", "--config", tiny_file, *overrides())
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    leftover = the_run(tmp_path) / "checkpoints" / ".latest_000000006.pt.4242.tmp"
    leftover.write_bytes(b"half")
    with (the_run(tmp_path) / "logs" / "metrics.csv").open("a") as table:
        table.write("2,1.9")  # half a row
    assert command("train", "--config", tiny_file, *overrides(), "--resume", "latest")[0] == 0
    assert not leftover.exists()
    assert_same_training(straight, the_run(tmp_path))


def test_a_state_outside_of_any_run_folder_continues_in_a_new_one(command, tiny_file, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        signal_at(patched, 6, signal.SIGTERM)
        command("train", "--config", tiny_file, *overrides())
    shutil.copy(the_run(tmp_path) / "checkpoints" / "latest_000000006.pt", tmp_path / "copied.pt")
    first = the_run(tmp_path)
    status, out, _ = command("train", "--config", tiny_file, *overrides(), "--resume", "copied.pt")
    assert status == 0
    (second,) = set((tmp_path / "outputs" / "training_runs").iterdir()) - {first}
    assert len(list((second / "checkpoints").glob("best_*.pth"))) == 1
    assert "published  nothing" not in out


# --- Failing disks ------------------------------------------------------------------------------------------------


def failing(*_, **__):
    raise OSError(28, "No space left on device")


def test_logs_that_cannot_be_written_warn_once_and_the_training_goes_on(
    command, tiny_file, tmp_path, monkeypatch, straight
):
    with monkeypatch.context() as patched:
        patched.setattr(reporting, "write_history", failing)
        patched.setattr(figures, "draw_history", failing)
        patched.setattr(reporting.EventsWriter, "write_event", failing)
        patched.setattr(train.logging, "FileHandler", failing)
        status, out, err = command("train", "--config", tiny_file, *overrides())
    assert (status, err) == (0, "")
    for what in ("metrics.csv", "figures", "TensorBoard events", "training.log"):
        assert out.count(f"{what} (") == 1, what
    assert out.count("training goes on without it") == 4
    run_dir = the_run(tmp_path)
    assert not (run_dir / "logs" / "metrics.csv").exists()
    states = [max((run / "checkpoints").glob("latest_*.pt")) for run in (straight, run_dir)]
    one, other = (load_checkpoint(path) for path in states)
    assert faults.compare(one["model"], other["model"], "") == []


def test_a_matplotlib_that_cannot_be_imported(command, tiny_file, monkeypatch):
    """It wants to write into a home folder, say."""
    original = builtins.__import__

    def refuse(name, *arguments):
        if name == "cifar_ignite.figures":
            raise PermissionError(13, "Permission denied")
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
    status, out, _ = command("train", "--config", tiny_file, "--set", "train.checkpoint_every=1")
    assert status == 0
    assert out.count("cannot write figures") == 1


def test_the_best_model_of_the_last_epoch_is_not_lost_silently(command, tiny_file, tmp_path, monkeypatch):
    """The run ends with status 1, and continuing it saves the model."""
    judged = handlers.attach_history

    def attach(trainer, evaluator, optimizer, record, *rest):
        judged(trainer, evaluator, optimizer, record, *rest)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: record.history[-1].update(val_acc=record.epoch / 10))

    monkeypatch.setattr(handlers, "attach_history", attach)
    save = checkpoints.torch.save

    def fail(state, file, *rest):
        if "best_epoch_0002" in str(getattr(file, "name", file)):
            raise OSError(28, "No space left on device")
        save(state, file, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.torch, "save", fail)
        status, _, err = command("train", "--config", tiny_file, "--set", "train.epochs=2")
    assert status == 1
    assert "cannot write a checkpoint" in err
    assert command("train", "--config", tiny_file, "--resume", "latest")[0] == 0
    published = load_checkpoint(tmp_path / "outputs" / "best_models" / "tiny_best.pth")["record"]
    assert published.epoch == 2


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_too_little_memory_is_one_line_that_says_what_to_do(command, tiny_file, tmp_path, monkeypatch, error):
    original = handlers.attach_stop

    def attach(trainer, evaluator, flag, every):
        def fail(engine):
            raise error

        trainer.add_event_handler(Events.ITERATION_STARTED(once=6), fail)
        original(trainer, evaluator, flag, every)

    monkeypatch.setattr(handlers, "attach_stop", attach)
    status, _, err = command("train", "--config", tiny_file)
    assert status == 1
    assert err.count("\n") == 1
    assert "out of memory" in err
    assert "take a smaller data.batch_size" in err
    assert "newest state before it: " in err
    assert "latest_000000004.pt" in err


def test_figures_in_a_folder_that_became_a_file(command, tiny_file, tmp_path, monkeypatch):
    """A real failure of the file system, without patching what writes."""
    original = train.log_start

    def occupy(config, model, images, run_dir, *rest):
        (run_dir / "logs" / "figures").write_text("")
        (run_dir / "logs" / "tensorboard").write_text("")
        original(config, model, images, run_dir, *rest)

    monkeypatch.setattr(train, "log_start", occupy)
    status, out, err = command("train", "--config", tiny_file)
    assert (status, err) == (0, "")
    assert out.count("cannot write figures") == 1
    assert out.count("cannot write TensorBoard events") == 1


def test_checkpoints_that_can_no_longer_be_written_end_the_run_with_the_old_ones_whole(
    command, tiny_file, tmp_path, monkeypatch
):
    saves = []
    original = torch.save

    def full_later(*arguments):
        saves.append(0)
        if len(saves) > 3:
            failing()
        original(*arguments)

    monkeypatch.setattr(checkpoints.torch, "save", full_later)
    options = overrides(**{"train.epochs": 9, "train.save_failures_allowed": 2})
    status, out, err = command("train", "--config", tiny_file, *options)
    assert status == 1
    assert "cannot write a checkpoint into" in err
    assert "No space left on device" in err
    assert "3 in a row; newest state before it: " in err
    assert err.count("\n") == 1
    assert out.count("older ones are kept") == 2
    for path in (the_run(tmp_path) / "checkpoints").iterdir():
        assert load_checkpoint(path)


def test_a_run_folder_that_somebody_removed_ends_the_run_in_one_line(command, tiny_file, tmp_path, monkeypatch):
    original = handlers.attach_stop

    def attach(trainer, evaluator, flag, every):
        trainer.add_event_handler(Events.ITERATION_STARTED(once=6), lambda: shutil.rmtree(the_run(tmp_path)))
        original(trainer, evaluator, flag, every)

    monkeypatch.setattr(handlers, "attach_stop", attach)
    status, out, err = command("train", "--config", tiny_file, *overrides(**{"train.save_failures_allowed": 1}))
    assert status == 1
    assert "cannot write a checkpoint into" in err
    assert err.count("\n") == 1
    assert out.count("cannot write metrics.csv") == 1


def test_a_best_model_that_somebody_deleted_is_told_at_the_end(command, tiny_file, tmp_path, monkeypatch):
    original = handlers.attach_stop

    def attach(trainer, evaluator, flag, every):
        best = (the_run(tmp_path) / "checkpoints").glob("best_*.pth")
        trainer.add_event_handler(Events.COMPLETED, lambda: [path.unlink() for path in best])
        original(trainer, evaluator, flag, every)

    monkeypatch.setattr(handlers, "attach_stop", attach)
    status, out, err = command("train", "--config", tiny_file)
    assert (status, err) == (0, "")
    assert "published  nothing: " in out


def test_the_end_tells_whose_the_published_model_is(command, tiny_file, tmp_path, monkeypatch):
    """Also when the last epoch was not the best one."""
    original = handlers.attach_history
    accuracies: list[float] = []

    def attach(trainer, evaluator, optimizer, record, *rest):
        original(trainer, evaluator, optimizer, record, *rest)
        trainer.add_event_handler(
            Events.EPOCH_COMPLETED, lambda: record.history[-1].update(val_acc=accuracies[record.epoch - 1])
        )

    monkeypatch.setattr(handlers, "attach_history", attach)
    accuracies = [0.3, 0.5, 0.4, 0.2]
    assert "tiny_best.pth is this run's" in command("train", "--config", tiny_file, *overrides())[1]
    first = the_run(tmp_path).name
    accuracies = [0.3, 0.4, 0.45, 0.2]
    assert (
        f"tiny_best.pth stays: run {first} reached 50.00%" in command("train", "--config", tiny_file, *overrides())[1]
    )
    best = load_checkpoint(tmp_path / "outputs" / "best_models" / "tiny_best.pth")["record"]
    assert (best.run, best.epoch, best.val_acc) == (first, 2, 0.5)


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_resuming_is_exact_in_half_precision_with_its_gradient_scale(
    command, tiny_file, tmp_path, monkeypatch, optimizer
):
    out = tmp_path / "straight"
    half = {"precision": "fp16", "optimizer.name": optimizer}
    assert command("train", "--config", tiny_file, *overrides(output_dir=out, **half))[0] == 0
    with monkeypatch.context() as patched:
        signal_at(patched, 6, signal.SIGTERM)
        assert command("train", "--config", tiny_file, *overrides(**half))[0] == 143
    state = load_checkpoint(the_run(tmp_path) / "checkpoints" / "latest_000000006.pt")
    assert state["scaler"]["_growth_tracker"] + math.log2(65536 / state["scaler"]["scale"]) == 6
    assert command("train", "--config", tiny_file, *overrides(**half), "--resume", "latest")[0] == 0
    assert_same_training(next((out / "training_runs").iterdir()), the_run(tmp_path))


# --- Diverging ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iteration", [1, 7])
def test_a_gradient_that_is_not_finite_leaves_the_last_good_state(
    command, tiny_file, tmp_path, monkeypatch, straight, iteration
):
    original = handlers.attach_gradient_guard

    def poison(trainer, model, optimizer, *rest):
        def spoil(engine):
            if engine.state.iteration == iteration:
                next(model.parameters()).grad[0] = math.nan

        from cifar_ignite.engines import TrainingEvents

        trainer.add_event_handler(TrainingEvents.BACKWARD_COMPLETED, spoil)
        return original(trainer, model, optimizer, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(handlers, "attach_gradient_guard", poison)
        status, _, err = command("train", "--config", tiny_file, *overrides())
    assert status == 1
    epoch = (iteration - 1) // 4
    state = the_run(tmp_path) / "checkpoints" / f"latest_{4 * epoch:09d}.pt"
    newest = state if epoch else "none yet"
    assert re_match(
        err, rf"not finite at epoch {epoch + 1}, iteration {iteration}, lr [\d.e-]+; newest state before it: {newest}\n"
    )
    assert command("train", "--config", tiny_file, *overrides(), "--resume", "latest")[0] == 0
    assert_same_training(straight, the_run(tmp_path))


def re_match(text, pattern):
    import re

    return re.search(pattern, text)


# --- The flag, the harness, the terminal --------------------------------------------------------------------------


def test_the_first_signal_sets_a_flag_and_the_second_ends_the_process(monkeypatch):
    exits = []
    monkeypatch.setattr(os, "_exit", exits.append)
    before = signal.getsignal(signal.SIGTERM)
    with stop_flag() as flag:
        flag.look()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopRequested):
            flag.look()
        assert exits == []
        os.kill(os.getpid(), signal.SIGINT)
        assert exits == [130]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_stop_leaves_the_engines_between_two_iterations():
    flag, seen = StopFlag(), []
    trainer = Engine(lambda engine, batch: seen.append(batch) or (flag.on_signal(15, None) if batch == 3 else None))
    handlers.attach_stop(trainer, None, flag)
    with pytest.raises(StopRequested):
        trainer.run(range(10), max_epochs=1)
    assert seen == [0, 1, 2, 3]


def test_the_harness_notices_what_differs(command, tiny_file, tmp_path, straight):
    """The comparison that all the above rests on is not blind."""
    for number, changed in enumerate(({"seed": 1}, {"optimizer.weight_decay": 0.01}, {"train.ema_decay": 0.05})):
        out = tmp_path / f"changed{number}"
        command("train", "--config", tiny_file, *overrides(**changed, output_dir=out))
        (run_dir,) = (out / "training_runs").iterdir()
        assert faults.differences(straight, run_dir)
    assert faults.differences(straight, straight) == []


def test_random_kills_in_real_processes(tmp_path):
    """The benchmark itself, shortened: 12 runs, killed by SIGKILL, SIGTERM and SIGINT, saves included."""
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", "--runs", "12", "--seed", "1"],
        capture_output=True,
        text=True,
        check=False,
        cwd=faults.Path(faults.__file__).parent.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 of 12 runs bit-identical" in done.stdout


def test_without_a_terminal_there_are_plain_lines(monkeypatch, capsys, caplog):
    """Also with TERM=dumb, and with no stderr at all."""
    assert not reporting.has_terminal()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert reporting.has_terminal()
    monkeypatch.setenv("TERM", "dumb")
    assert not reporting.has_terminal()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", None)
        assert not reporting.has_terminal()

    monkeypatch.setattr(reporting, "PLAIN_LINE_SECONDS", 0)
    caplog.set_level("INFO", "cifar_ignite")
    trainer = Engine(lambda engine, batch: batch)
    metrics = handlers.attach_metrics(trainer, torch.nn.functional.cross_entropy, torch.device("cpu"))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    reporting.attach_progress(trainer, metrics, optimizer, 2)
    trainer.run([(torch.zeros(4, 10), torch.zeros(4, dtype=torch.long))] * 6)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith("  iteration 2/6  loss 2.303  acc 100.0%  lr 1.00e-01  0:00:00 left")


def test_a_closed_stdout_ends_no_run(tmp_path, tiny_file):
    import subprocess

    command = [sys.executable, "-m", "cifar_ignite", "train", "--config", str(tiny_file)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=faults.Path(faults.__file__).parent.parent
    )
    process.stdout.close()
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, b"")
    assert (tmp_path / "outputs" / "best_models" / "tiny_best.pth").exists()


def test_mid_epoch_resume_of_the_full_width_net(command, tmp_path, monkeypatch):
    """The real SE net at full width, a dozen iterations of its default recipe, stopped within an epoch."""
    config = faults.Path(faults.__file__).parent.parent / "configs" / "se.json"
    options = {
        "data.source": "synthetic",
        "data.synthetic.train_size": 60,
        "data.validation": 12,
        "data.batch_size": 8,
        "train.epochs": 2,
        "train.ema_decay": 0.9,
    }
    arguments = ["train", "--config", config, *(w for k, v in options.items() for w in ("--set", f"{k}={v}"))]
    assert command(*arguments, "--set", f"output_dir={tmp_path / 'straight'}")[0] == 0
    with monkeypatch.context() as patched:
        signal_at(patched, 9, signal.SIGTERM)
        assert command(*arguments)[0] == 143
    assert command(*arguments, "--resume", "latest")[0] == 0
    (straight,) = (tmp_path / "straight" / "training_runs").iterdir()
    assert_same_training(straight, the_run(tmp_path))
    assert json.loads((straight / "config.json").read_text())["model"]["width"] == 32

"""Resuming: an interrupted and resumed run is bit-identical to an uninterrupted one."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch
from ignite.engine import Events

from cifar_ignite.checkpointing import io, resume
from cifar_ignite.checkpointing.io import load_checkpoint
from cifar_ignite.checkpointing.resume import ResumeState
from cifar_ignite.checkpointing.run_record import RunRecord
from cifar_ignite.errors import InputError
from tests.helpers import REPOSITORY, assert_same_training, only_run, posix_only, snapshot
from tests.helpers.runs import STATEFUL, call_at_iteration, latest_checkpoint, send_signal, set_options

RESUME = ("--resume", "latest")
pytestmark = pytest.mark.usefixtures("blank_figures")


class Killed(BaseException):
    """Ends a run as if its process was killed."""


@pytest.fixture
def kill_at_first_save(train, monkeypatch):
    """A function that trains until the first checkpoint is to be written."""

    def die(*_):
        raise Killed

    def run(*words):
        with monkeypatch.context() as patched:
            patched.setattr(io.torch, "save", die)
            with pytest.raises(Killed):
                train(*words)

    return run


# --- Interrupted at any moment ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("iteration", "signum", "exit_status"),
    [
        (1, signal.SIGTERM, 143),
        (6, signal.SIGINT, 130),
        # The last iteration of an epoch: its end follows after the resume.
        pytest.param(8, getattr(signal, "SIGUSR1", None), 0, marks=posix_only),
    ],
)
def test_signal_stops_after_iteration_and_resume_is_bit_identical(
    train, interrupt, uninterrupted, tmp_path, iteration, signum, exit_status
):
    status, _, err = interrupt(iteration, signum=signum)
    assert status == exit_status
    where = f"after epoch {(iteration - 1) // 4}, iteration {iteration}; "
    assert err.startswith(f"cifar_ignite: stopped by {signum.name} {where}")
    assert "--resume latest" in err
    assert err.count("\n") == 1
    run_dir = only_run(tmp_path)
    assert (run_dir / "checkpoints" / f"latest_{iteration:09d}.pt").exists()
    status, out, _ = train(*STATEFUL, *RESUME)
    assert status == 0
    assert f"iteration {iteration}, from" in out
    assert_same_training(uninterrupted, run_dir)
    table = pd.read_csv(run_dir / "logs" / "metrics.csv")
    assert table["epoch"].tolist() == [1, 2, 3, 4]
    assert (table["seconds"] > 0).all()
    (events,) = (run_dir / "logs" / "tensorboard").iterdir()
    assert events.read_bytes().count(b"train/loss") == 4


def test_signal_during_validation_stops_and_resume_is_bit_identical(train, interrupt, uninterrupted, tmp_path):
    assert interrupt(4, in_validation=True)[0] == 143
    checkpoint = load_checkpoint(only_run(tmp_path) / "checkpoints" / "latest_000000004.pt")
    assert checkpoint["record"].epoch == 0
    assert train(*STATEFUL, *RESUME)[0] == 0
    assert_same_training(uninterrupted, only_run(tmp_path))


def test_resume_after_last_iteration_completes_last_epoch_only(train, interrupt, uninterrupted, tmp_path):
    assert interrupt(16)[0] == 143
    status, out, _ = train(*STATEFUL, *RESUME)
    assert status == 0
    assert "done after epoch 4" in out
    assert_same_training(uninterrupted, only_run(tmp_path))


def test_repeatedly_interrupted_run_is_bit_identical_and_keeps_two_latest(train, interrupt, uninterrupted, tmp_path):
    for number, iteration in enumerate((3, 4, 5, 12, 14)):
        assert interrupt(iteration, *(RESUME if number else ()), signum=signal.SIGINT)[0] == 130
    assert train(*STATEFUL, "--resume", only_run(tmp_path))[0] == 0
    assert_same_training(uninterrupted, only_run(tmp_path))
    names = sorted(path.name for path in (only_run(tmp_path) / "checkpoints").glob("latest_*"))
    assert names == ["latest_000000014.pt", "latest_000000016.pt"]


def test_rotation_keeps_new_checkpoint_if_older_one_has_later_mtime(train, interrupted, uninterrupted):
    """The clock of a machine may have been set back; all checkpoints after it are older by their mtime."""
    older = latest_checkpoint(interrupted)
    os.utime(older, (2**32, 2**32))
    assert train(*STATEFUL, *RESUME)[0] == 0
    names = sorted(path.name for path in older.parent.glob("latest_*"))
    assert names == ["latest_000000006.pt", "latest_000000016.pt"]
    older.unlink()
    assert_same_training(uninterrupted, interrupted)


def test_run_without_checkpoint_starts_from_the_beginning(train, kill_at_first_save, uninterrupted, tmp_path):
    kill_at_first_save(*STATEFUL)
    assert not list((only_run(tmp_path) / "checkpoints").glob("*.pt"))
    status, out, _ = train(*STATEFUL, *RESUME)
    assert status == 0
    assert "has no checkpoint yet" in out
    assert_same_training(uninterrupted, only_run(tmp_path))


def test_latest_is_latest_run_even_without_checkpoint(train, kill_at_first_save, complete):
    kill_at_first_save()
    (newer,) = set(complete.parent.iterdir()) - {complete}
    status, out, _ = train(*RESUME)
    assert status == 0
    assert f"{newer} has no checkpoint yet" in out


def test_run_without_validation_stopped_at_its_end_still_promotes(train, interrupt, tmp_path):
    assert interrupt(16, *set_options({"data.val_size": 0}))[0] == 143
    best = tmp_path / "outputs" / "best_models" / "tiny_val_acc_none_best.pth"
    assert not best.exists()
    assert train(*RESUME)[0] == 0
    promoted, last = load_checkpoint(best), load_checkpoint(latest_checkpoint(only_run(tmp_path)))
    assert promoted["record"].epoch == 4
    assert all(torch.equal(promoted["model"][name], weight) for name, weight in last["ema"].items())


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_fp16_run_resumes_bit_identically_with_its_gradient_scale(train, interrupt, tmp_path, optimizer):
    half = set_options({"precision": "fp16", "optimizer.name": optimizer, "train.epochs": 2})
    assert train(*STATEFUL, *half, *set_options({"output_dir": tmp_path / "uninterrupted"}))[0] == 0
    assert interrupt(6, *half)[0] == 143
    scaler = load_checkpoint(latest_checkpoint(only_run(tmp_path)))["scaler"]
    assert scaler["_growth_tracker"] + math.log2(65536 / scaler["scale"]) == 6
    assert train(*STATEFUL, *half, *RESUME)[0] == 0
    assert_same_training(next((tmp_path / "uninterrupted" / "training_runs").iterdir()), only_run(tmp_path))


def test_full_width_model_resumes_bit_identically_mid_epoch(command, tmp_path, monkeypatch):
    """se.json at its width and with its augmentation, for an epoch of four iterations."""
    options = {
        "data.dataset": "synthetic",
        "data.synthetic.train_size": 44,
        "data.val_size": 12,
        "data.batch_size": 8,
        "train.epochs": 1,
        "train.ema_decay": 0.9,
    }
    words = ["train", "--config", REPOSITORY / "configs" / "se.json", *set_options(options)]
    assert command(*words, *set_options({"output_dir": tmp_path / "uninterrupted"}))[0] == 0
    assert command(*words, attach=call_at_iteration(2, send_signal))[0] == 143
    assert command(*words, *RESUME)[0] == 0
    (uninterrupted,) = (tmp_path / "uninterrupted" / "training_runs").iterdir()
    assert_same_training(uninterrupted, only_run(tmp_path))
    stem_weight = next(iter(load_checkpoint(latest_checkpoint(uninterrupted))["model"].values()))
    assert stem_weight.shape == (32, 3, 3, 3)


# --- Complete runs ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("complete")
def test_resume_of_complete_run_changes_nothing(train, tmp_path):
    """Ignite itself would train it again from epoch 0 over the trained weights."""
    before = snapshot(tmp_path)
    status, out, _ = train(*RESUME)
    assert status == 0
    assert "already complete after epoch 2" in out
    assert snapshot(tmp_path) == before


def test_resume_of_early_stopped_run_changes_nothing(train, tmp_path):
    words = set_options({"train.epochs": 50, "train.patience": 1, "optimizer.lr": 1e-12})
    assert train(*words)[0] == 0
    epochs = len(pd.read_csv(only_run(tmp_path) / "logs" / "metrics.csv"))
    assert epochs < 50
    before = snapshot(tmp_path)
    assert f"already complete after epoch {epochs}" in train(*words, *RESUME)[1]
    assert snapshot(tmp_path) == before


def test_resume_of_early_stopped_run_with_more_epochs_has_its_patience_again(train, tmp_path):
    words = set_options({"train.epochs": 50, "train.patience": 2, "optimizer.lr": 1e-12})
    assert train(*words)[0] == 0
    epochs = pd.read_csv(only_run(tmp_path) / "logs" / "metrics.csv")["epoch"].iloc[-1]
    assert train(*RESUME, *set_options({"train.epochs": 60}))[0] == 0
    assert pd.read_csv(only_run(tmp_path) / "logs" / "metrics.csv")["epoch"].iloc[-1] == epochs + 2


def test_resume_with_more_epochs_follows_longer_schedule(train, complete, uninterrupted):
    longer = set_options({"train.epochs": 4})
    status, out, _ = train(*longer, *RESUME)
    assert status == 0
    assert "train.epochs was 2, now 4" in out
    assert "schedule of 4 epochs" in out
    resumed = pd.read_csv(complete / "logs" / "metrics.csv")
    planned = pd.read_csv(uninterrupted / "logs" / "metrics.csv")  # 4 epochs with the same schedule
    assert resumed["epoch"].tolist() == [1, 2, 3, 4]
    assert resumed["lr"].tolist()[2:] == pytest.approx(planned["lr"].tolist()[2:], abs=1e-12)
    assert resumed["lr"][1] != planned["lr"][1]


@posix_only
def test_resume_of_live_run_is_refused_and_disturbs_nothing(train, interrupt, tmp_path, uninterrupted):
    """As with a job that was started again while the first one still runs."""
    results = []

    def resume_twice(state):
        def resume(engine):
            results.append(train(*RESUME))

        state.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=8), resume)

    assert interrupt(6)[0] == 143
    assert train(*RESUME, attach=resume_twice)[0] == 0
    (status, _, err) = results[0]
    assert status == 2
    assert str(only_run(tmp_path)) in err
    assert_same_training(uninterrupted, only_run(tmp_path))


# --- Configuration of a resumed run -------------------------------------------------------------------------------


def test_resumed_run_keeps_its_own_configuration(train, interrupted, uninterrupted):
    """Overrides given at the start need not be repeated."""
    status, out, _ = train(*RESUME)
    assert status == 0
    (kept,) = [line for line in out.splitlines() if "kept from the run" in line]
    assert kept.endswith("train.ema_decay, train.epochs, train.patience")
    assert_same_training(uninterrupted, interrupted)


def test_resumed_run_keeps_its_own_device(train, interrupt, tiny_file, tmp_path, monkeypatch, uninterrupted):
    """Also if the configuration file requests a GPU, and if one is available."""
    interrupt(6, *set_options({"device": "cpu"}))
    tiny_file.write_text(json.dumps(json.loads(tiny_file.read_text()) | {"device": "cuda"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    status, _, err = train(*RESUME)
    assert status == 0, err
    assert json.loads((only_run(tmp_path) / "config.json").read_text())["device"] == "cpu"
    assert_same_training(uninterrupted, only_run(tmp_path))


def test_run_saved_without_a_key_resumes_with_its_default(train, interrupted, uninterrupted):
    """A run of a version that lacked the key; the default of a new key is what that version did."""
    path = latest_checkpoint(interrupted)
    saved = torch.load(path, weights_only=True)
    del saved["record"]["config"]["train"]["sync_batch_norm"]
    torch.save(saved, path)
    status, out, err = train(*RESUME)
    assert status == 0, err
    assert "sync_batch_norm was" not in out
    assert_same_training(uninterrupted, interrupted)


def test_changed_configuration_is_refused_without_allow_changes(train, interrupted):
    words = [*STATEFUL, *set_options({"optimizer.lr": 0.01, "data.batch_size": 50}), *RESUME]
    status, _, err = train(*words)
    assert status == 2
    assert "data.batch_size was 32, now 50, optimizer.lr was 0.05, now 0.01" in err
    assert "--allow-changes" in err
    status, out, _ = train(*words, "--allow-changes")
    assert status == 0
    assert "optimizer.lr was 0.05, now 0.01" in out
    table = pd.read_csv(interrupted / "logs" / "metrics.csv")
    assert table["epoch"].tolist() == [1, 2, 3, 4]
    assert table["lr"][1:].max() <= 0.01  # epoch 2 was repeated in batches of 50
    checkpoint = load_checkpoint(interrupted / "checkpoints" / "latest_000000008.pt")
    assert checkpoint["trainer"]["epoch_length"] == 2


def test_momentum_buffers_are_reset_if_optimizer_changes(train, complete):
    """The saved buffers would belong to other parameters."""
    changes = set_options({"train.epochs": 3, "optimizer.name": "muon"})
    status, out, err = train(*RESUME, "--allow-changes", *changes)
    assert status == 0, err
    assert "momentum buffers were reset (optimizer.name changed)" in out
    assert len(pd.read_csv(complete / "logs" / "metrics.csv")) == 3


@pytest.mark.parametrize("inside", [".", "checkpoints"])
def test_resume_by_relative_path_continues_same_run(train, interrupted, uninterrupted, tmp_path, monkeypatch, inside):
    before = snapshot(tmp_path).keys()
    monkeypatch.chdir(interrupted / inside)
    status, _, err = train("--resume", "." if inside == "." else "latest_000000006.pt")
    assert status == 0, err
    assert_same_training(uninterrupted, interrupted)
    assert all(Path(path).is_relative_to("outputs") for path in snapshot(tmp_path).keys() - before)
    assert (tmp_path / "outputs" / "best_models" / "tiny_best.pth").exists()


def test_checkpoint_outside_any_run_directory_continues_in_new_one(train, interrupted, tmp_path):
    shutil.copy(latest_checkpoint(interrupted), tmp_path / "copied.pt")
    status, out, _ = train(*STATEFUL, "--resume", "copied.pt")
    assert status == 0
    (second,) = set(interrupted.parent.iterdir()) - {interrupted}
    assert len(list((second / "checkpoints").glob("best_*.pth"))) == 1
    assert "tiny_best.pth updated by this run" in out


# --- Checkpoints that do not fit ----------------------------------------------------------------------------------


def test_resume_with_another_dataset_is_refused(train, interrupt, tmp_path, cifar_root):
    """130 instead of 100 training images; Ignite would silently train epochs of the saved length."""
    interrupt(6)
    directory = cifar_root / "cifar-10-batches-py"
    for number in range(1, 6):
        shutil.copy(directory / "test_batch", directory / f"data_batch_{number}")
    before = snapshot(tmp_path / "outputs")
    status, _, err = train(*STATEFUL, *RESUME)
    assert status == 2
    assert "an epoch had 4 iterations and now has 5" in err
    assert snapshot(tmp_path / "outputs") == before


@pytest.mark.usefixtures("complete")
def test_resume_with_another_model_is_refused(train, tmp_path):
    """Also with --allow-changes; nothing changes, config.json included."""
    before = snapshot(tmp_path)
    changes = set_options({"train.epochs": 9, "model.width": 3})
    status, _, err = train(*RESUME, "--allow-changes", *changes)
    assert (status, err.count("\n")) == (2, 1)
    assert snapshot(tmp_path) == before
    assert "head.3.weight has shape (10, 16), the model's is (10, 24)" in err


def test_ranks_that_find_different_checkpoints_are_refused(tiny_config, monkeypatch):
    """Machines that do not share an output directory."""
    monkeypatch.setattr(resume, "broadcast_from_rank0", lambda create: "other.pt")
    state = ResumeState(None, Path("latest.pt"), {}, tiny_config(), {}, [])
    with pytest.raises(InputError, match="output_dir"):
        state.check_compatible(torch.nn.Identity(), 1)


def test_checkpoint_without_fingerprints_resumes_with_any_images(tiny_config):
    """Runs recorded none at first."""
    record = RunRecord("run", {}, ["a", "b"])
    state = ResumeState(None, Path("latest.pt"), {"record": record}, tiny_config(), {}, [])
    state.check_same_data(["a", "b"], "training", "validation")
    record.train_fingerprint = "others"
    with pytest.raises(InputError, match="training images"):
        state.check_same_data(["a", "b"], "training", "validation")


def test_latest_falls_back_to_older_checkpoint_with_warning(train, interrupt, uninterrupted, tmp_path):
    interrupt(10)
    truncated = latest_checkpoint(only_run(tmp_path))
    truncated.write_bytes(truncated.read_bytes()[:-1000])
    status, _, err = train(*STATEFUL, "--resume", truncated)
    assert status == 2
    assert "latest_000000010.pt: not a checkpoint, or truncated" in err
    status, out, _ = train(*STATEFUL, *RESUME)
    assert status == 0
    assert "latest_000000010.pt: not a checkpoint, or truncated; falling back" in out
    assert f"from {truncated.with_name('latest_000000008.pt')}" in out
    assert_same_training(uninterrupted, only_run(tmp_path))


def test_resume_without_valid_checkpoint_is_refused(train, complete):
    for path in (complete / "checkpoints").glob("*.pt"):
        path.write_bytes(b"")
    status, _, err = train(*RESUME)
    assert status == 2
    assert "none of the 3 full checkpoints is valid" in err


def test_resume_removes_files_of_killed_process(train, interrupted, uninterrupted):
    temp_path = interrupted / "checkpoints" / ".latest_000000007.pt.4242.tmp"
    temp_path.write_bytes(b"half")
    with (interrupted / "logs" / "metrics.csv").open("a") as table:
        table.write("2,1.9")  # half of a row
    assert train(*STATEFUL, *RESUME)[0] == 0
    assert not temp_path.exists()
    assert_same_training(uninterrupted, interrupted)

"""Savers with states that count: what is kept, and what a failed write does."""

import time

import ignite.distributed as idist
import pytest
from ignite.engine import Engine, Events
from ignite.handlers import ModelCheckpoint

from cifar_ignite.checkpointing.savers import (
    AtomicDiskSaver,
    CheckpointSaver,
    FaultTolerantSaver,
    create_model_checkpoint,
)
from cifar_ignite.config import TrainConfig
from cifar_ignite.errors import NonFiniteError, TrainingError
from tests.checkpointing.helpers import fail_saves, names_in

EPOCH_ENDS_ONLY = TrainConfig(checkpoint_every=1000, save_every_seconds=1e9)
EVERY_ITERATION = TrainConfig(checkpoint_every=1000, save_every_seconds=0)


class Counter:
    """An object whose state is the number of times that it was saved."""

    def __init__(self):
        self.saves = 0

    def state_dict(self):
        self.saves += 1
        return {"saves": self.saves}


def idle_engine():
    return Engine(lambda engine, batch: None)


def attach_saver(directory, options=EPOCH_ENDS_ONLY, max_failures=0, check=lambda: None):
    """Return an idle engine with a saver of full checkpoints, the saver, and an object that it saves."""
    trainer, counter = idle_engine(), Counter()
    checkpoints = CheckpointSaver(
        FaultTolerantSaver(directory, max_failures), {"counter": counter, "other": Counter()}, check
    )
    checkpoints.attach(trainer, options, check_every=20)
    return trainer, checkpoints, counter


# --- Single files -------------------------------------------------------------------------------------------------


def test_disk_saver_deletes_previous_file_only_after_next_one_is_written(tmp_path, monkeypatch):
    """Ignite's Checkpoint calls in this order: remove the previous file, save the next one."""
    saver = AtomicDiskSaver(tmp_path)
    content = {"model": {}, "record": {}}
    saver(content, "one.pt")
    saver.remove("one.pt")
    assert names_in(tmp_path) == ["one.pt"]
    with monkeypatch.context() as patched:
        fail_saves(patched, lambda: True)
        with pytest.raises(OSError, match="No space"):
            saver(content, "two.pt")
    assert names_in(tmp_path) == ["one.pt"]
    saver(content, "three.pt")  # after a failed save, the previous file is deleted only if that is requested again
    assert names_in(tmp_path) == ["one.pt", "three.pt"]
    saver.remove("one.pt")
    saver(content, "four.pt")
    assert names_in(tmp_path) == ["four.pt", "three.pt"]


def test_disk_saver_tolerates_missing_previous_file(tmp_path):
    saver = AtomicDiskSaver(tmp_path)
    saver({"model": {}}, "one.pt")
    (tmp_path / "one.pt").unlink()
    saver.remove("one.pt")
    saver({"model": {}}, "two.pt")
    assert names_in(tmp_path) == ["two.pt"]


def test_model_checkpoint_is_ignites_with_atomic_writes(tmp_path):
    checkpoint = create_model_checkpoint(tmp_path, filename_pattern="{global_step}.pt", n_saved=1)
    assert isinstance(checkpoint, ModelCheckpoint)
    assert isinstance(checkpoint.save_handler, AtomicDiskSaver)


# --- Full checkpoints ---------------------------------------------------------------------------------------------


def test_checkpoint_saver_keeps_latest_two_and_one_every_few_epochs(tmp_path):
    trainer, _, _ = attach_saver(tmp_path, TrainConfig(checkpoint_every=2, save_every_seconds=1e9))
    trainer.run([0, 0], max_epochs=5)
    assert names_in(tmp_path) == ["epoch_0002.pt", "epoch_0004.pt", "latest_000000008.pt", "latest_000000010.pt"]


def test_checkpoint_saver_within_epoch_saves_each_time_it_is_due(tmp_path):
    checked = []
    trainer, _, counter = attach_saver(tmp_path, EVERY_ITERATION, check=lambda: checked.append(1))
    trainer.run([0] * 5, max_epochs=2)
    assert counter.saves == 12  # every iteration and the end of every epoch
    assert len(checked) == 12
    assert names_in(tmp_path) == ["latest_000000009.pt", "latest_000000010.pt"]


def test_checkpoint_saver_within_epoch_waits_between_saves(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    options = TrainConfig(checkpoint_every=1000, save_every_seconds=100)
    trainer, _, counter = attach_saver(tmp_path, options)
    saves = []

    @trainer.on(Events.ITERATION_STARTED)
    def advance(engine):
        saves.append(counter.saves)
        now[0] += 30

    trainer.run([0] * 10, max_epochs=1)
    assert saves == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]


def test_checkpoint_saver_counts_files_of_interrupted_run_among_latest_two(tmp_path):
    trainer, _, _ = attach_saver(tmp_path)
    trainer.run([0], max_epochs=2)
    trainer, checkpoints, _ = attach_saver(tmp_path)
    trainer.state.iteration = 3
    checkpoints.save(trainer)
    assert names_in(tmp_path) == ["latest_000000002.pt", "latest_000000003.pt"]


def test_checkpoint_saver_tolerates_deleted_files(tmp_path):
    trainer, _, _ = attach_saver(tmp_path)
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda: [path.unlink() for path in tmp_path.iterdir()])
    trainer.run([0], max_epochs=5)
    assert names_in(tmp_path) == ["latest_000000005.pt"]


def test_checkpoint_saver_does_not_save_state_that_fails_check(tmp_path):
    def check():
        raise NonFiniteError("not finite")

    trainer, checkpoints, _ = attach_saver(tmp_path, max_failures=9, check=check)
    with pytest.raises(NonFiniteError):
        checkpoints.save(trainer)
    assert names_in(tmp_path) == []


def test_checkpoint_saver_of_other_ranks_checks_but_writes_nothing(tmp_path, monkeypatch):
    """The check contains collectives, which all ranks must call."""
    monkeypatch.setattr(idist, "get_rank", lambda: 1)
    checked = []
    trainer, _, _ = attach_saver(tmp_path, check=lambda: checked.append(1))
    trainer.run([0], max_epochs=2)
    assert len(checked) == 2
    assert names_in(tmp_path) == []


# --- Failures -----------------------------------------------------------------------------------------------------


def test_failed_save_keeps_previous_files_and_is_logged(tmp_path, monkeypatch, caplog):
    trainer, _, _ = attach_saver(tmp_path, max_failures=1)
    fail_saves(monkeypatch, lambda: trainer.state.epoch == 3)
    trainer.run([0], max_epochs=3)
    assert names_in(tmp_path) == ["latest_000000001.pt", "latest_000000002.pt"]
    trainer.run([0], max_epochs=4)
    assert names_in(tmp_path) == ["latest_000000002.pt", "latest_000000004.pt"]
    (message,) = (record.getMessage() for record in caplog.records)
    for expected in ("cannot write a checkpoint", str(tmp_path), "No space left", "GB free"):
        assert expected in message


def test_consecutive_failed_saves_above_limit_end_run(tmp_path, monkeypatch):
    attempts = []
    fail_saves(monkeypatch, lambda: attempts.append(0) or len(attempts) not in (1, 4))
    trainer, _, _ = attach_saver(tmp_path, max_failures=2)
    # The first and the fourth save succeed, so the third failure after the fourth one ends the run.
    with pytest.raises(TrainingError, match=r"cannot write a checkpoint to .*No space left.*consecutive failures: 3"):
        trainer.run([0, 0], max_epochs=20)
    assert trainer.state.epoch == 7
    assert names_in(tmp_path) == ["latest_000000002.pt", "latest_000000008.pt"]


def test_runtime_error_of_zip_writer_counts_as_failed_save(tmp_path, monkeypatch):
    def fail(content, file):
        raise RuntimeError("[enforce fail at inline_container.cc:\n664] unexpected pos 64 vs 0")

    monkeypatch.setattr("torch.save", fail)
    trainer, _, _ = attach_saver(tmp_path)
    with pytest.raises(TrainingError) as raised:
        trainer.run([0], max_epochs=1)
    assert "\n" not in str(raised.value)


def test_disallow_failures_ends_run_with_first_failed_save(tmp_path, monkeypatch):
    fail_saves(monkeypatch, lambda: True)
    trainer, checkpoints, _ = attach_saver(tmp_path, max_failures=9)
    checkpoints.saver.disallow_failures()
    with pytest.raises(TrainingError):
        trainer.run([0], max_epochs=1)
    assert names_in(tmp_path) == []

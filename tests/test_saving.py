"""Saving with fake states: what is kept, what a failure does."""

import math

import pytest
from conftest import row, scored
from ignite.engine import Engine, Events
from torch import nn

from cifar_ignite import checkpoints
from cifar_ignite.checkpoints import RunRecord
from cifar_ignite.config import RunFailedError
from cifar_ignite.handlers import NonFiniteError
from cifar_ignite.saving import PatientSaver, attach_best_model, attach_checkpoints


def test_the_best_model_is_the_first_of_the_highest_and_published_once(tmp_path):
    published = []

    def attach(trainer, record):
        saver = PatientSaver(tmp_path, 0)
        best = attach_best_model(
            trainer, nn.Linear(1, 1), record, saver, lambda: published.append(best.last_checkpoint), selected=True
        )

    scored([0.2, 0.5, 0.5, 0.1, 0.6, 0.6], attach)
    assert published == ["best_epoch_0001.pth", "best_epoch_0002.pth", "best_epoch_0005.pth"]
    assert [path.name for path in tmp_path.iterdir()] == ["best_epoch_0005.pth"]


class Counter:
    """An object with a state; counts how often it was saved."""

    def __init__(self):
        self.saves = 0

    def state_dict(self):
        self.saves += 1
        return {"saves": self.saves}


def broken_disk(monkeypatch, fails):
    """torch.save fails whenever `fails` says so."""
    original = checkpoints.torch.save

    def save(*arguments):
        if fails():
            raise OSError(28, "No space left on device")
        original(*arguments)

    monkeypatch.setattr(checkpoints.torch, "save", save)


def test_a_failed_best_model_neither_loses_the_old_one_nor_stops_later_ones(tmp_path, monkeypatch, caplog):
    """Ignite's Checkpoint removes the old file first, notes the new one as saved, and refuses what is less good."""
    disk = {"full": False}
    broken_disk(monkeypatch, lambda: disk["full"])
    record, trainer = RunRecord("run", {}, []), Engine(lambda *_: None)
    saver = PatientSaver(tmp_path, 3)
    attach_best_model(trainer, nn.Linear(1, 1), record, saver, lambda: None, selected=True)
    seen = []
    for epoch, (accuracy, full) in enumerate([(0.3, False), (0.9, True), (0.5, False)], start=1):
        disk["full"] = full
        record.history.append(row(epoch, accuracy))
        trainer.state.epoch = epoch
        trainer.fire_event(Events.EPOCH_COMPLETED)
        seen.append([path.name for path in tmp_path.iterdir()])
    assert seen == [["best_epoch_0001.pth"], ["best_epoch_0001.pth"], ["best_epoch_0003.pth"]]
    assert "cannot write a checkpoint" in caplog.text
    assert "No space left" in caplog.text
    assert "GB free" in caplog.text


def test_so_many_failed_saves_in_a_row_end_the_run(tmp_path, monkeypatch):
    attempts = []
    broken_disk(monkeypatch, lambda: attempts.append(0) or len(attempts) not in (1, 4))
    trainer = Engine(lambda *_: None)
    saver = PatientSaver(tmp_path, 2)
    state = {"counter": Counter(), "other": Counter()}
    attach_checkpoints(trainer, state, saver, 1000, math.inf, lambda: None)
    # The first and the fourth save succeed, so the run ends with the third failure after the fourth.
    with pytest.raises(RunFailedError, match=r"cannot write a checkpoint into .*No space left.*, 3 in a row"):
        trainer.run([0, 0], max_epochs=20)
    assert trainer.state.epoch == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest_000000002.pt", "latest_000000008.pt"]


def test_a_model_that_is_not_better_is_no_successful_save(tmp_path, monkeypatch):
    disk = {"full": False}
    broken_disk(monkeypatch, lambda: disk["full"])
    record, trainer = RunRecord("run", {}, []), Engine(lambda *_: None)
    saver = PatientSaver(tmp_path, 9)
    attach_best_model(trainer, nn.Linear(1, 1), record, saver, lambda: None, selected=True)
    failures = []
    for epoch, (accuracy, full) in enumerate([(0.3, False), (0.9, True), (0.2, True), (0.9, True), (0.9, False)], 1):
        disk["full"] = full
        record.history.append(row(epoch, accuracy))
        trainer.state.epoch = epoch
        trainer.fire_event(Events.EPOCH_COMPLETED)
        failures.append(saver.failures)
    assert failures == [0, 1, 1, 2, 0]


def test_a_checkpoint_that_somebody_deleted_is_not_missed(tmp_path):
    trainer = Engine(lambda *_: None)
    state = {"counter": Counter(), "other": Counter()}
    attach_checkpoints(trainer, state, PatientSaver(tmp_path, 0), 1000, math.inf, lambda: None)
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda: [path.unlink() for path in tmp_path.iterdir()])
    trainer.run([0], max_epochs=5)
    assert [path.name for path in tmp_path.iterdir()] == ["latest_000000005.pt"]


def test_states_are_saved_within_an_epoch_when_they_are_due(tmp_path):
    trainer = Engine(lambda *_: None)
    counter, checked = Counter(), []
    saver = PatientSaver(tmp_path, 0)
    attach_checkpoints(trainer, {"a": counter, "b": Counter()}, saver, 1000, 0, lambda: checked.append(1))
    trainer.run([0] * 5, max_epochs=2)
    assert counter.saves == 12  # each iteration and each end of an epoch
    assert len(checked) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest_000000009.pt", "latest_000000010.pt"]


def test_an_unfit_state_is_not_saved(tmp_path):
    def check():
        raise NonFiniteError("bad")

    trainer = Engine(lambda *_: None)
    save = attach_checkpoints(trainer, {"a": Counter(), "b": Counter()}, PatientSaver(tmp_path, 9), 1, math.inf, check)
    with pytest.raises(NonFiniteError):
        save()
    assert not list(tmp_path.iterdir())

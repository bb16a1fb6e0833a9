"""The record of a run inside a checkpoint."""

import pytest
from pydantic import ValidationError

from cifar_ignite.checkpointing.run_record import RunRecord
from tests.helpers import epoch_metrics


def test_record_best_is_first_epoch_with_highest_accuracy():
    history = [epoch_metrics(1, 0.3), epoch_metrics(2, 0.5), epoch_metrics(3, 0.5)]
    assert RunRecord("run", {}, [], history).best["epoch"] == 2


def test_record_without_validation_has_no_best():
    assert RunRecord("run", {}, [], [epoch_metrics(1, None)]).best is None


def test_empty_record_has_no_epoch():
    record = RunRecord("run", {}, [])
    assert record.epoch == 0
    assert record.val_acc is None
    assert record.best is None


def test_record_loads_history_and_keeps_its_own_configuration():
    saved = RunRecord("old", {"seed": 1}, ["a"], [epoch_metrics(1, 0.5)])
    record = RunRecord("new", {"seed": 2}, ["b"])
    record.load_state_dict(saved.state_dict())
    assert record == RunRecord("new", {"seed": 2}, ["b"], saved.history)
    record.history.append(epoch_metrics(2, 0.6))
    assert saved.epoch == 1


@pytest.mark.parametrize("changes", [{"other": 1}, {"history": [{"epoch": 1}]}, {"format": 1}, {"run": 3}])
def test_record_refuses_invalid_content(changes):
    with pytest.raises((TypeError, ValidationError)):
        RunRecord(**(RunRecord("run", {}, []).state_dict() | changes))

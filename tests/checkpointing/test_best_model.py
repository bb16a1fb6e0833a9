"""The best model of a run and of an experiment."""

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from cifar_ignite.checkpointing.best_model import BestModelSaver, best_model_path, promote_best_model
from cifar_ignite.checkpointing.io import load_checkpoint
from cifar_ignite.checkpointing.run_record import RunRecord
from cifar_ignite.checkpointing.savers import FaultTolerantSaver
from cifar_ignite.errors import InputError, TrainingError
from tests.checkpointing.helpers import create_record, fail_saves, names_in, write_checkpoint
from tests.helpers import epoch_metrics, run_with_scores


def create_saver(directory, record, max_failures=0, is_selected=True):
    """Return a saver that promotes to best/x_best.pth next to the directory."""
    directory.mkdir(exist_ok=True)
    target = directory.parent / "best" / "x_best.pth"
    saver = FaultTolerantSaver(directory, max_failures)
    return BestModelSaver({"model": nn.Linear(1, 1)}, record, saver, target, is_selected=is_selected)


# --- In the run directory -----------------------------------------------------------------------------------------


@pytest.fixture
def promoted(monkeypatch):
    """Names of the files that were promoted, which are not copied."""
    names = []
    monkeypatch.setattr(BestModelSaver, "promote", lambda self: names.append(self.path.name))
    return names


def run_epochs(saver, epochs):
    """Attach a saver and complete one epoch per validation accuracy; yield after each one."""
    trainer = Engine(lambda engine, batch: None)
    saver.attach(trainer)
    for epoch, val_acc in enumerate(epochs, start=1):
        saver.record.history.append(epoch_metrics(epoch, val_acc))
        trainer.state.epoch = epoch
        trainer.fire_event(Events.EPOCH_COMPLETED)
        yield


def test_best_model_is_first_with_highest_accuracy_and_promoted_once(tmp_path, promoted):
    run_with_scores(
        [0.2, 0.5, 0.5, 0.1, 0.6, 0.6],
        lambda trainer, record: create_saver(tmp_path / "run", record).attach(trainer),
    )
    assert promoted == ["best_epoch_0001.pth", "best_epoch_0002.pth", "best_epoch_0005.pth"]
    assert names_in(tmp_path / "run") == ["best_epoch_0005.pth"]


def test_best_model_file_records_its_own_accuracy(tmp_path):
    record = create_record()
    record.history.clear()
    saver = create_saver(tmp_path / "run", record)
    for _ in run_epochs(saver, [0.2, 0.5, 0.3]):
        pass
    for path in (saver.path, saver.target):
        checkpoint = load_checkpoint(path)
        assert (checkpoint["record"].epoch, checkpoint["record"].val_acc) == (2, 0.5)
        assert torch.equal(checkpoint["model"]["weight"], saver.to_save["model"].weight)


def test_without_validation_only_last_model_is_saved(tmp_path, promoted):
    run_with_scores(
        [None] * 3,
        lambda trainer, record: create_saver(tmp_path / "run", record, is_selected=False).attach(trainer),
    )
    assert promoted == ["last_val_acc_none.pth"]
    assert names_in(tmp_path / "run") == ["last_val_acc_none.pth"]


@pytest.mark.usefixtures("promoted")
def test_failed_best_model_keeps_previous_one_and_allows_later_ones(tmp_path, monkeypatch, caplog):
    """Ignite's Checkpoint removes the previous file first, lists the next one as saved, and refuses lower scores."""
    is_full = iter([False, True, False])
    fail_saves(monkeypatch, lambda: next(is_full))
    saver = create_saver(tmp_path / "run", RunRecord("run", {}, []), max_failures=3)
    seen = [names_in(tmp_path / "run") for _ in run_epochs(saver, [0.3, 0.9, 0.5])]
    assert seen == [["best_epoch_0001.pth"], ["best_epoch_0001.pth"], ["best_epoch_0003.pth"]]
    assert "cannot write a checkpoint" in caplog.text
    assert "No space left" in caplog.text
    assert "GB free" in caplog.text


@pytest.mark.usefixtures("promoted")
def test_model_that_is_not_better_is_not_a_successful_save(tmp_path, monkeypatch):
    """The number of consecutive failures stays: nothing was written."""
    record = RunRecord("run", {}, [])
    fail_saves(monkeypatch, lambda: record.epoch in (2, 3, 4))
    saver = create_saver(tmp_path / "run", record, max_failures=9)
    failures = [saver.saver.failures for _ in run_epochs(saver, [0.3, 0.9, 0.2, 0.9, 0.9])]
    assert failures == [0, 1, 1, 2, 0]


def test_failed_best_model_of_last_epoch_ends_run(tmp_path, monkeypatch):
    """No later write could make up for it."""
    fail_saves(monkeypatch, lambda: True)
    with pytest.raises(TrainingError, match="cannot write a checkpoint"):
        run_with_scores([0.5], lambda trainer, record: create_saver(tmp_path, record, max_failures=9).attach(trainer))


def test_failed_promotion_is_a_warning_and_does_not_change_which_model_is_the_best(tmp_path, caplog):
    saver = create_saver(tmp_path / "run", RunRecord("run", {}, []), max_failures=0)
    (tmp_path / "best").write_text("a file where a directory is needed")
    for _ in run_epochs(saver, [0.3, 0.6, 0.5]):
        pass
    assert names_in(tmp_path / "run") == [saver.path.name] == ["best_epoch_0002.pth"]
    assert saver.saver.failures == 0
    assert caplog.text.count(str(tmp_path / "best" / "x_best.pth")) == 2  # epochs 1 and 2
    with pytest.raises(TrainingError, match=r"x_best\.pth .*best_epoch_0002\.pth"):
        saver.promote()
    (tmp_path / "best").unlink()
    assert "updated by this run" in saver.promote()


@pytest.mark.usefixtures("promoted")
def test_restored_saver_compares_with_saved_best_score(tmp_path):
    saver = create_saver(tmp_path / "run", RunRecord("run", {}, []))
    for _ in run_epochs(saver, [0.5]):
        pass
    resumed = create_saver(tmp_path / "run", RunRecord("run", {}, []))
    resumed.load_state_dict(saver.state_dict())
    assert resumed.path == saver.path
    for _ in run_epochs(resumed, [0.4, 0.45]):
        pass
    assert names_in(tmp_path / "run") == ["best_epoch_0001.pth"]


@pytest.mark.usefixtures("promoted")
def test_restored_saver_starts_over_if_file_is_missing(tmp_path):
    """The full checkpoint was copied to another directory without the best model."""
    saver = create_saver(tmp_path / "run", RunRecord("run", {}, []))
    for _ in run_epochs(saver, [0.5]):
        pass
    resumed = create_saver(tmp_path / "new", RunRecord("run", {}, []))
    resumed.load_state_dict(saver.state_dict())
    for _ in run_epochs(resumed, [0.4]):
        pass
    assert names_in(tmp_path / "new") == ["best_epoch_0001.pth"]


def test_promote_of_deleted_file_reports_it(tmp_path):
    assert create_saver(tmp_path / "run", create_record()).promote().startswith("not updated: ")


def test_other_ranks_write_and_promote_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(idist, "get_rank", lambda: 1)
    saver = create_saver(tmp_path / "run", create_record())
    for _ in run_epochs(saver, [0.5]):
        pass
    assert saver.promote() == ""
    assert names_in(tmp_path) == ["run"]
    assert names_in(tmp_path / "run") == []


# --- In best_models/ ----------------------------------------------------------------------------------------------


def promote(tmp_path, val_acc, run="2026", val_images="these"):
    """Promote the model of a run; return the line about it."""
    source = write_checkpoint(tmp_path / "source.pth", val_acc, run, val_images)
    return promote_best_model(source, tmp_path / "best" / "x_best.pth")


def promoted_accuracy(tmp_path):
    return load_checkpoint(tmp_path / "best" / "x_best.pth")["record"].val_acc


def test_only_better_model_replaces_best_model(tmp_path):
    assert "updated by this run" in promote(tmp_path, 0.5)
    assert "unchanged: run 2026 reached 50.00%" in promote(tmp_path, 0.5, run="2027")
    assert "unchanged" in promote(tmp_path, 0.4)
    assert promoted_accuracy(tmp_path) == 0.5
    assert "updated by this run" in promote(tmp_path, 0.6)
    assert promoted_accuracy(tmp_path) == 0.6


def test_run_killed_while_promoting_promotes_same_model_again(tmp_path):
    promote(tmp_path, 0.5)
    assert "updated by this run" in promote(tmp_path, 0.5)


def test_models_validated_on_other_images_are_not_compared(tmp_path):
    promote(tmp_path, 0.5)
    assert "unchanged: validated on other images" in promote(tmp_path, 0.9, "2027", val_images="others")
    assert promoted_accuracy(tmp_path) == 0.5


@pytest.mark.parametrize("val_images", ["others", None])
def test_run_replaces_its_own_model_although_images_differ(tmp_path, val_images):
    promote(tmp_path, 0.5, val_images=val_images)
    assert "updated by this run" in promote(tmp_path, 0.6)


@pytest.mark.parametrize("recorded", [(None, "these"), ("these", None), (None, None)])
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, "updated by this run"),
        ({"dataset": "cifar100"}, "unchanged: validated on other images"),
        ({"val_size": 7}, "unchanged: validated on other images"),
        ({"split_seed": 7}, "unchanged: validated on other images"),
        ({"synthetic": {"seed": 7}}, "updated by this run"),
        ({"dataset": "synthetic", "synthetic": {"seed": 7}}, "unchanged: validated on other images"),
    ],
    ids=str,
)
def test_models_without_fingerprint_are_compared_if_their_data_are_configured_alike(tmp_path, recorded, data, expected):
    base = {"dataset": "synthetic"} if data.get("dataset") == "synthetic" else {}
    write_checkpoint(tmp_path / "old.pth", 0.5, "2026", recorded[0], base)
    write_checkpoint(tmp_path / "new.pth", 0.9, "2027", recorded[1], data)
    promote_best_model(tmp_path / "old.pth", tmp_path / "x_best.pth")
    assert expected in promote_best_model(tmp_path / "new.pth", tmp_path / "x_best.pth")


def test_unreadable_best_model_is_replaced_with_warning(tmp_path, caplog):
    promote(tmp_path, 0.5)
    (tmp_path / "best" / "x_best.pth").write_bytes(b"rubbish")
    assert "updated by this run" in promote(tmp_path, 0.1)
    assert "replacing it" in caplog.text
    assert promoted_accuracy(tmp_path) == 0.1


def test_promote_of_damaged_source_is_refused(tmp_path):
    promote(tmp_path, 0.5)
    (tmp_path / "source.pth").write_bytes(b"rubbish")
    with pytest.raises(InputError, match="not a checkpoint"):
        promote_best_model(tmp_path / "source.pth", tmp_path / "best" / "x_best.pth")
    assert promoted_accuracy(tmp_path) == 0.5


def test_models_without_validation_have_their_own_file(tmp_path):
    assert best_model_path(tmp_path, "se", selected=True).name == "se_best.pth"
    assert best_model_path(tmp_path, "se", selected=False).name == "se_val_acc_none_best.pth"


def test_latest_model_without_validation_replaces_best_model(tmp_path):
    promote(tmp_path, None)
    assert "updated by this run" in promote(tmp_path, None, run="2027")

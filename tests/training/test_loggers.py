"""Progress, log lines, metrics.csv, TensorBoard events and figures of a run."""

import logging
import sys

import ignite.distributed as idist
import pandas as pd
import pytest
import torch
from ignite.engine import Engine, Events
from tensorboardX.event_file_writer import EventsWriter
from tqdm import tqdm

from cifar_ignite import plots
from cifar_ignite.checkpointing.run_record import RunRecord
from cifar_ignite.config import Config
from cifar_ignite.training import loggers
from cifar_ignite.training.loggers import TensorBoardLogger, attach_loggers, attach_progress
from cifar_ignite.training.metrics import attach_metrics
from tests.helpers import epoch_metrics, run_with_scores
from tests.training.helpers import CPU, create_sgd, idle_engine


@pytest.fixture(autouse=True)
def _log_level(caplog):
    caplog.set_level("INFO", "cifar_ignite")


def no_space(*_, **__):
    raise OSError(28, "No space left on device")


# --- Within an epoch ----------------------------------------------------------------------------------------------


def test_has_terminal_is_false_without_usable_stderr(monkeypatch):
    assert not loggers.has_terminal()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert loggers.has_terminal()
    monkeypatch.setenv("TERM", "dumb")
    assert not loggers.has_terminal()
    monkeypatch.setattr(sys, "stderr", None)
    assert not loggers.has_terminal()


def run_with_progress():
    """Train for one epoch of six iterations and update the progress every two."""
    trainer = Engine(lambda engine, batch: batch)
    metrics = attach_metrics(trainer, torch.nn.functional.cross_entropy, CPU)
    attach_progress(trainer, metrics, create_sgd(), 2)
    trainer.run([(torch.zeros(4, 10), torch.zeros(4, dtype=torch.long))] * 6)


def test_progress_without_terminal_logs_plain_lines(monkeypatch, caplog):
    monkeypatch.setattr(loggers, "PROGRESS_LINE_SECONDS", 0)
    run_with_progress()
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("  iteration 2/6  loss 2.303  acc 100.0%  lr 1.00e-01  0:00:00 left")
    assert second.startswith("  iteration 4/6  ")


def test_progress_without_terminal_logs_nothing_in_short_epoch(caplog):
    run_with_progress()
    assert caplog.records == []


def test_progress_on_terminal_shows_bar(monkeypatch, capsys):
    monkeypatch.setattr(loggers, "has_terminal", lambda: True)
    run_with_progress()
    err = capsys.readouterr().err
    assert "/6]" in err
    assert "lr=1.00e-01" in err


@pytest.mark.filterwarnings("error")
def test_progress_in_notebook_shows_bar_without_warning(monkeypatch, caplog, capsys):
    """Although stderr is no terminal there; tqdm chooses the class of the bar when its module is imported."""
    monkeypatch.setattr("tqdm.autonotebook.tqdm", type("Widget", (tqdm,), {}))
    monkeypatch.setattr(loggers, "PROGRESS_LINE_SECONDS", 0)
    run_with_progress()
    assert "lr=1.00e-01" in capsys.readouterr().err
    assert caplog.records == []


def test_progress_of_other_ranks_is_silent(monkeypatch, caplog, capsys):
    monkeypatch.setattr(idist, "get_rank", lambda: 1)
    monkeypatch.setattr(loggers, "has_terminal", lambda: True)
    monkeypatch.setattr(loggers, "PROGRESS_LINE_SECONDS", 0)
    run_with_progress()
    assert caplog.records == []
    assert capsys.readouterr().err == ""


def test_format_seconds_shows_hours_minutes_seconds():
    assert loggers.format_seconds(3725.4) == "1:02:05"
    assert loggers.format_seconds(0.2) == "0:00:00"


# --- After each epoch ---------------------------------------------------------------------------------------------


def test_loggers_write_history_events_and_figures(tmp_path, caplog):
    run_with_scores([0.1, 0.3, 0.2], lambda trainer, record: attach_loggers(trainer, record, tmp_path, 2))
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table["epoch"].tolist() == [1, 2, 3]
    assert table["val_acc"].tolist() == [0.1, 0.3, 0.2]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"train/loss") == 3
    assert list((tmp_path / "figures").glob("*.png"))
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert ["(best)" in line for line in lines] == [True, True, False]


def test_loggers_plot_every_few_epochs_and_at_the_end(tmp_path, monkeypatch):
    plotted = []
    monkeypatch.setattr(plots, "plot_training_curves", lambda history, directory: plotted.append(len(history)))
    run_with_scores([0.1] * 5, lambda trainer, record: attach_loggers(trainer, record, tmp_path, 2))
    assert plotted == [2, 4, 5]


def test_curves_include_the_last_epoch_before_its_checkpoint(tmp_path, monkeypatch):
    """A run that is killed after the last checkpoint is complete: nothing would draw them later."""
    plotted = []
    monkeypatch.setattr(plots, "plot_training_curves", lambda history, directory: plotted.append(len(history)))

    def fail():
        raise RuntimeError("killed")

    def attach(trainer, record):
        attach_loggers(trainer, record, tmp_path, 2)
        trainer.add_event_handler(Events.EPOCH_COMPLETED(once=3), fail)

    with pytest.raises(RuntimeError, match="killed"):
        run_with_scores([0.1] * 3, attach)
    assert plotted == [2, 3]


def test_loggers_stopped_early_plot_the_last_epoch(tmp_path, monkeypatch):
    plotted = []
    monkeypatch.setattr(plots, "plot_training_curves", lambda history, directory: plotted.append(len(history)))

    def attach(trainer, record):
        attach_loggers(trainer, record, tmp_path, 2)
        trainer.add_event_handler(Events.EPOCH_COMPLETED(once=3), lambda: trainer.terminate())

    run_with_scores([0.1] * 5, attach)
    assert plotted == [2, 3]


def test_loggers_on_full_disk_warn_once_and_training_continues(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loggers, "write_history", no_space)
    monkeypatch.setattr(plots, "plot_training_curves", no_space)
    monkeypatch.setattr(EventsWriter, "write_event", no_space)
    epochs, _ = run_with_scores([0.1] * 4, lambda trainer, record: attach_loggers(trainer, record, tmp_path, 1))
    assert epochs == 4
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 3
    for what in ("metrics.csv", "figures", "TensorBoard events"):
        assert sum(f"cannot write {what} (" in warning for warning in warnings) == 1, what


def test_loggers_of_other_ranks_write_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(idist, "get_rank", lambda: 1)
    run_with_scores([0.1], lambda trainer, record: attach_loggers(trainer, record, tmp_path, 1))
    assert list(tmp_path.iterdir()) == []
    assert caplog.records == []


def test_loggers_of_resumed_run_write_each_epoch_once(tmp_path, monkeypatch):
    """Epochs that the interrupted run logged after its last checkpoint are replaced."""
    monkeypatch.setattr(plots, "plot_training_curves", lambda history, directory: None)

    def run(history, epochs):
        record, trainer = RunRecord("run", {}, [], history), idle_engine()

        @trainer.on(Events.EPOCH_COMPLETED)
        def append(engine):
            record.history.append(epoch_metrics(record.epoch + 1, 0.5))

        attach_loggers(trainer, record, tmp_path, 100)
        trainer.run([0], max_epochs=epochs)
        return record.history

    history = run([], 3)
    run(history[:2], 2)
    assert pd.read_csv(tmp_path / "metrics.csv")["epoch"].tolist() == [1, 2, 3, 4]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"val/acc") == 4


def test_epoch_line_without_validation_shows_training_metrics(tmp_path, caplog):
    run_with_scores([None], lambda trainer, record: attach_loggers(trainer, record, tmp_path, 100))
    (line,) = (record.getMessage() for record in caplog.records)
    assert line == "epoch 1/1  train loss 1.000 acc 50.00%  lr 1.00e-01  2.0 s  50 images/s  0:00:00 left"


def test_tensorboard_logger_skips_missing_values(tmp_path):
    TensorBoardLogger(tmp_path / "tensorboard").write([epoch_metrics(1, None)])
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"train/acc" in content
    assert b"images_per_second" in content
    assert b"val/" not in content


def test_tensorboard_logger_replaces_events_of_interrupted_run(tmp_path):
    directory = tmp_path / "tensorboard"
    directory.mkdir()
    (directory / "events.out.tfevents.0.old").write_text("events after the checkpoint that the run is resumed from")
    logger = TensorBoardLogger(directory)
    logger.write([epoch_metrics(1, 0.5)])
    logger.write([epoch_metrics(1, 0.5), epoch_metrics(2, 0.5)])
    (events,) = directory.iterdir()
    assert events.read_bytes().count(b"val/acc") == 2


# --- The log of a run ---------------------------------------------------------------------------------------------


def test_log_file_receives_messages_of_package_with_time(tmp_path):
    path = tmp_path / "training.log"
    with loggers.log_file(path):
        logging.getLogger("cifar_ignite.train").info("inside")
        logging.getLogger("ignite").warning("of another package")
    logging.getLogger("cifar_ignite.train").info("outside")
    (line,) = path.read_text().splitlines()
    assert line.endswith(" inside")
    assert line[:2] == "20"


@pytest.mark.parametrize(("level", "num_lines"), [(logging.NOTSET, 1), (logging.WARNING, 0)])
def test_log_file_receives_info_unless_the_caller_has_set_a_level(tmp_path, level, num_lines):
    package = logging.getLogger("cifar_ignite")
    package.setLevel(level)  # the fixture restores it
    with loggers.log_file(tmp_path / "training.log"):
        logging.getLogger("cifar_ignite.train").info("inside")
    assert package.level == level
    assert len((tmp_path / "training.log").read_text().splitlines()) == num_lines


def test_log_file_that_cannot_be_opened_warns_and_continues(tmp_path, caplog):
    with loggers.log_file(tmp_path / "missing" / "training.log"):
        logging.getLogger("cifar_ignite.train").info("inside")
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_log_file_of_other_ranks_is_not_created(tmp_path, monkeypatch):
    monkeypatch.setattr(idist, "get_rank", lambda: 1)
    with loggers.log_file(tmp_path / "training.log"):
        logging.getLogger("cifar_ignite.train").info("inside")
    assert list(tmp_path.iterdir()) == []


def test_log_config_logs_one_line_per_section(caplog):
    loggers.log_config(Config(seed=7))
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split()[0] for line in lines] == ["run", "data", "augment", "model", "optimizer", "schedule", "train"]
    assert "seed=7" in lines[0]
    assert "synthetic.train_size=50000" in lines[1]


@pytest.mark.parametrize(("name", "num_warnings"), [("best_epoch_0002.pth", 0), ("best_epoch_0001.pth", 1)])
def test_log_summary_warns_if_best_model_is_missing(tmp_path, caplog, name, num_warnings):
    record = RunRecord("run", {}, [], [epoch_metrics(1, 0.3), epoch_metrics(2, 0.5)])
    loggers.log_summary(record, tmp_path / name, tmp_path, 3725)
    assert "done after epoch 2, in 1:02:05" in caplog.text
    assert "best validation accuracy 50.00% (epoch 2)" in caplog.text
    assert sum(record.levelname == "WARNING" for record in caplog.records) == num_warnings

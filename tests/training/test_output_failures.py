"""Output that people only look at cannot end a training, whatever its libraries raise."""

import logging
import sys

import pytest

from cifar_ignite import plots
from cifar_ignite.training import loggers
from cifar_ignite.training.loggers import WarnOnce, attach_loggers
from tests.helpers import posix_only, run_with_scores

ERRORS = [ValueError("not a backend\nsupported values are"), MemoryError(), ImportError("broken"), OSError(28, "full")]


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_warn_once_logs_first_exception_in_one_line(caplog, error):
    def fail():
        raise error

    warn_once = WarnOnce()
    for what in ("figures", "figures", "events"):
        warn_once(what, fail)
    assert [message.split(" (")[0] for message in warnings_in(caplog)] == [
        "cannot write figures",
        "cannot write events",
    ]
    assert "\n" not in caplog.messages[0]


def test_warn_once_does_not_suppress_interrupts():
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        WarnOnce()("figures", interrupt)


def test_training_continues_if_figures_and_history_fail(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise ValueError("Key backend: 'garbage' is not a valid value")

    monkeypatch.setattr(plots, "plot_training_curves", fail)
    monkeypatch.setattr(loggers, "write_history", fail)
    epochs, _ = run_with_scores([0.1] * 3, lambda trainer, record: attach_loggers(trainer, record, tmp_path, 1))
    assert epochs == 3
    assert len(warnings_in(caplog)) == 2


@pytest.mark.parametrize("module", ["tensorboardX.event_file_writer", "cifar_ignite.plots"])
def test_training_continues_if_import_fails(tmp_path, monkeypatch, caplog, module):
    monkeypatch.setitem(sys.modules, module, None)
    epochs, _ = run_with_scores([0.1] * 3, lambda trainer, record: attach_loggers(trainer, record, tmp_path, 1))
    assert epochs == 3
    assert len(warnings_in(caplog)) == 1


@posix_only
def test_log_file_replaces_what_is_not_utf8(tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("cifar_ignite"), "propagate", False)  # reports of tests are UTF-8
    with loggers.log_file(tmp_path / "training.log"):
        logging.getLogger("cifar_ignite").warning("in \udcff/x")
    assert (tmp_path / "training.log").read_text().endswith("in ?/x\n")

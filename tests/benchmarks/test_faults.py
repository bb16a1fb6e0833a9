"""The fault benchmark: its configuration, and the exit of processes (killed runs are in the tests of resuming)."""

import argparse
import os
import signal
from pathlib import Path

from benchmarks import faults
from benchmarks.forked_jobs import CRASHED, start_process, wait
from cifar_ignite.config_io import load_config


def create_options(**changes):
    options = {"config": None, "overrides": [], "processes": 1, "threads": 1}
    return argparse.Namespace(**options | changes)


def test_create_training_without_config_is_a_valid_tiny_training(tmp_path):
    training = faults.create_training(create_options(overrides=["seed=3"]), tmp_path)
    assert training.arguments[:2] == ("train", "--config")
    overrides = [word for word in training.arguments[3:] if word != "--set"]
    config = load_config(Path(training.arguments[2]), overrides)
    assert (config.experiment, config.seed, config.model.width) == ("faults", 3, 2)


def test_create_training_with_config_uses_only_the_given_overrides(tmp_path):
    options = create_options(config=Path("configs/se.json"), overrides=["seed=3"])
    training = faults.create_training(options, tmp_path)
    assert training.arguments == ("train", "--config", "configs/se.json", "--set", "seed=3")


def test_faults_with_a_failing_reference_prints_its_log(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["faults", "--set", "data.batch=1"])
    assert faults.main() == 1
    assert "did you mean batch_size?" in capsys.readouterr().err


def test_wait_returns_none_status_or_signal(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.forked_jobs.run_command", lambda arguments: signal.pause() or 0)
    pid = start_process([], tmp_path / "log")
    assert wait(pid, 0.1) is None
    os.kill(pid, signal.SIGKILL)
    assert wait(pid, 10) == -signal.SIGKILL


def test_start_process_logs_an_exception_and_exits(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.forked_jobs.run_command", lambda arguments: 1 / 0)
    assert wait(start_process([], tmp_path / "log"), 10) == CRASHED
    assert "ZeroDivisionError" in (tmp_path / "log").read_text()

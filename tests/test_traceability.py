"""Runs, evaluations and comparisons record the environment and the command they come from."""

import json
import sys

import pandas as pd
import pytest
import torch

from cifar_ignite.checkpointing.io import load_checkpoint
from cifar_ignite.compare import diff_settings, load_environments
from cifar_ignite.training import environment
from tests.evaluation.helpers import only_evaluation
from tests.helpers import assert_same_training, only_run
from tests.helpers.runs import latest_checkpoint

pytestmark = pytest.mark.usefixtures("blank_figures")


@pytest.fixture
def machine(monkeypatch):
    """A function that moves this process to a machine with another CPU, where another command is typed."""

    def move(cpu, command):
        monkeypatch.setattr(environment, "cpu_model", lambda: cpu)
        monkeypatch.setattr(sys, "argv", ["cifar-ignite", *command.split()])
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)

    return move


def without_environments(path):
    """Rewrite a checkpoint as it was before environments were recorded."""
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["record"]["environments"]
    torch.save(checkpoint, path)


def test_run_directory_and_all_checkpoints_record_the_environment(command, tiny_file, tmp_path, machine):
    machine("CPU one", "train --config tiny.json")
    status, out, _ = command("train", "--config", tiny_file)
    assert status == 0
    run_dir = only_run(tmp_path)
    (recorded,) = json.loads((run_dir / "environment.json").read_text())
    assert (recorded["from_iteration"], recorded["cpu"]) == (0, "CPU one")
    assert recorded["command"] == "cifar-ignite train --config tiny.json"
    assert recorded["torch"] == torch.__version__
    paths = [*(run_dir / "checkpoints").iterdir(), tmp_path / "outputs" / "best_models" / "tiny_best.pth"]
    for path in paths:
        assert load_checkpoint(path)["record"].environments == [recorded]
    assert f"environment python {recorded['python']}, torch {torch.__version__}" in out


def test_run_resumed_elsewhere_records_both_environments_and_the_same_weights(
    command, tiny_file, train_once, tmp_path, machine
):
    (uninterrupted,) = (train_once() / "training_runs").iterdir()
    machine("CPU one", "train")
    command("train", "--config", tiny_file, "--set", "train.epochs=2")
    run_dir = only_run(tmp_path)
    latest_checkpoint(run_dir).unlink()
    (run_dir / "checkpoints" / "epoch_0002.pt").unlink()  # what remains was saved after the first epoch
    machine("CPU two", "train --resume latest")
    assert command("train", "--config", tiny_file, "--resume", "latest")[0] == 0
    recorded = json.loads((run_dir / "environment.json").read_text())
    assert [(entry["from_iteration"], entry["cpu"]) for entry in recorded] == [(0, "CPU one"), (4, "CPU two")]
    assert load_checkpoint(latest_checkpoint(run_dir))["record"].environments == recorded
    assert_same_training(uninterrupted, run_dir)

    command("evaluate")
    page = (only_evaluation(tmp_path) / "report.html").read_text()
    for expected in ("training from iteration 4", "CPU one", "CPU two", "cifar-ignite train --resume latest"):
        assert expected in page


def test_run_resumed_in_the_same_environment_records_it_once(command, tiny_file, trained_run):
    assert command("train", "--config", tiny_file, "--resume", "latest", "--set", "train.epochs=3")[0] == 0
    assert len(json.loads((trained_run / "environment.json").read_text())) == 1


def test_checkpoints_without_environments_are_resumed_and_evaluated(command, tiny_file, trained_run, tmp_path):
    run_dir, best = trained_run, tmp_path / "outputs" / "best_models" / "tiny_best.pth"
    for path in (*sorted((run_dir / "checkpoints").iterdir()), best):  # the latest checkpoint stays the latest file
        without_environments(path)
    assert command("evaluate")[0] == 0
    assert "does not record the environment of the training" in (only_evaluation(tmp_path) / "report.html").read_text()
    assert command("train", "--config", tiny_file, "--resume", "latest", "--set", "train.epochs=3")[0] == 0
    (recorded,) = json.loads((run_dir / "environment.json").read_text())
    assert recorded["from_iteration"] == 8


def test_evaluation_records_its_own_environment(command, trained_run, tmp_path, machine):
    machine("CPU two", "evaluate --set precision=fp32")
    command("evaluate", "--set", "precision=fp32")
    evaluation_dir = only_evaluation(tmp_path)
    recorded = json.loads((evaluation_dir / "metrics.json").read_text())["environment"]
    assert (recorded["cpu"], recorded["precision"]) == ("CPU two", "float32")
    page = (evaluation_dir / "report.html").read_text()
    assert "cifar-ignite evaluate --set precision=fp32" in page
    assert '<th scope="row">model.name</th><td>"hybrid_resnet"</td><td>"se_resnet"</td>' in page


def test_compare_shows_keys_and_environment_that_differ(command, tiny_file, tmp_path, machine):
    machine("CPU one", "train")
    command("train", "--config", tiny_file)
    machine("CPU two", "train --set seed=3")
    command("train", "--config", tiny_file, "--set", "seed=3")
    status, out, _ = command("compare")
    assert status == 0
    table = pd.read_csv(tmp_path / "outputs" / "comparison_differences.csv", index_col="key", dtype=str)
    runs = sorted(path.name for path in (tmp_path / "outputs" / "training_runs").iterdir())
    assert table.columns.tolist() == runs
    assert set(table.index) == {"seed", "environment.command", "environment.cpu", "environment.device_name"}
    assert table.loc["seed"].tolist() == ["0", "3"]
    assert table.loc["environment.cpu"].tolist() == ["CPU one", "CPU two"]
    shown = out.split("differences between the runs")[1]
    assert "CPU two" in shown
    assert "environment.command" not in shown


def test_compare_of_equal_runs_reports_no_difference(command, tiny_file, tmp_path):
    for _ in range(2):
        command("train", "--config", tiny_file)
    assert "differences between the runs\nnone" in command("compare")[1]
    assert pd.read_csv(tmp_path / "outputs" / "comparison_differences.csv").empty


def test_diff_settings_shows_missing_values():
    table = diff_settings({"a": {"seed": "0", "environment.cpu": "x"}, "b": {"seed": "0"}})
    assert table.index.tolist() == ["environment.cpu"]
    assert table.loc["environment.cpu"].tolist() == ["x", "–"]


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_load_environments_of_a_damaged_file_warns(tmp_path, caplog, text):
    assert load_environments(tmp_path) == []
    assert caplog.text == ""
    (tmp_path / "environment.json").write_text(text)
    assert load_environments(tmp_path) == []
    assert "environment.json: not the environments of a run" in caplog.text

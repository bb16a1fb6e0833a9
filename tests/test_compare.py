"""The table of all runs."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cifar_ignite import figures
from cifar_ignite.compare import load_latest_evaluations


def test_compare_lists_all_runs_with_their_latest_evaluation(
    command, tiny_file, trained_run, tmp_path, blank_figures, monkeypatch
):
    first = trained_run
    command("evaluate")
    command("evaluate", "--tta", "flip")
    log = command("train", "--config", tiny_file, "--set", "experiment=all", "--set", "data.val_size=0")[1]
    (second,) = set((tmp_path / "outputs" / "training_runs").iterdir()) - {first}
    monkeypatch.setattr(figures.Figure, "savefig", blank_figures)  # that of the comparison is drawn
    status, out, err = command("compare")
    assert (status, err) == (0, "")
    table = pd.read_csv(tmp_path / "outputs" / "comparison.csv").set_index("run")
    assert table.index.tolist() == [first.name, second.name]
    history = pd.read_csv(first / "logs" / "metrics.csv")
    run = table.loc[first.name]
    assert run[["experiment", "model", "epochs", "planned"]].tolist() == ["tiny", "hybrid_resnet", 2, 2]
    assert run["best_val_acc"] == history["val_acc"].max()
    assert run["images_per_second"] == history["images_per_second"].median()
    evaluations = (tmp_path / "outputs" / "evaluations").glob("tiny_*/metrics.json")
    metrics = json.loads(max(evaluations, key=lambda path: path.stat().st_mtime_ns).read_text())
    assert run["test_acc"] == metrics["accuracy"]
    assert run["test_acc_tta"] == metrics["tta"]["accuracy"]
    assert run["calibration_error"] == metrics["expected_calibration_error"]
    assert "calibration error" in out
    assert f"{run['best_val_acc']:.2%}" in out
    assert f"{run['parameters']:,}" in log
    assert table.loc[second.name][["best_val_acc", "test_acc"]].isna().all()
    assert table.loc[second.name, "experiment"] == "all"
    pixels = np.asarray(Image.open(tmp_path / "outputs" / "comparison.png").convert("L"))
    assert (pixels < 250).mean() > 0.03


@pytest.mark.usefixtures("blank_figures")
def test_compare_skips_runs_without_valid_metrics(command, trained_run, tmp_path):
    run_dir, runs = trained_run, trained_run.parent
    for name, text in (("0_started", None), ("1_damaged", "no,metrics\n1,2\n")):
        shutil.copytree(run_dir, runs / name)
        (runs / name / "logs" / "metrics.csv").unlink()
        if text:
            (runs / name / "logs" / "metrics.csv").write_text(text)
    status, out, err = command("compare")
    assert (status, err) == (0, "")
    assert "skipped: 0_started: no completed epoch" in out
    assert f"skipped: {(runs / '1_damaged').relative_to(tmp_path)}/logs/metrics.csv: not the metrics of a run" in out
    assert pd.read_csv(tmp_path / "outputs" / "comparison.csv")["run"].tolist() == [run_dir.name]


@pytest.mark.usefixtures("blank_figures")
def test_compare_names_run_of_model_that_is_not_registered(command, trained_run):
    other = shutil.copytree(trained_run, trained_run.parent / "mine")
    config = json.loads((other / "config.json").read_text()) | {"model": {"name": "my_net"}}
    (other / "config.json").write_text(json.dumps(config))
    status, out, err = command("compare")
    assert (status, err) == (0, "")
    assert "skipped: mine: model.name: unknown model 'my_net'" in out


def test_load_latest_evaluations_skips_unlabeled_and_foreign_files(tmp_path, caplog):
    for name, text in (
        ("labeled", '{"run": "a", "accuracy": 0.5}'), ("unlabeled", '{"run": "a"}'), ("foreign", '{"accuracy": 1}'),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(text)
    assert load_latest_evaluations(tmp_path) == {"a": {"run": "a", "accuracy": 0.5}}
    assert "foreign/metrics.json: not the metrics of an evaluation" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        {"accuracy": "0.5"},
        {"accuracy": None},
        {"expected_calibration_error": "NaN"},
        {"expected_calibration_error": None},
        {"expected_calibration_error": [0.1]},
        {"tta": None},
        {"tta": {"accuracy": "0.5"}},
        {"run": ["a"]},
    ],
    ids=str,
)
def test_load_latest_evaluations_skips_metrics_that_are_no_numbers(tmp_path, caplog, damage):
    metrics = {"run": "a", "accuracy": 0.5, "expected_calibration_error": 0.1, "tta": {"accuracy": 0.6}}
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "metrics.json").write_text(json.dumps(metrics | damage))
    assert load_latest_evaluations(tmp_path) == {}
    assert "damaged/metrics.json: not the metrics of an evaluation" in caplog.text


@pytest.mark.parametrize("has_started_run", [False, True])
def test_compare_without_completed_epochs_names_the_fix(command, tmp_path, has_started_run):
    if has_started_run:
        (tmp_path / "outputs" / "training_runs" / "started").mkdir(parents=True)
    status, _, err = command("compare")
    assert status == 2
    assert err.startswith("cifar_ignite: outputs/training_runs: no runs to compare; train one first")
    assert err.count("\n") == 1

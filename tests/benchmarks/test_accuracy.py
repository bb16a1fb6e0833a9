"""The accuracy benchmark: seeds, summary and time to an accuracy."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from benchmarks import accuracy
from benchmarks.accuracy import configure_run, curve_val_size, measure, time_to_accuracy
from cifar_ignite.config import Config
from cifar_ignite.training.environment import format_commit
from tests.benchmarks.helpers import run_benchmark
from tests.helpers.images import write_photos

pytestmark = pytest.mark.usefixtures("blank_figures")


def test_accuracy_evaluates_last_weights_of_each_seed(tmp_path, tiny_file):
    arguments = ["--config", tiny_file, "--out", tmp_path / "accuracy", "--seeds=2"]
    done = run_benchmark("accuracy", arguments, ["seed=3", "train.ema_decay=0.5"])
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "accuracy.json").read_text())
    assert [row["seed"] for row in result["seeds"]] == [3, 4]
    for row, name in zip(result["seeds"], ("tiny_seed3", "tiny_seed4"), strict=True):
        (directory,) = (tmp_path / "outputs" / "evaluations").glob(f"{name}_val_acc_none_*")
        metrics = json.loads((directory / "metrics.json").read_text())
        assert row["accuracy"] == metrics["accuracy"]
        assert row["accuracy_tta_flip"] == metrics["tta"]["accuracy"]
        (run_dir,) = (
            path.parent
            for path in (tmp_path / "outputs" / "training_runs").glob("*/config.json")
            if json.loads(path.read_text())["experiment"] == name
        )
        history = pd.read_csv(run_dir / "logs" / "metrics.csv")
        assert row["seconds"] == pytest.approx(history["seconds"].sum())
        assert history["val_acc"].isna().all()
    accuracies = [row["accuracy"] for row in result["seeds"]]
    assert result["summary"]["accuracy"]["mean"] == pytest.approx(np.mean(accuracies))
    assert result["summary"]["accuracy"]["sd"] == pytest.approx(np.std(accuracies, ddof=1))
    row = next(line for line in done.stdout.splitlines() if line.startswith("| tiny, 2 epochs"))
    assert f"| 2 | {100 * np.mean(accuracies):.2f}% ± {100 * np.std(accuracies, ddof=1):.2f} |" in row
    assert "time_to_accuracy" in result
    assert result["environment"]["command"].startswith("python -m benchmarks.accuracy ")
    assert f"| {format_commit(result['environment'])} | 2 |" in row


def test_measure_without_curve_has_no_time_to_accuracy(tmp_path, tiny_config):
    result = measure(tiny_config(train={"epochs": 1}), 1, False, tmp_path / "accuracy")
    assert result["jobs"] == 1
    assert "time_to_accuracy" not in result
    assert json.loads((tmp_path / "accuracy.json").read_text())["summary"].keys() == result["summary"].keys()
    assert result["summary"]["accuracy"]["sd"] == 0


@pytest.mark.parametrize(("test_set", "message"), [("missing", "no such directory"), ("unlabeled", "is unlabeled")])
def test_accuracy_without_labeled_test_set_fails_before_the_first_run(tmp_path, tiny_file, test_set, message):
    photos = write_photos(tmp_path / "photos", {"train": 10, "test": 4})
    for directory in (photos / "test").iterdir():
        for file in directory.iterdir():
            file.rename(photos / "test" / f"{directory.name}_{file.name}")
        directory.rmdir()
    if test_set == "missing":
        shutil.rmtree(photos / "test")
    done = run_benchmark("accuracy", ["--config", tiny_file], ["data.dataset=folder", f"data.root={photos}"])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_measure_trains_seeds_at_once(tmp_path, tiny_config, monkeypatch):
    """The processes themselves are tested with the ablations."""
    calls = []

    def map_in_this_process(run, configs, jobs):
        calls.append(([config.seed for config in configs], jobs))
        return map(run, configs)

    monkeypatch.setattr(accuracy, "map_runs", map_in_this_process)
    result = measure(tiny_config(train={"epochs": 1}), 2, False, tmp_path / "accuracy", jobs=2)
    assert calls == [([0, 1], 2)]
    assert (result["jobs"], [row["seed"] for row in result["seeds"]]) == (2, [0, 1])
    assert "up to 2 seeds at once" in accuracy.format_result(result, None)


def test_time_to_accuracy_is_that_of_the_first_epoch_that_reaches_it():
    history = pd.DataFrame({"epoch": [1, 2, 3, 4], "val_acc": [0.55, 0.82, 0.79, 0.9], "seconds": [2.0, 3.0, 4.0, 5.0]})
    assert [(row["val_acc"], row["epoch"], row["seconds"]) for row in time_to_accuracy(history)] == [
        (0.5, 1, 2.0), (0.6, 2, 5.0), (0.7, 2, 5.0), (0.8, 2, 5.0), (0.85, 4, 14.0), (0.9, 4, 14.0),
    ]  # fmt: skip


@pytest.mark.parametrize(("val_size", "expected"), [(None, None), (0, 5000), (300, 300)])
def test_curve_is_measured_with_the_validation_images_of_the_recipe(val_size, expected):
    recipe = Config(data={"val_size": val_size})
    assert curve_val_size(recipe) == expected
    assert configure_run(recipe, 0, expected).experiment.endswith("_curve")

"""The benchmarks run, on next to nothing, and write what they print."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import ablations
from benchmarks.ablations import table
from benchmarks.accuracy import current_commit, time_to_accuracy
from cifar_ignite.config import RunFailedError
from cifar_ignite.handlers import NonFiniteError

ROOT = Path(__file__).parent.parent


def test_throughput_measures_every_row_and_writes_them(tmp_path):
    settings = ["model.width=2", "data.batch_size=16", "device=cpu", "compile=off"]
    small = [
        "--images",
        "64",
        "--iterations",
        "1",
        "--seconds",
        "0",
        "--batch-sizes",
        "8",
        "--dataset-sizes",
        "32",
        "64",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.throughput", *small, "--out", tmp_path / "speed"]
        + [word for setting in settings for word in ("--set", setting)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "speed.json").read_text())
    rates = {row["what"]: row for row in result["images_per_second"]}
    assert {name[:3] for name in rates} >= {"(a)", "(b)", "(c)", "(e)", "(f)"}
    for name, row in rates.items():
        assert 0 < row["lowest"] <= row["images/s"] <= row["highest"]
        assert name in done.stdout
    assert result["ratios"]["(a) / (b)"] == (
        rates["(a) this project"]["images/s"] / rates["(b) bare step, the limit"]["images/s"]
    )
    assert result["pipeline_epoch_seconds"].keys() == {"32 images", "64 images"}
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_accuracy_scores_the_last_weights_of_each_seed(tmp_path, tiny_file):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.accuracy", "--config", tiny_file, "--out", tmp_path / "acc", "--seeds=2"]
        + [f"--set={setting}" for setting in ("seed=3", "train.ema_decay=0.5")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "acc.json").read_text())
    assert [row["seed"] for row in result["seeds"]] == [3, 4]
    names = ("tiny_seed3", "tiny_seed4")
    for row, name in zip(result["seeds"], names, strict=True):
        (folder,) = (tmp_path / "outputs" / "evaluations").glob(f"{name}_val_acc_none_*")
        metrics = json.loads((folder / "metrics.json").read_text())
        assert row["accuracy"] == metrics["accuracy"]
        assert row["accuracy_tta_flip"] == metrics["tta"]["accuracy"]
        (run,) = [
            path.parent
            for path in (tmp_path / "outputs" / "training_runs").glob("*/config.json")
            if json.loads(path.read_text())["experiment"] == name
        ]
        history = pd.read_csv(run / "logs" / "metrics.csv")
        assert row["seconds"] == pytest.approx(history["seconds"].sum())
        assert history["val_acc"].isna().all()
    accuracies = [row["accuracy"] for row in result["seeds"]]
    assert result["summary"]["accuracy"]["mean"] == pytest.approx(np.mean(accuracies))
    assert result["summary"]["accuracy"]["sd"] == pytest.approx(np.std(accuracies, ddof=1))
    row = next(line for line in done.stdout.splitlines() if line.startswith("| tiny, 2 epochs"))
    assert f"| 2 | {100 * np.mean(accuracies):.2f}% ± {100 * np.std(accuracies, ddof=1):.2f} |" in row
    assert "time_to_accuracy" in result


def test_the_time_to_an_accuracy_is_that_of_the_first_epoch_at_it():
    history = pd.DataFrame({"epoch": [1, 2, 3, 4], "val_acc": [0.55, 0.82, 0.79, 0.9], "seconds": [2.0, 3.0, 4.0, 5.0]})
    assert [(row["val_acc"], row["epoch"], row["seconds"]) for row in time_to_accuracy(history)] == [
        (0.5, 1, 2.0), (0.6, 2, 5.0), (0.7, 2, 5.0), (0.8, 2, 5.0), (0.85, 4, 14.0), (0.9, 4, 14.0),
    ]  # fmt: skip


def test_ablations_compare_changes_seed_by_seed_and_read_no_test_set(tmp_path, tiny_file, cifar_root):
    (cifar_root / "cifar-10-batches-py" / "test_batch").unlink()
    changes = ["optimizer.lr=0.2 train.ema_decay=0.5", "model.dropout=0"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.ablations", "--config", tiny_file, "--out", tmp_path / "abl", "--jobs=2"]
        + [f"--vary={change}" for change in changes],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    accuracies = json.loads((tmp_path / "abl.json").read_text())["validation_accuracy"]
    assert list(accuracies) == ["the recipe", *changes]
    assert all(len(values) == 2 for values in accuracies.values())
    runs = [json.loads(path.read_text()) for path in (tmp_path / "outputs" / "training_runs").glob("*/config.json")]
    trained = Counter((run["seed"], run["optimizer"]["lr"], run["model"]["dropout"]) for run in runs)
    settings = ((0.05, None), (0.2, None), (0.05, 0.0))
    assert trained == {(seed, *setting): 1 for seed in (0, 1) for setting in settings}
    shown = table(accuracies)
    assert shown["difference"][1] == pytest.approx(
        100 * (np.mean(accuracies[changes[0]]) - np.mean(accuracies["the recipe"]))
    )


@pytest.mark.parametrize("benchmark", ["throughput", "accuracy", "ablations"])
def test_a_wrong_configuration_is_one_line(benchmark):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{benchmark}", "--set", "data.batch=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "did you mean batch_size?" in done.stderr


def test_less_images_than_a_batch_are_refused():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.throughput", "--images", "100"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "throughput: --images 100: less than a batch of 1024\n")


def test_the_commit_is_unknown_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert current_commit() == "unknown"


def test_a_run_that_fails_is_no_row_of_ablations(tiny_config, monkeypatch):
    """Only one that diverges has an accuracy: that of a guess."""

    def fail(config):
        raise error

    monkeypatch.setattr(ablations, "train", fail)
    error = NonFiniteError("the gradient is not finite")
    assert ablations.last_validation_accuracy(tiny_config()) == 0.1
    error = RunFailedError("cannot write a checkpoint")
    with pytest.raises(RunFailedError):
        ablations.last_validation_accuracy(tiny_config())

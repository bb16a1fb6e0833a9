"""The ablation benchmark: changes are compared seed by seed, on validation images only."""

import json
from collections import Counter

import numpy as np
import pytest

from benchmarks import ablations
from benchmarks.ablations import DIVERGED_ACCURACY, UNCHANGED, change_table, last_val_acc
from cifar_ignite.errors import NonFiniteError, TrainingError
from tests.benchmarks.helpers import run_benchmark


def test_ablations_compare_changes_by_seed_without_reading_the_test_set(tmp_path, tiny_file, cifar_root):
    (cifar_root / "cifar-10-batches-py" / "test_batch").unlink()
    changes = ["optimizer.lr=0.2 train.ema_decay=0.5", "model.dropout=0"]
    arguments = ["--config", tiny_file, "--out", tmp_path / "ablations", "--jobs=2"]
    done = run_benchmark("ablations", [*arguments, *(f"--change={change}" for change in changes)], ["train.epochs=1"])
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "ablations.json").read_text())
    assert result["environment"]["command"].startswith("python -m benchmarks.ablations ")
    assert (result["jobs"], result["config"]["experiment"]) == (2, "ablation")
    accuracies = result["validation_accuracy"]
    assert list(accuracies) == [UNCHANGED, *changes]
    assert all(len(values) == 2 for values in accuracies.values())
    runs = [json.loads(path.read_text()) for path in (tmp_path / "outputs" / "training_runs").glob("*/config.json")]
    trained = Counter((run["seed"], run["optimizer"]["lr"], run["model"]["dropout"]) for run in runs)
    logs = list((tmp_path / "outputs" / "training_runs").glob("*/logs/training.log"))
    assert len(logs) == 6
    assert all("epoch 1/1" in log.read_text() for log in logs)
    settings = ((0.05, None), (0.2, None), (0.05, 0.0))
    assert trained == {(seed, *setting): 1 for seed in (0, 1) for setting in settings}
    difference = 100 * (np.mean(accuracies[changes[0]]) - np.mean(accuracies[UNCHANGED]))
    assert change_table(accuracies)["difference"][1] == pytest.approx(difference)


@pytest.mark.parametrize("error", [NonFiniteError("the gradient is not finite"), TrainingError("no space left")])
def test_last_val_acc_of_a_diverged_run_is_zero_and_other_errors_are_raised(tiny_config, monkeypatch, error):
    def fail(config):
        raise error

    monkeypatch.setattr(ablations, "train", fail)
    if isinstance(error, NonFiniteError):
        assert last_val_acc(tiny_config()) == DIVERGED_ACCURACY == 0
    else:
        with pytest.raises(TrainingError):
            last_val_acc(tiny_config())


@pytest.mark.parametrize("arguments", [["--set=data.val_size=0"], ["--change=data.val_size=0"]])
def test_ablations_without_validation_images_are_refused_before_training(tmp_path, tiny_file, arguments):
    done = run_benchmark("ablations", ["--config", tiny_file, *arguments])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "data.val_size" in done.stderr
    assert not (tmp_path / "outputs").exists()

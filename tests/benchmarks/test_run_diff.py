"""The comparison of runs is not blind: every kind of difference is found."""

import shutil

import pytest
import torch

from benchmarks.run_diff import diff_runs, diff_trees
from tests.helpers import only_run

pytestmark = pytest.mark.usefixtures("blank_figures")


def test_diff_trees_of_equal_trees_is_empty():
    tree = {"a": [torch.ones(2), 1], "b": None}
    assert diff_trees(tree, {"a": [torch.ones(2), 1], "b": None}) == []


@pytest.mark.parametrize(
    ("other", "path"),
    [
        ({"a": [torch.tensor([1.0, 1.0 + 1e-7]), 1], "b": None}, "x/a/0"),
        ({"a": [torch.ones(2), 2], "b": None}, "x/a/1"),
        ({"a": [torch.ones(2), 1], "b": 0}, "x/b"),
        ({"a": [torch.ones(2)], "b": None}, "x/a"),
        ({"a": [torch.ones(2), 1]}, "x"),
    ],
)
def test_diff_trees_returns_the_path_of_a_difference(other, path):
    assert diff_trees({"a": [torch.ones(2), 1], "b": None}, other, "x") == [path]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run_with(command, tiny_file, scratch):
    """A function that returns the directory of a run with overrides, which is made once."""

    def run(name, *overrides):
        outputs = scratch / name / "outputs"
        if not outputs.exists():
            overrides = [f"output_dir={outputs}", "train.epochs=1", "train.ema_decay=0.9", *overrides]
            assert command("train", "--config", tiny_file, *(f"--set={override}" for override in overrides))[0] == 0
        return only_run(scratch / name)

    return run


def test_diff_runs_finds_a_changed_setting(run_with):
    run_dir = run_with("run")
    assert diff_runs(run_dir, run_with("same")) == []
    diffs = diff_runs(run_dir, run_with("other", "optimizer.weight_decay=0.01"))
    assert any(diff.startswith("latest_*.pt/model/") for diff in diffs)
    assert "metrics.csv" in diffs


def test_diff_runs_finds_a_changed_seed_and_decay_of_the_ema(run_with):
    run_dir = run_with("run")
    parts = {diff.split("/")[1] for diff in diff_runs(run_dir, run_with("seed", "seed=1")) if "/" in diff}
    assert {"model", "ema", "optimizer"} <= parts
    diffs = diff_runs(run_dir, run_with("decay", "train.ema_decay=0.1"))
    assert not any(diff.startswith("latest_*.pt/model/") for diff in diffs)
    assert any(diff.startswith("latest_*.pt/ema/") for diff in diffs)
    assert any(diff.startswith("best_*.pth/model/") for diff in diffs)


def test_diff_runs_of_runs_without_full_checkpoint_is_not_empty(run_with, tmp_path):
    run_dir = shutil.copytree(run_with("run"), tmp_path / "run")
    for path in (run_dir / "checkpoints").glob("latest_*.pt"):
        path.unlink()
    assert diff_runs(run_dir, run_dir) == ["latest_*.pt: None != None"]

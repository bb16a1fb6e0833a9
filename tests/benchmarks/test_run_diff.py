"""The comparison of runs is not blind: every kind of difference is found."""

import pytest
import torch

from benchmarks.run_diff import diff_runs, diff_trees
from tests.helpers import only_run


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


def test_diff_runs_finds_a_changed_setting(command, tiny_file, tmp_path):
    for name, overrides in {"run": [], "same": [], "other": ["--set", "optimizer.weight_decay=0.01"]}.items():
        arguments = ["--set", f"output_dir={tmp_path / name / 'outputs'}", *overrides]
        assert command("train", "--config", tiny_file, *arguments)[0] == 0
    run_dir = only_run(tmp_path / "run")
    assert diff_runs(run_dir, only_run(tmp_path / "same")) == []
    diffs = diff_runs(run_dir, only_run(tmp_path / "other"))
    assert any(diff.startswith("latest_*.pt/model/") for diff in diffs)
    assert "metrics.csv" in diffs


def test_diff_runs_finds_a_changed_seed_and_decay_of_the_ema(command, tiny_file, tmp_path):
    changes = {"run": [], "seed": ["--set", "seed=1"], "decay": ["--set", "train.ema_decay=0.1"]}
    for name, overrides in changes.items():
        arguments = ["--set", f"output_dir={tmp_path / name / 'outputs'}", "--set", "train.ema_decay=0.9", *overrides]
        assert command("train", "--config", tiny_file, *arguments)[0] == 0
    run_dir = only_run(tmp_path / "run")
    parts = {diff.split("/")[1] for diff in diff_runs(run_dir, only_run(tmp_path / "seed")) if "/" in diff}
    assert {"model", "ema", "optimizer"} <= parts
    diffs = diff_runs(run_dir, only_run(tmp_path / "decay"))
    assert not any(diff.startswith("latest_*.pt/model/") for diff in diffs)
    assert any(diff.startswith("latest_*.pt/ema/") for diff in diffs)
    assert any(diff.startswith("best_*.pth/model/") for diff in diffs)


def test_diff_runs_of_runs_without_full_checkpoint_is_not_empty(command, tiny_file, tmp_path):
    assert command("train", "--config", tiny_file)[0] == 0
    run_dir = only_run(tmp_path)
    for path in (run_dir / "checkpoints").glob("latest_*.pt"):
        path.unlink()
    assert diff_runs(run_dir, run_dir) == ["latest_*.pt: None != None"]

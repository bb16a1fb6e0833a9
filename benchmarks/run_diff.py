"""Bitwise comparison of two runs."""

from pathlib import Path
from typing import Any

import pandas as pd
import torch

from cifar_ignite.checkpointing.io import load_checkpoint
from cifar_ignite.files import latest_file

TIME_COLUMNS = ["seconds", "images_per_second"]


def diff_runs(run_dir: Path, other: Path) -> list[str]:
    """Return what differs between two run directories, times aside: names of tensors, counters, tables and files.

    The latest full checkpoint and the best model are compared bit for bit, metrics.csv by value.
    """
    diffs = [diff for pattern in ("latest_*.pt", "best_*.pth") for diff in _diff_checkpoints(run_dir, other, pattern)]
    table, other_table = (
        pd.read_csv(run / "logs" / "metrics.csv").drop(columns=TIME_COLUMNS) for run in (run_dir, other)
    )
    if not table.equals(other_table):
        diffs.append("metrics.csv")
    if (names := _kept_files(run_dir)) != (other_names := _kept_files(other)):
        diffs.append(f"files {names} != {other_names}")
    return diffs


def diff_trees(tree: Any, other: Any, path: str = "") -> list[str]:
    """Return the paths at which two trees of dicts, lists, tensors and numbers differ in any bit.

    Args:
        tree: Tree, such as the content of a checkpoint.
        other: Tree that it is compared with.
        path: Path of the two trees; the returned paths begin with it.
    """
    if isinstance(tree, dict) and isinstance(other, dict) and tree.keys() == other.keys():
        return [diff for key in tree for diff in diff_trees(tree[key], other[key], f"{path}/{key}")]
    if isinstance(tree, list) and isinstance(other, list) and len(tree) == len(other):
        pairs = enumerate(zip(tree, other, strict=True))
        return [diff for index, pair in pairs for diff in diff_trees(*pair, f"{path}/{index}")]
    if isinstance(tree, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(tree, other) else [path]
    return [] if tree == other else [path]


def _diff_checkpoints(run_dir: Path, other: Path, pattern: str) -> list[str]:
    """Compare the latest checkpoints of two runs whose names match a pattern."""
    file, other_file = (latest_file((run / "checkpoints").glob(pattern)) for run in (run_dir, other))
    if file is None or other_file is None:
        # A run without validation has no best model; without a full checkpoint, nothing would be compared.
        is_equal = file is other_file and pattern == "best_*.pth"
        return [] if is_equal else [f"{pattern}: {file} != {other_file}"]
    diffs = [] if file.name == other_file.name else [f"{file.name} != {other_file.name}"]
    return diffs + diff_trees(_load_without_times(file), _load_without_times(other_file), pattern)


def _load_without_times(path: Path) -> dict[str, Any]:
    checkpoint = load_checkpoint(path)
    checkpoint.pop("timer", None)
    history = checkpoint.pop("record").history
    checkpoint["history"] = [{key: epoch[key] for key in epoch if key not in TIME_COLUMNS} for epoch in history]
    return checkpoint


def _kept_files(run_dir: Path) -> list[str]:
    """Return the names of all checkpoints but the latest ones, whose number depends on interruptions."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir() if not path.name.startswith("latest"))

"""The scaling benchmark: one row, in a single process."""

import json
import sys

from benchmarks import scaling


def test_scaling_row_of_a_single_process_measures_rate_augmentation_and_memory(tmp_path, monkeypatch):
    path = tmp_path / "row.json"
    arguments = ["--images=64", "--seconds=0", f"--row={path}"]
    overrides = ["model.width=2", "data.batch_size=16", "device=cpu"]
    monkeypatch.setattr(sys, "argv", ["scaling", *arguments, *(f"--set={override}" for override in overrides)])
    assert scaling.main() == 0
    row = json.loads(path.read_text())
    assert row.keys() == {"images/s", "augmentation ms", "Rss MB", "Pss MB"}
    assert row["images/s"] > 0

"""The scaling benchmark: one row, in a single process."""

import json
import sys

import torch

from benchmarks import scaling


def test_scaling_records_environment_and_configuration_with_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "launch_row", lambda count, options, path: {"images/s": 10.0 * (count or 1)})
    monkeypatch.setattr(sys, "argv", ["scaling", "--rounds=1", "--processes", "2", f"--out={tmp_path / 'scaling'}"])
    assert scaling.main() == 0
    result = json.loads((tmp_path / "scaling.json").read_text())
    assert result["rows"]["torchrun, 2"]["images/s"] == 20
    assert result["environment"]["torch"] == torch.__version__
    assert result["config"]["data"]["val_size"] == 0


def test_scaling_row_of_a_single_process_measures_rate_augmentation_and_memory(tmp_path, monkeypatch):
    path = tmp_path / "row.json"
    arguments = ["--images=64", "--seconds=0", f"--row={path}"]
    overrides = ["model.width=2", "data.batch_size=16", "device=cpu"]
    monkeypatch.setattr(sys, "argv", ["scaling", *arguments, *(f"--set={override}" for override in overrides)])
    assert scaling.main() == 0
    row = json.loads(path.read_text())
    assert row.keys() == {"images/s", "augmentation ms", "Rss MB", "Pss MB"}
    assert row["images/s"] > 0

"""The benchmarks run, on next to nothing, and write what they print."""

import json
import subprocess
import sys
from pathlib import Path

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


def test_a_wrong_configuration_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.throughput", "--set", "data.batch=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "did you mean batch_size?" in done.stderr

"""The throughput benchmark on a tiny model: its rows, ratios and files."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from benchmarks import measuring, throughput
from benchmarks.measuring import MIN_ROUNDS, measure_rates, rate_table
from benchmarks.throughput import BARE_STEP, PROJECT
from benchmarks.workloads import create_setup, project_workload, random_dataset
from cifar_ignite.config_io import parse_config
from tests.benchmarks.helpers import run_benchmark


def tiny_options() -> argparse.Namespace:
    """Return the options of the smallest comparison."""
    return argparse.Namespace(
        config=Path("configs/se.json"),
        overrides=["model.width=2", "data.batch_size=16", "device=cpu", "compile=off"],
        images=64,
        iterations=1,
        seconds=0,
        batch_sizes=[],
        dataset_sizes=[],
        profile=True,
    )


def test_throughput_measures_and_writes_every_row(tmp_path, monkeypatch):
    """Also if the profiler fails, which is asked for last."""

    def fail(*_):
        raise RuntimeError("CUPTI_ERROR")

    monkeypatch.setattr(measuring, "profile", fail)
    sizes = ["--images", 64, "--iterations", 1, "--seconds", 0, "--batch-sizes", 8, "--dataset-sizes", 32, 64]
    overrides = ["model.width=2", "data.batch_size=16", "device=cpu", "compile=off"]
    done = run_benchmark("throughput", [*sizes, "--profile", "--out", tmp_path / "speed"], overrides)
    assert (done.returncode, done.stderr) == (0, "throughput: the profiler failed (CUPTI_ERROR)\n")
    result = json.loads((tmp_path / "speed.json").read_text())
    rates = {row["workload"]: row for row in result["images_per_second"]}
    assert {name[:3] for name in rates} >= {"(a)", "(b)", "(c)", "(e)", "(f)"}
    for name, row in rates.items():
        assert 0 < row["lowest"] <= row["images/s"] <= row["highest"]
        assert name in done.stdout
    assert result["ratios"]["(a) / (b)"] == rates[PROJECT]["images/s"] / rates[BARE_STEP]["images/s"]
    assert [row["workload"] for row in result["batch_sizes"]] == ["batch 8"]
    assert result["pipeline_epoch_seconds"].keys() == {"32 images", "64 images"}
    assert result["environment"]["command"].startswith("python -m benchmarks.throughput --images 64 ")
    assert result["profile"] is None
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_throughput_with_fewer_images_than_a_batch_fails_with_one_line():
    done = run_benchmark("throughput", ["--images", 100])
    assert done.returncode == 2
    assert done.stderr.startswith("throughput: --images 100: ")
    assert done.stderr.count("\n") == 1


def test_measure_rates_alternates_workloads_after_a_warmup():
    calls = []

    def create_workload(name, count):
        return lambda: calls.append(name) or count

    rates = measure_rates({"a": create_workload("a", 1), "b": create_workload("b", 2)}, torch.device("cpu"), 0)
    assert calls == ["a", "b"] * (1 + MIN_ROUNDS)
    assert {name: len(values) for name, values in rates.items()} == {"a": MIN_ROUNDS, "b": MIN_ROUNDS}


def test_rate_table_without_workloads_is_empty():
    assert len(rate_table({})) == 0


def test_project_workload_trains_the_model_and_counts_images():
    tree = {"device": "cpu", "data": {"batch_size": 16, "val_size": 0}, "model": {"width": 2}, "compile": "off"}
    setup = create_setup(parse_config(tree, "test"), random_dataset(40))
    before = [parameter.clone() for parameter in setup.model.parameters()]
    run = project_workload(setup, iterations=3)
    assert [run(), run()] == [48, 48]
    pairs = zip(before, setup.model.parameters(), strict=True)
    assert all(not torch.equal(old, parameter) for old, parameter in pairs)
    # Two epochs of 40 images have 4 full and 2 smaller batches; the smaller ones are skipped.
    assert setup.loader.iteration == 8


def test_throughput_writes_result_after_each_round(tmp_path, monkeypatch):
    """A run that is stopped in a later measurement leaves the comparison."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(throughput, "measure_batch_sizes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        throughput.measure(tiny_options(), tmp_path / "speed")
    result = json.loads((tmp_path / "speed.json").read_text())
    assert len(result["images_per_second"]) > 4
    assert result["ratios"]
    assert result["batch_sizes"] == []

"""The table of all results, and the order of the steps of gpu.sh."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.summary import summarize
from tests.benchmarks.helpers import run_benchmark
from tests.helpers import REPOSITORY, posix_only

ACCURACY = {
    "seeds": [{}, {}],
    "summary": {
        name: {"mean": mean, "sd": 0.01}
        for name, mean in {
            "accuracy": 0.9312,
            "accuracy_tta_flip": 0.94,
            "seconds": 71.2,
            "images_per_second": 21_000,
        }.items()
    },
    "time_to_accuracy": [
        {"val_acc": 0.5, "epoch": 2, "seconds": 5.0},
        {"val_acc": 0.9, "epoch": 17, "seconds": 40.04},
    ],
}
# As after the first round of the comparison.
THROUGHPUT = {
    "images_per_second": [{"workload": "(a) this project", "images/s": 20_001.3}],
    "batch_sizes": [],
    "ratios": {"(a) / (b)": 0.951},
    "peak_memory_bytes": {"cuda": 3e9},
}


def test_summarize_has_one_row_per_figure(tmp_path):
    (tmp_path / "accuracy_se_fast.json").write_text(json.dumps(ACCURACY))
    (tmp_path / "throughput_128_off.json").write_text(json.dumps(THROUGHPUT))
    assert [tuple(row) for row in summarize(tmp_path).itertuples(index=False)] == [
        ("accuracy_se_fast", "test accuracy", "93.12% ± 1.00%, seeds: 2"),
        ("accuracy_se_fast", "test accuracy with flip", "94.00% ± 1.00%, seeds: 2"),
        ("accuracy_se_fast", "training", "71.2 s, 21,000 images/s"),
        ("accuracy_se_fast", "time to 90%", "40.0 s, epoch 17"),
        ("throughput_128_off", "(a) this project", "20,001 images/s"),
        ("throughput_128_off", "(a) / (b)", "0.95"),
        ("throughput_128_off", "peak memory, cuda", "3,000 MB"),
    ]


def test_summary_without_results_fails_with_one_line(tmp_path):
    command = [sys.executable, "-m", "benchmarks.summary", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"summary: {tmp_path}: no results of benchmarks\n"


@pytest.mark.parametrize("text", [json.dumps(ACCURACY)[:60], '{"seeds": []}', "[]", '{"seeds": 3, "summary": {}}'])
def test_summary_names_a_file_that_is_no_result(tmp_path, text):
    (tmp_path / "accuracy_se.json").write_text(text)
    done = run_benchmark("summary", [tmp_path])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"{tmp_path / 'accuracy_se.json'}: not the result of a benchmark" in done.stderr


def plan_of_gpu_script(tmp_path, **options) -> tuple[list[list[str]], subprocess.CompletedProcess]:
    """Run gpu.sh without time for any step: the columns of its estimate, and the process."""
    command = ["bash", REPOSITORY / "benchmarks" / "gpu.sh", tmp_path / "out", tmp_path]
    environment = os.environ | {"PYTHON": sys.executable, "LIMIT": "0"} | options
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return [line.split() for line in done.stdout.split("== doctor", 1)[0].splitlines()[1:]], done


@posix_only
def test_gpu_script_prints_estimate_of_all_steps_and_runs_none_without_time(tmp_path):
    plan, done = plan_of_gpu_script(tmp_path, EPOCHS="30", RUNS="se_fast:2", CASES="128:on", BENCH="30")
    steps = ["doctor", "faults", "accuracy_se_fast", "throughput_128_on", "accuracy_stochastic_fast"]
    assert [columns[0] for columns in plan] == steps
    assert plan[2][1:5] == ["315", "s", "430", "s"]
    assert done.stdout.count("no time left") == len(steps)
    assert done.returncode == 1


@posix_only
def test_gpu_script_default_plan_reads_epochs_and_fits_ten_minutes(tmp_path):
    plan, _ = plan_of_gpu_script(tmp_path)
    assert plan[2][:2] == ["accuracy_se_fast", str(2 * (30 * 50_000 // 20_000 + 30))]
    assert int(plan[-1][3]) <= 570

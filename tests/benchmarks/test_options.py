"""Options, errors and output files that the benchmarks share."""

import json
import subprocess
from concurrent.futures import BrokenExecutor

import pytest

from benchmarks import ablations, accuracy
from benchmarks.options import create_out, exit_on_error, write_json
from cifar_ignite.errors import InputError, TrainingError
from tests.benchmarks.helpers import run_benchmark


@pytest.mark.parametrize("benchmark", ["throughput", "accuracy", "ablations", "scaling"])
def test_invalid_configuration_fails_with_one_line(benchmark):
    done = run_benchmark(benchmark, [], ["data.batch=1"])
    assert done.returncode == 2
    assert done.stderr.startswith(f"{benchmark}: ")
    assert done.stderr.count("\n") == 1
    assert "did you mean batch_size?" in done.stderr


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError("invalid"), 2),
        (TrainingError("failed"), 1),
        (BrokenExecutor("a process died"), 1),
        (subprocess.CalledProcessError(3, ["torchrun"]), 1),
    ],
)
def test_exit_on_error_prints_one_line_and_exits_with_its_status(capsys, error, status):
    with pytest.raises(SystemExit) as raised, exit_on_error("name"):
        raise error
    assert raised.value.code == status
    assert capsys.readouterr().err == f"name: {error}\n"


def test_exit_on_error_after_sigint_has_status_130(capsys):
    with pytest.raises(SystemExit) as raised, exit_on_error("name"):
        raise KeyboardInterrupt
    assert raised.value.code == 130
    assert capsys.readouterr().err == "name: interrupted\n"


@pytest.mark.parametrize("option", ["seeds", "jobs"])
@pytest.mark.parametrize("benchmark", [accuracy, ablations])
def test_counts_below_one_are_refused(benchmark, option, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark", f"--{option}=0"])
    with pytest.raises(SystemExit) as raised:
        benchmark.main()
    assert raised.value.code == 2
    assert f"--{option} 0: use at least 1" in capsys.readouterr().err


def test_exit_on_error_names_file_that_cannot_be_used(capsys):
    with pytest.raises(SystemExit) as raised, exit_on_error("name"):
        raise NotADirectoryError(20, "Not a directory", "out/x")
    assert raised.value.code == 2
    assert capsys.readouterr().err == "name: out/x: Not a directory\n"


def test_write_json_appends_the_suffix_to_a_name_with_dots(tmp_path):
    out = create_out(tmp_path / "new" / "lr0.5", "unused")
    assert write_json(out, {"a": 1}) == tmp_path / "new" / "lr0.5.json"
    assert json.loads((tmp_path / "new" / "lr0.5.json").read_text()) == {"a": 1}

"""Options, errors and output files that the benchmarks share."""

import json
import subprocess
from concurrent.futures import BrokenExecutor

import pytest

from benchmarks import ablations, accuracy
from benchmarks.options import create_out, exit_on_error, write_json
from cifar_ignite.errors import InputError, TrainingError
from tests.benchmarks.helpers import run_benchmark
from tests.helpers.runs import raise_disk_full


@pytest.mark.parametrize("benchmark", ["throughput", "accuracy", "ablations", "scaling"])
def test_invalid_configuration_fails_with_one_line(benchmark):
    done = run_benchmark(benchmark, [], ["data.batch=1"])
    assert done.returncode == 2
    assert done.stderr.startswith(f"{benchmark}: ")
    assert done.stderr.count("\n") == 1
    assert "did you mean batch_size?" in done.stderr


@pytest.mark.parametrize("benchmark", ["throughput", "scaling"])
def test_unknown_dataset_is_refused_by_benchmarks_on_random_images(benchmark):
    done = run_benchmark(benchmark, [], ["data.dataset=foo"])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "unknown dataset 'foo'; known: cifar10," in done.stderr


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


def test_create_out_accepts_the_name_of_the_json_file(tmp_path):
    assert write_json(create_out(tmp_path / "acc.json", "unused"), {"a": 1}) == tmp_path / "acc.json"


def test_write_json_that_fails_keeps_the_former_result(tmp_path, monkeypatch):
    write_json(tmp_path / "result", {"a": 1})

    def fail_in_the_middle(path, text):
        path.write_bytes(b"{")
        raise_disk_full()

    monkeypatch.setattr("benchmarks.options.write_text", fail_in_the_middle)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "result", {"a": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert json.loads((tmp_path / "result.json").read_text()) == {"a": 1}


def test_write_json_appends_the_suffix_to_a_name_with_dots(tmp_path):
    out = create_out(tmp_path / "new" / "lr0.5", "unused")
    assert write_json(out, {"a": 1}) == tmp_path / "new" / "lr0.5.json"
    assert json.loads((tmp_path / "new" / "lr0.5.json").read_text()) == {"a": 1}

"""What surrounds the process: notebooks' variables, encodings, closed pipes, full disks, Python's own switches."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_ignite.cli import main
from cifar_ignite.models.registry import MODELS, format_model_table
from tests.helpers import REPOSITORY, TINY, posix_only

FULL = Path("/dev/full")
INLINE = "module://matplotlib_inline.backend_inline"


def run_python(*words, environment=None, **options):
    """Run Python in the repository, with one thread."""
    options = {"capture_output": True, "text": True, "timeout": 300, "check": False} | options
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    return subprocess.run([sys.executable, *map(str, words)], cwd=REPOSITORY, env=environment, **options)


# --- matplotlib ---------------------------------------------------------------------------------------------------

PLOT = """
import os, sys
from pathlib import Path
from cifar_ignite.plots import plot_training_curves
from tests.helpers import epoch_metrics
plot_training_curves([epoch_metrics(1, 0.1), epoch_metrics(2, 0.2)], Path(sys.argv[1]))
assert os.environ.get("MPLBACKEND") == sys.argv[2], "subprocesses of the user need it"
"""


@pytest.mark.parametrize("backend", ["", INLINE, "garbage", "pdf"])
def test_plots_do_not_depend_on_mplbackend_and_matplotlibrc(tmp_path, backend):
    (tmp_path / "matplotlibrc").write_text(
        "text.usetex: True\nsavefig.format: pdf\nsavefig.dpi: 30\nlines.linewidth: 40\n"
    )
    figures = []
    for name, environment in (("plain", {}), ("custom", {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc")})):
        environment |= {"MPLBACKEND": backend if name == "custom" else ""}
        done = run_python("-c", PLOT, tmp_path / name, environment["MPLBACKEND"], environment=environment)
        assert done.returncode == 0, done.stderr
        figures.append(np.asarray(Image.open(tmp_path / name / "loss.png")))
    assert np.array_equal(*figures)


def test_valid_mplbackend_stays_the_backend_of_other_figures():
    code = "import matplotlib, cifar_ignite.plots; sys.exit(matplotlib.rcParams['backend'] != 'svg')"
    for imports in ("import sys, cifar_ignite.plots;", "import sys, matplotlib;"):
        assert run_python("-c", imports + code, environment={"MPLBACKEND": "svg"}).returncode == 0


def test_commands_that_draw_nothing_do_not_import_matplotlib():
    modules = ["cli", "train", "predict", "export", "doctor", "models.registry", "training.loggers"]
    imports = "".join(f"import cifar_ignite.{name}; " for name in modules)
    done = run_python("-c", f"{imports} import sys; print([m for m in sys.modules if m.startswith('matplotlib')])")
    assert done.stdout == "[]\n"


def test_doctor_accepts_backend_that_is_not_installed():
    done = run_python("-m", "cifar_ignite", "doctor", environment={"MPLBACKEND": INLINE})
    assert "ok       packages" in done.stdout


# --- stdout and stderr --------------------------------------------------------------------------------------------


def test_stdout_that_is_not_utf8_shows_replacements(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors="strict")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr("cifar_ignite.config_io.format_config_reference", lambda: "1 – 2")
    assert main(["config-reference"]) == 0
    assert stdout.buffer.getvalue() == b"1 ? 2\n"


def test_log_lines_on_stdout_that_is_not_utf8_are_printed(tmp_path):
    """compare prints a dash for what is missing."""
    run_dir = tmp_path / "training_runs" / "run"
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "config.json").write_text(json.dumps(TINY))
    (run_dir / "logs" / "metrics.csv").write_text("epoch,train_acc,val_acc,images_per_second\n1,0.5,0.5,10\n")
    words = ["-m", "cifar_ignite", "compare", "--set", f"output_dir={tmp_path}"]
    done = run_python(*words, environment={"PYTHONIOENCODING": "latin-1"}, text=False)
    assert (done.returncode, done.stderr) == (0, b"")
    (row,) = [line for line in done.stdout.splitlines() if b"hybrid_resnet" in line]
    assert row.split()[-3:] == [b"?", b"?", b"10"]


@pytest.mark.parametrize("command", ["doctor", "models", "schema", "--help"])
def test_closed_pipe_ends_quietly(command):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as stdout:
        done = run_python("-m", "cifar_ignite", command, capture_output=False, stdout=stdout, stderr=subprocess.PIPE)
    assert done.returncode == 0
    assert done.stderr == ""


@posix_only
@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    ("command", "status", "err"),
    [
        ("doctor", 0, ""),
        ("--help", 0, ""),
        ("schema", 1, "cifar_ignite: cannot write to stdout: No space left on device\n"),
    ],
)
def test_full_disk_behind_stdout_is_at_most_one_line(command, status, err):
    with FULL.open("w") as stdout:
        done = run_python("-m", "cifar_ignite", command, capture_output=False, stdout=stdout, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (status, err)


@posix_only
@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
@pytest.mark.parametrize("words", [["nosuchcommand"], ["train", "--config", "none.json"]], ids=" ".join)
def test_full_disk_behind_stderr_keeps_exit_status(words):
    with FULL.open("w") as stderr:
        done = run_python("-m", "cifar_ignite", *words, capture_output=False, stdout=subprocess.PIPE, stderr=stderr)
    assert (done.returncode, done.stdout) == (2, "")


# --- python -OO ---------------------------------------------------------------------------------------------------


def test_models_without_docstrings_are_listed(monkeypatch):
    monkeypatch.setitem(MODELS, "undocumented", lambda num_classes: MODELS["se_resnet"](num_classes=num_classes))
    assert "undocumented" in format_model_table(10, 32)


@pytest.mark.parametrize(
    ("command", "expected"), [("models", "2,820,390"), ("schema", "probability of a horizontal flip")]
)
def test_commands_work_without_docstrings_and_asserts(command, expected):
    done = run_python("-OO", "-m", "cifar_ignite", command)
    assert (done.returncode, done.stderr) == (0, "")
    assert expected in done.stdout


def test_config_reference_is_the_same_without_docstrings():
    done = run_python("-OO", "-m", "cifar_ignite", "config-reference", environment={"PYTHONIOENCODING": "utf-8"})
    assert done.stdout == (REPOSITORY / "docs" / "configuration.md").read_text()


def test_train_and_evaluate_work_without_docstrings_and_asserts(tiny_file, tmp_path):
    words = ["--set", "train.epochs=1"]
    calls = [["train", "--config", str(tiny_file), *words], ["evaluate", "--set", f"output_dir={tmp_path / 'outputs'}"]]
    code = f"from cifar_ignite.cli import main\nfor words in {calls!r}:\n    print('status', main(words))"
    done = run_python("-OO", "-c", code)
    assert done.stderr == ""
    assert done.stdout.count("status 0\n") == 2

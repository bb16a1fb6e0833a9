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
from cifar_ignite.plots import plot_training_curves
from tests.helpers import REPOSITORY, TINY, epoch_metrics, posix_only

FULL = Path("/dev/full")
INLINE = "module://matplotlib_inline.backend_inline"


def run_python(*words, environment=None, **options):
    """Run Python in the repository, with one thread."""
    options = {"capture_output": True, "text": True, "timeout": 300, "check": False} | options
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    return subprocess.run([sys.executable, *map(str, words)], cwd=REPOSITORY, env=environment, **options)


# --- matplotlib ---------------------------------------------------------------------------------------------------

HISTORY = [epoch_metrics(1, 0.1), epoch_metrics(2, 0.2)]
# Without torch, whose import takes seconds.
PLOT = f"""
import os, sys
from pathlib import Path
if sys.argv[3] == "matplotlib first":
    import matplotlib
import cifar_ignite.image_plots
from cifar_ignite.plots import plot_training_curves
plot_training_curves({HISTORY!r}, Path(sys.argv[1]))
assert os.environ["MPLBACKEND"] == sys.argv[2], "subprocesses of the user need it"
import matplotlib
print(matplotlib.rcParams["backend"].lower())
"""


@pytest.mark.parametrize(
    ("backend", "first", "kept"),
    [
        (INLINE, "", INLINE),
        ("garbage", "", None),
        ("pdf", "", "pdf"),
        ("svg", "matplotlib first", "svg"),
    ],
)
def test_plots_do_not_depend_on_mplbackend_and_matplotlibrc(tmp_path, backend, first, kept):
    """A valid backend stays that of other figures."""
    (tmp_path / "matplotlibrc").write_text(
        "text.usetex: True\nsavefig.format: pdf\nsavefig.dpi: 30\nlines.linewidth: 40\n"
    )
    environment = {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc"), "MPLBACKEND": backend}
    done = run_python("-c", PLOT, tmp_path / "custom", backend, first, environment=environment)
    assert done.returncode == 0, done.stderr
    assert kept in (None, done.stdout.strip())
    plot_training_curves(HISTORY, tmp_path / "plain")
    figures = [np.asarray(Image.open(tmp_path / name / "loss.png")) for name in ("plain", "custom")]
    assert np.array_equal(*figures)


DRAWS_NOTHING = ["cli", "train", "predict", "export", "doctor", "models.registry", "training.loggers"]


def test_commands_that_draw_nothing_do_not_import_matplotlib():
    """Then doctor accepts a backend that is not installed."""
    imports = "".join(f"import cifar_ignite.{name}; " for name in DRAWS_NOTHING)
    modules = "print([name for name in sys.modules if name.startswith('matplotlib')]); "
    code = f"import sys; {imports}{modules}cifar_ignite.cli.main(['doctor'])"
    done = run_python("-c", code, environment={"MPLBACKEND": "module://not_installed"})
    assert done.stdout.startswith("[]\n")
    assert "ok       packages" in done.stdout


# --- stdout and stderr --------------------------------------------------------------------------------------------


def test_stdout_that_is_not_utf8_shows_replacements(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors="strict")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr("cifar_ignite.config_io.format_config_reference", lambda: "1 – 2")
    assert main(["config-reference"]) == 0
    assert stdout.buffer.getvalue() == b"1 ? 2\n"


def test_log_lines_on_stdout_that_is_not_utf8_are_printed(tmp_path, monkeypatch, capsys):
    """compare prints a dash for what is missing."""
    run_dir = tmp_path / "training_runs" / "run"
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "config.json").write_text(json.dumps(TINY))
    (run_dir / "logs" / "metrics.csv").write_text("epoch,train_acc,val_acc,images_per_second\n1,0.5,0.5,10\n")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors="strict")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["compare", "--set", f"output_dir={tmp_path}"]) == 0
    assert capsys.readouterr().err == ""
    (row,) = [line for line in stdout.buffer.getvalue().splitlines() if b"hybrid_resnet" in line]
    assert row.split()[-3:] == [b"?", b"?", b"10"]


def closed_pipe():
    """Return a stream whose reader is gone."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    return os.fdopen(write_end, "w")


@pytest.mark.parametrize("command", ["schema", "--help"])
def test_closed_pipe_ends_quietly(command):
    """Also at the exit of Python."""
    with closed_pipe() as stdout:
        done = run_python("-m", "cifar_ignite", command, capture_output=False, stdout=stdout, stderr=subprocess.PIPE)
    assert done.returncode == 0
    assert done.stderr == ""


@posix_only
@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    ("command", "status", "err"),
    [("--help", 0, ""), ("schema", 1, "cifar_ignite: cannot write to stdout: No space left on device\n")],
)
def test_full_disk_behind_stdout_is_at_most_one_line(command, status, err):
    with FULL.open("w") as stdout:
        done = run_python("-m", "cifar_ignite", command, capture_output=False, stdout=stdout, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (status, err)


@pytest.mark.parametrize(
    "open_stdout",
    [
        closed_pipe,
        pytest.param(
            lambda: FULL.open("w"), marks=pytest.mark.skipif(not FULL.exists(), reason="no /dev/full"), id="full_disk"
        ),
    ],
)
def test_log_lines_on_failing_stdout_do_not_end_a_command(monkeypatch, capsys, open_stdout):
    stdout = open_stdout()
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["doctor"]) == 0
    assert capsys.readouterr().err == ""
    sys.stdout.flush()  # as Python does at its exit
    with pytest.raises(OSError, match="Broken pipe|No space left"):
        stdout.close()


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


def test_commands_work_without_docstrings_and_asserts(tiny_file, tmp_path):
    """All in one process, whose import of torch takes seconds."""
    train = ["train", "--config", str(tiny_file), "--set", "train.epochs=1"]
    evaluate = ["evaluate", "--set", f"output_dir={tmp_path / 'outputs'}"]
    calls = [["config-reference"], ["models"], ["schema"], train, evaluate]
    code = f"from cifar_ignite.cli import main\nfor words in {calls!r}:\n    print('status', main(words))"
    done = run_python("-OO", "-c", code, encoding="utf-8", environment={"PYTHONIOENCODING": "utf-8"})
    assert (done.returncode, done.stderr) == (0, "")
    reference, models, schema, _, evaluation, rest = done.stdout.split("status 0\n")
    assert reference == (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert "2,820,390" in models
    assert "probability of a horizontal flip" in schema
    assert "test accuracy" in evaluation
    assert rest == ""

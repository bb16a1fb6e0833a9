"""The Makefile: thin calls of the command line, whatever is typed."""

import sys

import pytest

from cifar_ignite.config_io import load_config
from tests.helpers import REPOSITORY
from tests.helpers.make import make


def test_make_without_target_prints_help():
    out = make().stdout
    for target in (
        "demo",
        "test",
        "train",
        "evaluate",
        "predict",
        "export",
        "compare",
        "doctor",
        "data",
        "docs",
        "lint",
    ):
        assert f"make {target}" in out


def test_make_uses_python_that_has_the_package():
    out = make("-n", "compare", f"PYTHON='{sys.executable}'").stdout
    assert out == f"'{sys.executable}' -m cifar_ignite compare\n"


def test_make_creates_venv_if_python_lacks_the_package(tmp_path):
    """Whatever metadata the checkout contains; -S leaves the packages of this environment out."""
    (tmp_path / "Makefile").write_bytes((REPOSITORY / "Makefile").read_bytes())
    (tmp_path / "pyproject.toml").touch()
    metadata = tmp_path / "cifar_ignite-1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Name: cifar-ignite\nVersion: 1\n")
    out = make("-n", "compare", f"PYTHON='{sys.executable}' -S", cwd=tmp_path).stdout
    assert f"'{sys.executable}' -S -m venv .venv\n" in out
    assert out.endswith("\n.venv/bin/python -m cifar_ignite compare\n")


@pytest.mark.usefixtures("blank_figures")
def test_make_train_passes_spaces_and_quotes_unchanged(tmp_path, command):
    """The shell that make starts passes the words to a program that writes them down; they are those of a run."""
    output_dir, python = tmp_path / "it's here", tmp_path / "python"
    python.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" > '{tmp_path}/words'\n")
    python.chmod(0o755)
    done = make(
        "train", "MODEL=demo", "EPOCHS=1", "SEED=4", f"OUTPUT_DIR={output_dir}", f"PYTHON='{python}'",
        "SET=data.synthetic.train_size=80 data.val_size=20 model.width=2 train.log_every=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    program, name, *words, rest = (tmp_path / "words").read_text().split("\0")
    assert [program, name, rest] == ["-m", "cifar_ignite", ""]
    assert command(*words)[0] == 0
    (run_dir,) = (output_dir / "training_runs").iterdir()
    config = load_config(run_dir / "config.json")
    assert (config.train.epochs, config.seed, config.model.width) == (1, 4, 2)


def test_make_of_the_tests_never_installs():
    """Neither the environment of the checkout nor another one is created."""
    assert "venv" not in make("-n", "-B", "train").stdout


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (["train", "MODEL=stochastic"], "--config 'stochastic'"),
        (["train", "MODEL=se", "RECIPE=fast"], "--config 'se_fast'"),
        (["train", "DATA=synthetic"], "--set experiment='se_synthetic'"),
        (["evaluate", "RECIPE=fast"], "--model 'se_fast'"),
        (["evaluate", "TTA=1"], "evaluate --tta 'flip'"),
        (["evaluate", "TTA=shift"], "evaluate --tta 'shift'"),
        (["predict", "IMAGES=it's here/a b.png", "TTA=1"], r"predict --tta 'flip' -- 'it'\''s here/a b.png'"),
        (["predict", "IMAGES=-x", "MODEL=hybrid"], "predict --model 'hybrid' -- '-x'"),
        (["export", "MODEL=se", "RECIPE=best"], "export --model 'se_best'"),
        (["export", "CHECKPOINT=a b.pth"], "export --checkpoint 'a b.pth'"),
        (["compare", "OUTPUT_DIR=a b"], "compare --set output_dir='a b'"),
        (["doctor", "DATA_DIR=a b"], "doctor --set data.root='a b'"),
        (["data", "DATA=folder", "DATA_DIR=a b"], "data --set data.root='a b' --set data.dataset='folder'"),
        (["train", "DATA=folder", "DATA_DIR=photos"], "--set experiment='se_folder' --set data.root='photos'"),
        (["tensorboard", "OUTPUT_DIR=a b"], "--logdir 'a b/training_runs'"),
        (["demo", "SET=data.val_size=9"], "evaluate --model demo --set 'data.val_size=9'"),
        ([".venv/.stamp", "TORCH_INDEX=https://a/b", "-B"], "--index-url 'https://a/b' torch torchvision"),
        (["train", "DATA=cifar10"], "--set data.dataset='cifar10'"),
        (["train", "RESUME=latest"], "--resume 'latest'"),
        (["train", "DATA_DIR=/a b/it's"], r"--set data.root='/a b/it'\''s'"),
        (["train", "SET=optimizer.lr=0.1 augment.cutmix_p=0"], "--set 'optimizer.lr=0.1' --set 'augment.cutmix_p=0'"),
        (["evaluate", "MODEL=se", "DATA=synthetic"], "--model 'se_synthetic'"),
        (["evaluate", "DATA=folder", "CHECKPOINT=x"], "evaluate --checkpoint 'x' --set data.dataset='folder'"),
        (["evaluate", "DATA=folder"], "evaluate --set data.dataset='folder'"),
        (["evaluate", "CHECKPOINT=$(HOME)", "TEST_FILE=b c"], "--checkpoint '$(HOME)' --test-file 'b c'"),
    ],
)
def test_make_variable_becomes_option(variables, expected):
    out = make("-n", *variables).stdout
    assert expected in " ".join(out.replace("\\\n", " ").split())


@pytest.mark.parametrize("target", ["train", "evaluate"])
def test_make_nproc_starts_torchrun(target):
    out = make("-n", target, "NPROC=2").stdout
    assert "n='2'" in out
    assert '-m torch.distributed.run --standalone --nproc_per_node="$n" -m cifar_ignite ' + target in out
    assert "torch.distributed" not in make("-n", target).stdout


@pytest.mark.parametrize("nproc", ["0", "-1", "two", "2x", "1.5", "2; echo oh", "'"])
def test_make_nproc_that_is_not_a_number_is_refused(nproc):
    done = make("train", f"NPROC={nproc}")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("cifar_ignite: NPROC: ")]
    assert line.endswith(f"got {nproc}")
    assert "Traceback" not in done.stderr

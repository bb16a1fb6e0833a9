"""A tiny CIFAR-10 in the official file format, and a run on it that takes about a second."""

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_ignite import figures
from cifar_ignite.cli import main
from cifar_ignite.config_io import merge_trees, parse_config
from cifar_ignite.train import train
from tests.helpers import TINY, only_run, save_blank_figure, snapshot, write_cifar10

# Tests that fork need an autograd engine without threads. It starts one per GPU in the first backward pass of a
# process, also for fake GPUs of fake tensors and torch.export: so the first pass is made here, without a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
torch.ones((), requires_grad=True).backward()
torch.backends.mps.is_available = lambda: False  # tests run on the CPU of a Mac, too

# Tests of what Windows does not have: make, fork, and paths of POSIX; single tests are marked `posix_only`.
collect_ignore = (
    [
        "benchmarks/test_faults.py",
        "distributed/test_process_group.py",
        "test_makefile.py",
        "test_makefile_variables.py",
        "test_paths.py",
    ]
    if os.name == "nt"
    else []
)
# Tests that start processes, train for seconds or compile; `make test-fast` leaves them out.
SLOW = (
    "benchmarks/",
    "distributed/test_collectives.py",
    "distributed/test_process_group.py",
    "checkpointing/test_faults.py",
    "checkpointing/test_resume.py",
    "checkpointing/test_listings.py",
    "data/test_image_reading.py",
    "evaluation/test_report.py",
    "evaluation/test_temperature.py",
    "training/test_batch_figure.py",
    "training/test_calibration.py",
    "training/test_determinism.py",
    "training/test_fake_cuda.py",
    "training/test_fake_mps.py",
    "training/test_forward.py",
    "training/test_operator_counts.py",
    "augment/test_compile.py",
    "test_cli.py",
    "test_compare.py",
    "test_config.py",
    "test_environment.py",
    "test_evaluate.py",
    "test_export.py",
    "test_api.py",
    "test_folder.py",
    "test_makefile",
    "test_notebook.py",
    "test_packaging.py",
    "test_paths.py",
    "test_predict.py",
    "test_traceability.py",
    "test_train.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    for item in items:
        if item.path.relative_to(tests).as_posix().startswith(SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """For tiny tensors, threads cost more than they gain."""
    torch.set_num_threads(1)


@pytest.fixture
def cifar_root(tmp_path: Path) -> Path:
    """data/cifar-10-batches-py with 5 x 24 training and 30 test images."""
    return write_cifar10(tmp_path / "data")


@pytest.fixture
def tiny_tree(tmp_path: Path, cifar_root: Path) -> dict[str, Any]:
    return merge_trees(TINY, {"output_dir": str(tmp_path / "outputs"), "data": {"root": str(cifar_root)}})


@pytest.fixture
def tiny_file(tmp_path: Path, tiny_tree: dict[str, Any]) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(tiny_tree))
    return path


@pytest.fixture
def tiny_config(tiny_tree: dict[str, Any]) -> Callable[..., Any]:
    """A function that returns the tiny configuration with changes, for example tiny_config(train={"epochs": 1})."""
    return lambda **changes: parse_config(merge_trees(tiny_tree, changes), "test")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Any]:
    """A function that runs the command line in a scratch directory and returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, **extra: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments], **extra)
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def refused(command: Callable[..., Any], tmp_path: Path) -> Callable[..., str]:
    """A function that runs a command which must be refused and returns its line on stderr."""

    def run(*words: object) -> str:
        before = snapshot(tmp_path)
        status, _, err = command(*words)
        assert status == 2, err
        assert err.count("\n") == 1
        assert "Traceback" not in err
        assert err.startswith("cifar_ignite: ")
        assert snapshot(tmp_path) == before
        return err

    return run


# --- Less work ----------------------------------------------------------------------------------------------------


@pytest.fixture
def blank_figures(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Figures are one pixel: drawing them takes half the time of a tiny run, and most of that of an evaluation."""
    draw = figures.Figure.savefig
    monkeypatch.setattr(figures.Figure, "savefig", save_blank_figure)
    return draw


@pytest.fixture
def drawn_figures(blank_figures: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn, in a module with blank ones."""
    monkeypatch.setattr(figures.Figure, "savefig", blank_figures)


@pytest.fixture(scope="session")
def train_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that trains the tiny configuration with overrides, once per process, and returns its output directory.

    Its paths are relative, so copies of the directory are complete. Tests only read it; its figures are blank.
    """

    @functools.cache
    def run(*overrides: str) -> Path:
        directory = tmp_path_factory.mktemp("trained")
        write_cifar10(directory / "data")
        tree = merge_trees(TINY, {"output_dir": "outputs", "data": {"root": "data"}})
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(directory)
            patched.setattr(figures.Figure, "savefig", save_blank_figure)
            train(parse_config(tree, "test", overrides))
        return directory / "outputs"

    return run


@pytest.fixture
def copy_run(
    train_once: Callable[..., Path], tmp_path: Path, cifar_root: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """A function that copies a run of `train_once` into the scratch directory and returns its run directory."""
    monkeypatch.chdir(tmp_path)

    def copy(*overrides: str) -> Path:
        shutil.copytree(train_once(*overrides), tmp_path / "outputs")
        return only_run(tmp_path)

    return copy


@pytest.fixture
def trained_run(copy_run: Callable[..., Path]) -> Path:
    """Run directory of the tiny configuration, of two epochs, in the scratch directory."""
    return copy_run()

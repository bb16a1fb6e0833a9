"""The environment that runs, evaluations and benchmarks record."""

import getpass
import json
import platform
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch

from cifar_ignite.training import environment
from cifar_ignite.training.environment import (
    cpu_model,
    describe_code,
    describe_environment,
    device_name,
    format_command,
    format_commit,
    format_environment,
    join_words,
)
from tests.helpers import posix_only

CPU = torch.device("cpu")
NO_CODE = {"commit": None, "is_clean": None}
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def test_describe_environment_is_json_with_versions_machine_and_precision():
    described = describe_environment(CPU, "tf32")
    assert json.loads(json.dumps(described)) == described
    assert (described["python"], described["torch"]) == (platform.python_version(), torch.__version__)
    assert (described["numpy"], described["precision"]) == (np.__version__, "tf32")
    assert (described["device"], described["threads"], described["world_size"]) == ("cpu", 1, 1)
    assert described["torchvision"]
    assert described["ignite"]
    assert described["device_name"] == described["cpu"] != ""
    assert type(described["torch"]) is str  # weights_only refuses torch's own class of versions


@pytest.mark.parametrize("has_bf16", [True, False])
def test_describe_environment_records_bf16_instructions_whatever_the_precision(monkeypatch, has_bf16):
    monkeypatch.setattr("cifar_ignite.training.device._cpu_has_bf16", lambda: has_bf16)
    described = describe_environment(CPU, "fp32")
    assert (described["cpu_has_bf16"], described["precision"]) == (has_bf16, "float32")
    assert ("with bf16" in format_environment(described)) == has_bf16


def test_describe_environment_contains_neither_user_nor_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "train.py"), f"--config={tmp_path}/a.json"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    described = describe_environment(CPU, "auto")
    assert described["command"] == "train.py '--config=~/a.json'"
    without_commit = {key: str(value) for key, value in described.items() if key != "commit"}
    for name in (getpass.getuser(), platform.node(), str(tmp_path)):
        assert name not in " ".join(without_commit.values()).split()


@posix_only
def test_join_words_shortens_home_directory_at_start_of_paths_only(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    words = (
        "evaluate",
        "/home/ann/best.pth",
        "--set",
        "data.root=/home/ann/data",
        "output_dir=/mnt/home/ann/out",
        "/home/ann2",
    )
    assert (
        join_words(*words) == "evaluate '~/best.pth' --set 'data.root=~/data' output_dir=/mnt/home/ann/out /home/ann2"
    )


def test_format_command_quotes_words_as_a_shell_reads_them(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/anywhere/cifar_ignite/__main__.py", "train", "--set", "augment.mean=[1, 2, 3]"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec("cifar_ignite.__main__", None))
    assert format_command() == "python -m cifar_ignite train --set 'augment.mean=[1, 2, 3]'"


# --- Code ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one commit, which tracks the file whose code is described."""
    file = tmp_path / "environment.py"
    file.write_text("code\n")
    for words in (("init", "-q"), ("add", "."), ("-c", "user.name=a", "-c", "user.email=a", "commit", "-qm", "a")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(environment, "__file__", str(file))
    return tmp_path


@needs_git
@pytest.mark.parametrize(("change", "is_clean"), [(None, True), ("environment.py", False), ("run.log", True)])
def test_describe_code_of_a_checkout_is_its_commit(checkout, change, is_clean):
    if change:
        (checkout / change).write_text("other code\n")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True).stdout.strip()
    code = describe_code()
    assert code == {"commit": head, "is_clean": is_clean}
    assert format_commit(code) == head[:7] + ("" if is_clean else "+")


@needs_git
def test_describe_code_of_a_package_inside_another_repository_is_unknown(checkout, monkeypatch):
    package = checkout / "site-packages"
    package.mkdir()
    (package / "environment.py").write_text("code\n")
    monkeypatch.setattr(environment, "__file__", str(package / "environment.py"))
    assert describe_code() == NO_CODE


def test_describe_code_outside_a_checkout_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert describe_code() == NO_CODE


def test_describe_code_without_git_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert describe_code() == NO_CODE
    assert format_commit(NO_CODE) == "unknown"


# --- Machine ------------------------------------------------------------------------------------------------------


def test_cpu_model_is_read_from_cpuinfo(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel\t\t: 85\nmodel name\t: Fast CPU @ 2.00GHz\nflags\t: fpu\n")
    monkeypatch.setattr(environment, "CPUINFO", tmp_path / "cpuinfo")
    assert cpu_model() == device_name(CPU) == "Fast CPU @ 2.00GHz"


@pytest.mark.parametrize("has_file", [True, False])
def test_cpu_model_without_a_name_is_the_architecture(monkeypatch, tmp_path, has_file):
    if has_file:
        (tmp_path / "cpuinfo").write_text("processor\t: 0\n")
    monkeypatch.setattr(environment, "CPUINFO", tmp_path / "cpuinfo")
    assert cpu_model() in (platform.processor(), platform.machine())
    assert cpu_model()


def test_device_name_of_mps_is_that_of_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M2")
    assert device_name(torch.device("mps")) == "Apple M2"

"""The environment of a result: code, software, machine and command; part of runs, evaluations and benchmarks."""

import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import ignite
import ignite.distributed as idist
import numpy
import torch
import torchvision

from cifar_ignite.training.device import precision_name

Environment = dict[str, Any]

GIT_TIMEOUT_SECONDS = 10
CPUINFO = Path("/proc/cpuinfo")


def describe_environment(device: torch.device, precision: str) -> Environment:
    """Return what a result depends on besides its configuration, as JSON; without the names of user and machine.

    Args:
        device: Device of the run.
        precision: Value of the configuration key `precision`.

    Returns:
        Keys: command; commit and is_clean (see `describe_code`); python, torch, torchvision, ignite and numpy
        (versions); platform; device and device_name; precision; cpu (model), cpu_has_bf16 (instructions), cores (of the
        machine), threads (of torch, per process) and world_size (processes).
    """
    return {
        "command": format_command(),
        **describe_code(),
        "python": platform.python_version(),
        # A version of torch is an instance of a class that checkpoints do not admit.
        **{library.__name__: str(library.__version__) for library in (torch, torchvision, ignite, numpy)},
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": device.type,
        "device_name": device_name(device),
        "precision": precision_name(precision, device),
        "cpu": cpu_model(),
        "cpu_has_bf16": precision_name("auto", torch.device("cpu")) == "bfloat16",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "world_size": idist.get_world_size(),
    }


def format_environment(environment: Environment) -> str:
    """Return one line for a log: versions, code and machine."""
    names = ("python", "torch", "torchvision", "ignite", "numpy")
    versions = ", ".join(f"{name} {environment[name]}" for name in names)
    cpu = environment["cpu"] + (" with bf16" if environment["cpu_has_bf16"] else "")
    return f"{versions}; commit {format_commit(environment)}; {cpu}, threads: {environment['threads']}"


# --- Code and command ---------------------------------------------------------------------------------------------


def format_command() -> str:
    """Return the command of this process, see `join_words`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["python", "-m", spec.name.removesuffix(".__main__")] if spec else [Path(sys.argv[0]).name]
    return join_words(*program, *sys.argv[1:])


def join_words(*words: str) -> str:
    """Return words as a shell reads them; the home directory, at the start of a path, is "~", as in every command."""
    home = re.escape(os.path.expanduser("~") + os.sep)
    return shlex.join(re.sub(f"(^|=){home}", rf"\1~{re.escape(os.sep)}", word) for word in words)


def describe_code() -> dict[str, Any]:
    """Return "commit", the hash of the checkout that this file belongs to, and "is_clean".

    It is clean if no tracked file differs. Both are None without git or outside a checkout.
    """
    # An installed package may lie inside the repository of another project, which does not track it.
    is_tracked = _run_git("ls-files", "--error-unmatch", Path(__file__).name)
    commit = _run_git("rev-parse", "HEAD") if is_tracked else None
    changes = _run_git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {"commit": commit, "is_clean": None if changes is None else not changes}


def _run_git(*words: str) -> str | None:
    """Return the output of git for the directory of this file, or None if it fails."""
    command = ["git", "--no-optional-locks", *words]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, check=True, timeout=GIT_TIMEOUT_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip()


def format_commit(environment: Environment) -> str:
    """Return the first digits of the commit, with a + if the tree was not clean; "unknown" without a commit."""
    if environment["commit"] is None:
        return "unknown"
    return environment["commit"][:7] + ("" if environment["is_clean"] else "+")


# --- Machine ------------------------------------------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    """Return the model of the GPU, or of the CPU."""
    if device.type == "mps":
        return torch.backends.mps.get_name()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def cpu_model() -> str:
    """Return the model of the CPU; outside Linux, and where Linux does not name it, at least its architecture."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(models), "") or platform.processor() or platform.machine()

"""The command line in forked processes, which start at once: importing torch takes seconds."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorboardX  # noqa: F401
import torch

# Imported once here instead of in each forked process.
import cifar_ignite.evaluate
import cifar_ignite.image_plots
import cifar_ignite.plots
import cifar_ignite.train  # noqa: F401
from cifar_ignite.cli import main as run_command

CRASHED = 70


def start_job(
    arguments: Sequence[str], log: Path, world_size: int, threads: int = 1, extra: Mapping[str, Any] | None = None
) -> list[int]:
    """Run one command in `world_size` processes that find each other as under torchrun.

    Args:
        arguments: Arguments of the command line.
        log: File that stdout and stderr are appended to.
        world_size: Number of processes.
        threads: Threads of torch per process.
        extra: Arguments of the command's function that have no option.

    Returns:
        Process ids, by rank.
    """
    if world_size == 1:
        return [start_process(arguments, log, threads, extra=extra)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start_process(arguments, log, threads, job | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, extra)
        for rank in range(world_size)
    ]


def start_process(
    arguments: Sequence[str],
    log: Path,
    threads: int = 1,
    environ: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> int:
    """Run one command in a forked process and return its process id.

    OpenMP's threads do not survive a fork: the calling process must not have started any (`torch.set_num_threads(1)`).

    Args:
        arguments: Arguments of the command line.
        log: File that stdout and stderr are appended to.
        threads: Threads of torch.
        environ: Environment variables to add.
        extra: Arguments of the command's function that have no option.
    """
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = CRASHED
    try:
        _redirect_output(log)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(threads)
        os.environ.update(environ or {})
        status = run_command(arguments, **(extra or {}))
        sys.stdout.flush()
        sys.stderr.flush()
    except KeyboardInterrupt:
        status = 130
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _redirect_output(log: Path) -> None:
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, encoding="utf-8")  # noqa: SIM115


def wait(pid: int, seconds: float) -> int | None:
    """Return the exit status of a child process (negative: its signal), or None if it still runs after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        finished, status = os.waitpid(pid, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.002)

"""Distributed runs on the CPU; their processes are forked because importing torch takes seconds."""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import forked_jobs
from cifar_ignite.distributed.env import dist_env_from_environ
from cifar_ignite.distributed.process_group import DistributedContext, distributed_context
from tests.distributed.helpers import TIMEOUT


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., tuple[list[int | None], str]]:
    """A function that runs a command on several ranks and returns their exit statuses and their output."""
    log = tmp_path / "job.log"

    def run(words: Sequence[object], world_size: int = 2, **extra: Any) -> tuple[list[int | None], str]:
        log.write_text("")
        pids = forked_jobs.start_job([str(word) for word in words], log, world_size, extra=extra)
        statuses = [forked_jobs.wait(pid, TIMEOUT) for pid in pids]
        for pid, status in zip(pids, statuses, strict=True):
            if status is None:
                os.kill(pid, signal.SIGKILL)
        return statuses, log.read_text()

    return run


@pytest.fixture
def run_on_ranks(job: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """A function that calls another one on several ranks that have joined, and returns the result of each rank."""

    def run(work: Callable[[DistributedContext], Any], world_size: int = 2) -> list[Any]:
        def command(_: Sequence[str]) -> int:
            with distributed_context(torch.device("cpu"), dist_env_from_environ()) as context:
                torch.save(work(context), tmp_path / f"rank{context.env.rank}.pt")
            return 0

        with monkeypatch.context() as patched:
            patched.setattr(forked_jobs, "run_command", command)
            statuses, log = job([], world_size)
        assert statuses == [0] * world_size, log
        return [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world_size)]

    return run

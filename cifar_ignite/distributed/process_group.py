"""Joining the processes of a run, and ending together: nccl between GPUs, gloo between CPUs."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore, rendezvous  # type: ignore[attr-defined]

from cifar_ignite.distributed.env import SLURM_NAMES, TORCHRUN_NAMES, DistEnv
from cifar_ignite.errors import InputError, TrainingError, TrainingInterrupted, first_line, translate_oom_errors

# A rank that exits is noticed at once; this bounds the wait for one that hangs or downloads the dataset.
TIMEOUT = timedelta(minutes=10)
REPORT_AFTER = timedelta(seconds=10)
RUN_DIR_KEY = "cifar_ignite/run_dir"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistributedContext:
    """A run's processes while they are joined.

    Attributes:
        env: Place of this process.
        cpu_group: Process group on gloo for collectives that must not wait for a GPU; None at world size 1.
    """

    env: DistEnv
    cpu_group: Any = None

    @property
    def duplicate_signal_window(self) -> float:
        """Seconds within which a second signal is the same one: its sender reaches all ranks, and so does torchrun."""
        return 1.0 if self.env.is_distributed else 0.0


@contextlib.contextmanager
def distributed_context(device: torch.device, env: DistEnv) -> Iterator[DistributedContext]:
    """Join the processes of the run inside the block; at world size 1, or when already joined, nothing is set up.

    Raises:
        InputError: If there are more processes on a machine than GPUs, or the GPU is one of Apple.
        TrainingError: If the processes cannot connect, or another rank exited. `should_report` of this error, and of
            one raised inside the block, is true on the rank that failed first.
    """
    if not env.is_distributed or idist.get_world_size() > 1:
        yield DistributedContext(env)
        return
    _check_gpus(device, env)
    with report_missing_ranks(env):
        store = _init_process_group(device, env)
    try:
        with translate_connection_errors(), translate_oom_errors():
            cpu_group: Any = dist.new_group(backend="gloo", timeout=TIMEOUT)
            try:
                yield DistributedContext(env, cpu_group)
            except TrainingInterrupted:
                dist.barrier(cpu_group)  # torchrun stops all ranks once one exits: first, every rank must have saved
                raise
            dist.barrier(cpu_group)
    except (InputError, TrainingError) as error:
        error.should_report = _is_first_failure(store)
        if not getattr(error, "peer_lost", False):
            _destroy_process_group()
        raise
    except BaseException:
        _destroy_process_group()
        raise
    _destroy_process_group()


@contextlib.contextmanager
def translate_connection_errors() -> Iterator[None]:
    """Translate the errors of a broken connection between ranks.

    Raises:
        TrainingError: If another rank exited or cannot be reached; its `peer_lost` is true.
    """
    try:
        yield
    except RuntimeError as error:
        words = str(error).lower()
        is_lost = isinstance(error, dist.DistError) or "gloo" in words or "nccl" in words or "connection" in words
        if idist.get_world_size() == 1 or not is_lost:
            raise
        lost = TrainingError(f"another process of this run exited, or its machine is unreachable ({first_line(error)})")
        lost.peer_lost = True
        raise lost from None


# --- Setting up and tearing down ----------------------------------------------------------------------------------


def _check_gpus(device: torch.device, env: DistEnv) -> None:
    if device.type == "mps":
        raise InputError(f"device: {env.world_size} processes cannot share an Apple GPU; use NPROC=1, or device=cpu")
    if device.type == "cuda" and env.local_rank >= (count := torch.cuda.device_count()):
        error = InputError(
            f"device: more processes than GPUs ({count}) on this machine; start one per GPU, or use device=cpu"
        )
        error.should_report = env.local_rank == count
        raise error


def _init_process_group(device: torch.device, env: DistEnv) -> Store:
    """Initialize the default process group; return a store of this group alone."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        # Inside a SLURM job, Ignite would use SLURM's ranks, which are those of torchrun's agent.
        os.environ.pop("SLURM_JOB_ID", None)
    try:
        if store := _agent_store(env):
            store = _group_store(store, env)
            if device.type == "cuda":
                torch.cuda.set_device(env.local_rank)
            dist.init_process_group(backend, store=store, rank=env.rank, world_size=env.world_size, timeout=TIMEOUT)
            idist.sync()
            return store
        idist.initialize(backend, timeout=TIMEOUT)
        return _group_store(_connect(TIMEOUT), env)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"the processes cannot connect: {first_line(error)}") from None


@contextlib.contextmanager
def report_missing_ranks(env: DistEnv, after: timedelta = REPORT_AFTER) -> Iterator[None]:
    """Log how many ranks have joined, if the block takes longer than `after`."""
    joined = threading.Event()
    threading.Thread(target=_report_missing_ranks, args=(env, after.total_seconds(), joined), daemon=True).start()
    try:
        yield
    finally:
        joined.set()


def _report_missing_ranks(env: DistEnv, seconds: float, joined: threading.Event) -> None:
    variable = TORCHRUN_NAMES[2] if "WORLD_SIZE" in os.environ and "SLURM_LOCALID" not in os.environ else SLURM_NAMES[2]
    store, deadline = None, time.monotonic() + seconds
    while not joined.is_set() and time.monotonic() < deadline:
        if store is None:
            with contextlib.suppress(RuntimeError, KeyError):  # rank 0 is not there yet
                store = PrefixStore(f"cifar_ignite/{env.restart_count}/join", _connect(timedelta(seconds=1)))
                store = PrefixStore(str(store.add(f"joins/{env.rank}", 1)), store)
                store.add("ranks", 1)
        joined.wait(0.2)
    if joined.is_set() or (store and not env.is_primary):
        return
    count = store.add("ranks", 0) if store else 0
    logger.critical(
        "waiting: %d of %d processes have joined; if you want a single process, unset %s",
        count,
        env.world_size,
        variable,
    )


def _connect(timeout: timedelta) -> TCPStore:
    """Return a client of the store at MASTER_ADDR and MASTER_PORT."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)


def _group_store(store: Store, env: DistEnv) -> Store:
    """Return a view of `store` for one process group: a process may join several times, in several attempts."""
    attempt = PrefixStore(f"cifar_ignite/{env.restart_count}", store)
    return PrefixStore(str(attempt.add(f"joins/{env.rank}", 1)), attempt)


def _destroy_process_group() -> None:
    with contextlib.suppress(RuntimeError):
        idist.finalize()


def _is_first_failure(store: Store) -> bool:
    try:
        return int(store.add("failures", 1)) == 1
    except RuntimeError:  # the rank that hosts the store is gone: it failed first
        return False


# --- Restarts by torchrun -----------------------------------------------------------------------------------------


def _agent_store(env: DistEnv) -> Store | None:
    """Return the store that torchrun keeps across restarts; None under another launcher."""
    if not dist.is_torchelastic_launched():
        return None
    store: Store
    store, _, _ = next(rendezvous("env://", rank=env.rank, world_size=env.world_size, timeout=TIMEOUT))
    return store.underlying_store if isinstance(store, PrefixStore) else store


def publish_run_dir(run_dir: Path, env: DistEnv) -> None:
    """Store the run directory for the processes that torchrun may restart."""
    if store := _agent_store(env):
        store.set(RUN_DIR_KEY, str(run_dir.resolve()))


def restarted_run_dir(env: DistEnv) -> str | None:
    """Return the run directory of the processes before a restart by torchrun; None if there was none."""
    store = _agent_store(env) if env.restart_count else None
    return store.get(RUN_DIR_KEY).decode() if store and store.check([RUN_DIR_KEY]) else None

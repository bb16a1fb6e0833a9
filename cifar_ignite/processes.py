"""Several processes that train one model: joining, agreeing, sharing memory, ending together.

All of it is torch.distributed by way of ignite.distributed: nccl between GPUs, gloo between CPUs. A process on its own
goes through none of it.
"""

import contextlib
import itertools
import logging
import os
import secrets
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store
from torch.nn.parallel import DistributedDataParallel

from cifar_ignite.config import InputError, RunFailedError, telling_of_memory
from cifar_ignite.data import Images
from cifar_ignite.engines import Forward
from cifar_ignite.launch import Launch, read_launch
from cifar_ignite.signals import Stopped

# A process that ends is noticed at once; this bounds the waiting for one that hangs, or downloads the data.
TIMEOUT = timedelta(minutes=10)
RUN_DIR_KEY = "cifar_ignite/run_dir"

logger = logging.getLogger(__name__)

# Where the hosts talk to each other without waiting for GPUs; None before they have joined.
_hosts: Any = None
# Of this process: it may train and then evaluate.
_joins = itertools.count()


# --- Joining and ending -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Launch | None]:
    """Join the processes that torchrun or SLURM has started; nothing happens in a process on its own.

    Yields:
        Which of the processes this is; None on its own.

    Raises:
        InputError: more processes on a machine than it has GPUs.
        RunFailedError: the processes do not find each other, or one of them ended. Its `is_first`, and that of an error
            raised inside, says whether this process was the first to fail, and so is the one to tell.
    """
    global _hosts
    launch = read_launch()
    if launch is None or idist.get_world_size() > 1:
        yield launch
        return
    if device.type == "cuda" and launch.local_rank >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        error = InputError(
            f"device: more processes than GPUs ({count}) on this machine; start one a GPU, or take device=cpu"
        )
        error.is_first = launch.local_rank == count
        raise error
    _join(device, launch)
    store = _get_default_store()
    try:
        with noticing_lost_processes(), telling_of_memory():
            _hosts = dist.new_group(backend="gloo", timeout=TIMEOUT)
            try:
                yield launch
            except Stopped:
                dist.barrier(_hosts)  # torchrun ends the others as soon as one has: first all must have saved
                raise
            dist.barrier(_hosts)
    except (InputError, RunFailedError) as error:
        error.is_first = _is_first_to_fail(store)
        if not getattr(error, "is_lost", False):
            _leave()
        raise
    except BaseException:
        _leave()
        raise
    _leave()


def _join(device: torch.device, launch: Launch) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        # Within a SLURM job Ignite would take SLURM's numbers, which are those of torchrun itself.
        os.environ.pop("SLURM_JOB_ID", None)
    try:
        if store := _job_store():
            # By itself torch would find, after a restart, where the processes before had been listening.
            store = PrefixStore(f"cifar_ignite/{launch.restarts}/{next(_joins)}", store)
            if device.type == "cuda":
                torch.cuda.set_device(launch.local_rank)
            dist.init_process_group(
                backend, store=store, rank=launch.rank, world_size=launch.processes, timeout=TIMEOUT
            )
            idist.sync()
        else:
            idist.initialize(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise RunFailedError(f"the processes do not find each other: {str(error).splitlines()[0]}") from None


def _leave() -> None:
    global _hosts
    _hosts = None
    with contextlib.suppress(RuntimeError):
        idist.finalize()


def _is_first_to_fail(store: Store) -> bool:
    try:
        return int(store.add("cifar_ignite/failures", 1)) == 1
    except RuntimeError:  # the process that kept the store is gone: it was the first
        return False


@contextlib.contextmanager
def noticing_lost_processes() -> Iterator[None]:
    """Turn the errors of a broken connection into one line.

    Raises:
        RunFailedError: another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        words = str(error).lower()
        is_lost = isinstance(error, dist.DistError) or "gloo" in words or "nccl" in words or "connection" in words
        if idist.get_world_size() == 1 or not is_lost:
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        lost = RunFailedError(f"another process of this run has ended, or its machine is out of reach ({reason})")
        lost.is_lost = True
        raise lost from None


# --- Agreeing -----------------------------------------------------------------------------------------------------


def agree(value: int) -> int:
    """The greatest of the values of all processes; no GPU is waited for."""
    greatest = torch.tensor(value)
    dist.all_reduce(greatest, dist.ReduceOp.MAX, group=_hosts)
    return int(greatest)


def same_for_all(text: str) -> str:
    """The text that the first process has."""
    return str(idist.broadcast(text, safe_mode=True)) if idist.get_world_size() > 1 else text


def copy_buffers(model: nn.Module) -> None:
    """Give each process the first one's buffers: statistics of BatchNorm, which each gathered from its own images."""
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)


def wrap(model: nn.Module, forward: Forward, device: torch.device, *, sync_batch_norm: bool) -> Forward:
    """The forward pass whose backward pass leaves the mean over processes in the gradients.

    Args:
        model: whose parameters these are; the first process's are copied to all.
        forward: through the model, compiled or not: what is compiled knows of this process alone.
        device: of the model.
        sync_batch_norm: BatchNorm normalises by the statistics of all processes' images.
    """
    module = _Forward(model, forward)
    options: dict[str, Any] = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    logging.getLogger("ignite.distributed.auto.auto_model").disabled = True  # each process would tell the terminal
    with warnings.catch_warnings():
        # torch 2.14 has renamed broadcast_buffers, which torch 2.11 knows alone.
        warnings.simplefilter("ignore", FutureWarning)
        if (
            device.type != idist.device().type
        ):  # a run on the CPU of a machine with GPUs: auto_model would move it there
            return DistributedDataParallel(module, **options)
        return idist.auto_model(module, sync_bn=sync_batch_norm, **options)


class _Forward(nn.Module):
    """A function through a model as a module, for DistributedDataParallel."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model, self.compute = model, forward

    def forward(self, images: Tensor) -> Tensor:
        return self.compute(images)


def collect(outputs: Sequence[Tensor], rows: Sequence[slice], count: int) -> Tensor:
    """The outputs of all images, (count, ...), of which this process has those of `rows`, in batches."""
    if idist.get_world_size() == 1:
        return torch.cat(list(outputs))
    whole = outputs[0].new_zeros(count, *outputs[0].shape[1:])
    for part, output in zip(rows, outputs, strict=True):
        whole[part] = output
    dist.all_reduce(whole)  # all others have zeros there
    return whole


class SummedMetrics:
    """Metrics of all processes, saved as those of one, so that any number of processes can go on with them."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self.metrics = metrics
        self._state: dict[str, dict[str, list[dict[str, Any]]]] = {}

    def gather(self) -> None:
        """Sum over the processes what `state_dict` then returns; to be called by all of them."""
        # Ignite saves the state of each process in a list under this name. This is the list of a single one.
        key = Metric._Metric__state_dict_key_per_rank  # type: ignore[attr-defined]
        self._state = {name: {key: [_sum_over_processes(metric)]} for name, metric in self.metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        return self._state


def attach_summing(
    trainer: Engine, metrics: Mapping[str, Metric], check: Callable[[], None]
) -> tuple[SummedMetrics, Callable[[], None]]:
    """What is to be saved of the metrics, and `check` with the summing that must come before each save."""
    summed = SummedMetrics(metrics)

    def check_and_sum() -> None:
        check()
        summed.gather()

    trainer.add_event_handler(Events.EPOCH_COMPLETED, summed.gather)
    return summed, check_and_sum


def _sum_over_processes(metric: Metric) -> dict[str, Any]:
    """The tensors and numbers in which a metric accumulates, as one process would have them."""
    own = {name: getattr(metric, name) for name in metric._state_dict_all_req_keys}
    return {
        name: idist.all_reduce(value.clone() if isinstance(value, Tensor) else value) for name, value in own.items()
    }


def restore_metric(metric: Metric, saved: Mapping[str, list[Any]]) -> None:
    """Give a metric what one process, or all of them together, had gathered; the first process takes it on.

    Args:
        metric: whose device the tensors are put on.
        saved: its state dict, with the state of one process; on any device.
    """

    def moved(state: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value.to(metric._device) if isinstance(value, Tensor) else value for name, value in state.items()}

    if idist.get_rank() == 0:
        # Ignite expects a state of each process, of which it takes its own.
        count = idist.get_world_size()
        metric.load_state_dict({key: [moved(state) for state in states] * count for key, states in saved.items()})


# --- Sharing memory -----------------------------------------------------------------------------------------------


def load_once(load: Callable[[], Sequence[Images]]) -> Sequence[Images]:
    """Sets of images that the first process of each machine loads, in memory that all processes there share.

    They go through a temporary file that is mapped by all and then has no name any more; it lies in TMPDIR.

    Raises:
        InputError: as `load` does, or the file cannot be written.
    """
    if idist.get_world_size() == 1:
        return load()
    path = Path(tempfile.gettempdir()) / f"cifar_ignite-{same_for_all(secrets.token_hex(8))}-{idist.get_node_rank()}"
    try:
        if idist.get_local_rank() == 0:
            _write_images(path, load())
        dist.barrier(_hosts)
        parts = torch.load(path, mmap=True, weights_only=True)
        dist.barrier(_hosts)
    finally:
        if idist.get_local_rank() == 0:
            path.unlink(missing_ok=True)
    return [Images(**part) for part in parts]


def _write_images(path: Path, parts: Sequence[Images]) -> None:
    try:
        with path.open("xb") as file:
            torch.save([vars(images) for images in parts], file)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        raise InputError(f"TMPDIR: cannot share the images through {path}: {str(error).splitlines()[0]}") from None


# --- Restarting ---------------------------------------------------------------------------------------------------


def _job_store() -> Store | None:
    """What torchrun keeps as long as the job lives, restarts included; None under another launcher."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def remember_run(run_dir: Path) -> None:
    """Tell the processes that torchrun may start in place of these which run is theirs."""
    if store := _job_store():
        store.set(RUN_DIR_KEY, str(run_dir.resolve()))


def remembered_run() -> str | None:
    """The run folder of the processes that were here before; None if they had none yet."""
    store = _job_store()
    return store.get(RUN_DIR_KEY).decode() if store and store.check([RUN_DIR_KEY]) else None

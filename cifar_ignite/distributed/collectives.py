"""Collectives over the processes of a run. All of them return their input at world size 1."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from ignite.metrics import Metric
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cifar_ignite.errors import InputError


def all_reduce_max(value: int, group: Any = None) -> int:
    """Return the largest `value` of all ranks; `group` on gloo does not wait for a GPU."""
    if idist.get_world_size() == 1:
        return value
    largest = torch.tensor(value)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return int(largest)


def check_interval(iterations: int) -> int:
    """Return how many iterations lie between checks that all ranks make together; a single process checks each time."""
    return 1 if idist.get_world_size() == 1 else iterations


def is_single_process() -> bool:
    """Return whether no other process takes part in the training."""
    return idist.get_world_size() == 1


def broadcast_from_rank0(create: Callable[[], str]) -> str:
    """Call `create` on rank 0 and return its result on all ranks."""
    text = create() if idist.get_rank() == 0 else None
    return str(text if idist.get_world_size() == 1 else idist.broadcast(text, safe_mode=True))


def check_same_images(fingerprint: str, group: Any = None) -> None:
    """Raise an InputError on all ranks if one of them has loaded other images than rank 0.

    Args:
        fingerprint: Fingerprint of this rank's images.
        group: Process group on gloo; None is the default group.
    """
    is_other = fingerprint != broadcast_from_rank0(lambda: fingerprint)
    if all_reduce_max(int(is_other), group):
        raise InputError(
            "data.root: the ranks loaded different images; the dataset must have the same files on all machines, "
            "and Pillow the same version"
        )


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Raise on all ranks, after the block, if one of them fails in it: the block must not contain a collective.

    Raises:
        InputError, OSError, RuntimeError: The error of this rank, or a RuntimeError about another one.
    """
    error: Exception | None = None
    try:
        yield
    except (InputError, OSError, RuntimeError) as caught:
        error = caught
    if idist.all_reduce(int(error is not None), "MAX"):
        raise error or RuntimeError("another process of this run failed")


def broadcast_state(module: nn.Module) -> None:
    """Copy rank 0's parameters and buffers to all ranks."""
    if idist.get_world_size() > 1:
        for value in module.state_dict().values():
            sent = value.contiguous()
            dist.broadcast(sent, src=0)
            value.copy_(sent)


def broadcast_buffers(model: nn.Module) -> None:
    """Copy rank 0's buffers to all ranks: BatchNorm statistics, which each rank gathers from its own images."""
    if idist.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def check_sync_batch_norm(device: torch.device) -> None:
    """Raise an InputError if BatchNorm cannot be synchronized between the ranks of this run."""
    if device.type == "cpu" and idist.get_world_size() > 1:
        raise InputError("train.sync_batch_norm: requires GPUs; set it to false")


def wrap_ddp(
    model: nn.Module, forward: Callable[[Tensor], Tensor], images: Tensor, *, sync_batch_norm: bool
) -> Callable[[Tensor], Tensor]:
    """Return a forward pass whose backward pass averages the gradients over the ranks.

    Args:
        model: Model that owns the parameters; those of rank 0 are copied to all ranks.
        forward: Forward pass through the model, compiled or not; compiled code covers this rank only.
        images: Batch on the device of the model for the passes below; its values have no effect.
        sync_batch_norm: Whether BatchNorm uses the statistics of the images of all ranks.
    """
    if idist.get_world_size() == 1:
        return forward
    ddp = _create_ddp(_ForwardModule(model, forward), images.device, sync_batch_norm)
    # DDP rebuilds its gradient buckets after the first backward pass, and the sum over three or more ranks depends on
    # their layout. So the first pass is made here, in a new run and in a resumed one.
    with unchanged_model(model):
        model.train()
        ddp(images).sum().backward()
    return ddp


@contextlib.contextmanager
def unchanged_model(model: nn.Module) -> Iterator[None]:
    """Restore the model's buffers, and delete its gradients, after passes that are not part of training."""
    saved_buffers = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        model.zero_grad()
        for buffer, saved in zip(model.buffers(), saved_buffers, strict=True):
            buffer.copy_(saved)


def _create_ddp(module: nn.Module, device: torch.device, sync_batch_norm: bool) -> nn.Module:
    options: dict[str, Any] = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    logging.getLogger("ignite.distributed.auto.auto_model").disabled = True  # every rank would log
    with warnings.catch_warnings():
        # torch 2.14 has renamed broadcast_buffers, the only name that torch 2.11 accepts.
        warnings.simplefilter("ignore", FutureWarning)
        if device.type != idist.device().type:  # a run on the CPU of a GPU machine: auto_model would move it to the GPU
            return DistributedDataParallel(module, **options)
        return idist.auto_model(module, sync_bn=sync_batch_norm, **options)


class _ForwardModule(nn.Module):
    """A forward pass as a module, as DistributedDataParallel requires."""

    def __init__(self, model: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.compute = model, forward

    def forward(self, images: Tensor) -> Tensor:
        return self.compute(images)


def gather_outputs(outputs: Sequence[Tensor], rows: Sequence[slice], count: int) -> Tensor:
    """Return the outputs for all images.

    Args:
        outputs: Outputs of this rank's batches, (B, ...) each.
        rows: Rows of each batch in the dataset.
        count: Images in the dataset.

    Returns:
        Tensor (count, ...).
    """
    if idist.get_world_size() == 1:
        return torch.cat(list(outputs))
    gathered = outputs[0].new_zeros(count, *outputs[0].shape[1:])
    for batch_rows, output in zip(rows, outputs, strict=True):
        gathered[batch_rows] = output
    dist.all_reduce(gathered)  # every row is zero on all other ranks
    return gathered


class SyncedMetrics:
    """The state of metrics, summed over the ranks, so that a checkpoint can be resumed with any world size.

    `gather` is a collective and must run on all ranks; `state_dict` is local, because only rank 0 saves.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self.metrics = metrics
        self._state: dict[str, dict[str, list[dict[str, Any]]]] = {}

    def gather(self) -> None:
        """Sum the state of the metrics over the ranks, for the next `state_dict`."""
        self._state = {name: _sum_over_ranks(metric.state_dict()) for name, metric in self.metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def restore(self, saved: Mapping[str, Any], device: torch.device) -> None:
        """Load a saved state on rank 0; the metrics of all other ranks stay empty, so that the sum is correct.

        Args:
            saved: What `state_dict` returned, with tensors on any device.
            device: Device of the metrics.
        """
        if idist.get_rank() == 0:
            for name, metric in self.metrics.items():
                ((key, (state,)),) = saved[name].items()
                moved = {k: _to_device(v, device) if isinstance(v, Tensor) else v for k, v in state.items()}
                # Ignite expects one state per rank, of which a rank loads its own.
                metric.load_state_dict({key: [moved] * idist.get_world_size()})


def _to_device(value: Tensor, device: torch.device) -> Tensor:
    """Return a value of a metric on the device that updates it: the host for float64, which MPS does not have."""
    return value.cpu() if value.dtype == torch.float64 else value.to(device)


def _sum_over_ranks(state_dict: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Return Ignite's state of a metric, a list of one dict per rank, with the ranks summed to one."""
    ((key, states),) = state_dict.items()
    if len(states) == 1:
        return {key: states}
    totals = {
        name: sum(state[name].cpu() if isinstance(state[name], Tensor) else state[name] for state in states)
        for name in states[0]
    }
    return {key: [totals]}

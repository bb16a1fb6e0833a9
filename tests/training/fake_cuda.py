"""Fake CUDA tensors: shapes, dtypes and devices without a GPU, and errors for what makes the host wait for one."""

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from ignite.engine import Engine, Events
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from cifar_ignite.augment import pipeline
from cifar_ignite.augment.elementwise import CACHED_TENSORS
from cifar_ignite.training import environment, muon
from tests.helpers.cuda_graphs import record_in_static_memory

aten = torch.ops.aten
CUDA = torch.device("cuda:0")
UNLIMITED = 10**9
# Operators that copy between devices.
COPIES = (aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default)
# Operators on lists of tensors, whose devices FakeTensorMode does not compare.
LIST_OPERATORS = (
    "aten::_foreach_lerp",
    "aten::_foreach_add",
    "aten::_foreach_mul",
    "aten::_amp_foreach",
    "aten::_fused",
)


class HostSyncError(AssertionError):
    """The host waits for the device."""


class HostCopyError(AssertionError):
    """Data is copied from the host to the device."""


class FakeCuda(FakeTensorMode):
    """Runs operators on CPU tensors as usual, and operators on CUDA tensors without data.

    FakeTensorMode raises if an operator mixes devices, or if the shape of its result depends on values. This mode also
    raises if the host reads a value or an operator waits for one, and if data is copied, unless that is allowed.

    Checked with torch 2.11 and 2.14; torch documents FakeTensorMode but exports it from a private module only.

    Attributes:
        kind: Type of the devices without data.
        reads_allowed: Whether the host may read from the device; all values are 0.
        copies_left: Number of copies to the device that are still allowed.
    """

    kind = "cuda"
    avoid_device_init = True  # also on a machine with a GPU

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.allow()

    def forbid(self, *, reads: bool = True, copies_left: int = 0) -> None:
        """Forbid reads and copies.

        Args:
            reads: Whether reads are forbidden.
            copies_left: Number of copies that are still allowed.
        """
        self.reads_allowed, self.copies_left = not reads, copies_left

    def allow(self) -> None:
        """Allow reads and copies."""
        self.reads_allowed, self.copies_left = True, UNLIMITED

    def __deepcopy__(self, memo: dict[int, Any]) -> "FakeCuda":
        return self  # fake tensors refer to their mode, and attach_ema copies a model

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        target = torch.device(kwargs.get("device") or (tensors[0].device if tensors else "cpu")).type
        if target == "cpu" and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and func.namespace == "aten":
            with self:  # operators that consist of others arrive undivided in this mode
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        self.check_operator(func, tensors, args)
        if func is aten._local_scalar_dense.default:
            self._check_read(func)
            return torch.zeros((), dtype=args[0].dtype).item()
        kinds = {tensor.device.type for tensor in tensors} if func in COPIES else set()
        if target == "cpu" and self.kind in kinds:
            self._check_read(func)
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if target == self.kind and "cpu" in kinds:
            self._check_copy(func)
        if func.name().startswith("aten::_fused_sgd_"):  # torch cannot run it without data
            return None
        return super().__torch_dispatch__(func, types, args, kwargs)

    def check_operator(self, func: Any, tensors: list[Tensor], args: Any) -> None:
        """Raise if an operator fails on such a device, or waits for it, where FakeTensorMode does not notice it."""
        check_operator(func, tensors, args)

    def _check_read(self, func: Any) -> None:
        if not self.reads_allowed:
            raise HostSyncError(f"{func} reads from the device")

    def _check_copy(self, func: Any) -> None:
        self.copies_left -= 1
        if self.copies_left < 0:
            raise HostCopyError(f"{func} copies to the device")


FakeMode = TypeVar("FakeMode", bound=FakeCuda)


def check_operator(func: Any, tensors: list[Tensor], args: Any) -> None:
    """Raise if an operator would wait for the device, or mixes devices, where FakeTensorMode does not notice it."""
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        check_indices(args)
    if func is aten._linalg_check_errors.default:
        raise HostSyncError(f"{func} reads from the device")
    if func.name().startswith(LIST_OPERATORS):
        check_devices(func, tensors)


def check_devices(func: Any, tensors: list[Tensor]) -> None:
    """Raise if tensors are on different devices."""
    if len(devices := sorted({str(tensor.device) for tensor in tensors})) > 1:
        raise HostCopyError(f"{func} of tensors on {' and '.join(devices)}")


def check_indices(args: Any) -> None:
    """Raise if indexing waits for the device: for the positions in a mask, or to copy indices from the CPU.

    Args:
        args: Arguments of the operator: tensor, indices, and for a write the values. A single number is written where a
            mask is true without waiting, because torch dispatches to masked_fill.
    """
    indices = [index for index in args[1] if index is not None]
    if any(index.device != args[0].device for index in indices):
        raise HostSyncError("indices on another device than the tensor")
    is_fill = len(args) > 2 and args[2].device.type == "cpu" and args[2].numel() == 1
    if not is_fill and any(index.dtype == torch.bool for index in indices):
        raise HostSyncError("a mask as index: the number of its positions is read from the device")


def set_zero_gradients(loss: Tensor) -> None:
    """Replace `Tensor.backward`: autograd's engine has one thread per real device."""
    nodes, visited = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        nodes += [next_node for next_node, _ in node.next_functions]
        if hasattr(node, "variable"):
            node.variable.grad = torch.zeros_like(node.variable)


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Let torch find a GPU inside the block, with fake tensors on it."""
    with (
        patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        patch.object(pipeline, "record_cuda_graph", record_in_static_memory),
        patch.object(muon, "record_cuda_graph", record_in_static_memory),
        fake_device(FakeCuda()) as mode,
    ):
        yield mode


@contextlib.contextmanager
def fake_device(mode: FakeMode) -> Iterator[FakeMode]:
    """Use fake tensors of `mode` inside the block, with gradients of zero; the device has a name."""
    with (
        patch.object(Tensor, "backward", set_zero_gradients),
        patch.object(environment, "device_name", lambda device: "fake GPU"),
    ):
        CACHED_TENSORS.clear()
        try:
            with mode:
                yield mode
        finally:
            CACHED_TENSORS.clear()


def forbid_waiting(engine: Engine, mode: FakeCuda, log_every: int = UNLIMITED) -> None:
    """Forbid copies after the first iteration, and reads in all iterations but every `log_every`-th; attach last.

    The order of the images is copied to the device once per epoch. Between epochs, everything is allowed.
    """

    def forbid(engine: Engine) -> None:
        completed, length = engine.state.iteration, engine.state.epoch_length or 1
        copies_left = UNLIMITED if completed == 0 else int(completed % length == 0)
        mode.forbid(reads=(completed + 1) % log_every != 0, copies_left=copies_left)

    def allow(engine: Engine) -> None:
        if engine.state.iteration % (engine.state.epoch_length or 1) == 0:
            mode.allow()

    engine.add_event_handler(Events.GET_BATCH_STARTED, forbid)
    engine.add_event_handler(Events.ITERATION_COMPLETED, allow)

"""Functions recorded as CUDA graphs.

At the size of these models, launching the operators of a function takes the host longer than their arithmetic takes a
GPU. A CUDA graph launches all of them at once, with the same results.
"""

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor

from cifar_ignite.errors import TrainingError, first_line

TensorFunction = Callable[..., Tensor]

logger = logging.getLogger(__name__)


def record_cuda_graph(function: TensorFunction, *inputs: Tensor) -> TensorFunction:
    """Return `function` as one launch on a CUDA GPU, and unchanged on any other device.

    Random numbers come from the global generator, in the state that it has at each call. Nothing in the function may
    read from the device or depend on anything but its inputs and tensors that stay where they are. It is called several
    times while it is recorded. If that fails, a warning is logged, and the function is returned unchanged.

    Record after torch.compile has recorded its own graphs: it then frees the memory in which cuBLAS works, also that of
    earlier graphs.

    Args:
        function: Function of tensors that returns a tensor and needs no gradients.
        inputs: Tensors like those of all later calls: same devices, shapes and dtypes.

    Raises:
        TrainingError: If the device is unusable after a failure.
    """
    device = inputs[0].device
    if device.type != "cuda":
        return function
    stream = torch.cuda.current_stream(device)
    try:
        # Later inputs are copied to this memory.
        memory = tuple(tensor.clone() for tensor in inputs)
        with torch.no_grad(), torch.random.fork_rng([device]), _without_garbage_collection():
            graph = cast(TensorFunction, torch.cuda.make_graphed_callables(function, memory))
    except RuntimeError as error:
        logger.warning("no CUDA graph (%s): operators are launched one by one", first_line(error))
        _leave_recording(stream, error)
        return function
    # A graph writes its result to the same memory each time.
    return lambda *tensors: graph(*tensors).clone()


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Collect garbage now and not within the block: destroying a graph of an earlier training ends a recording."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _leave_recording(stream: torch.cuda.Stream, error: RuntimeError) -> None:
    """Return to a stream after a failed recording, which torch may leave on its own stream and generator.

    Raises:
        TrainingError: If random numbers cannot be drawn any more.
    """
    try:
        torch.cuda.set_stream(stream)
        torch.cuda.empty_cache()
        with torch.random.fork_rng([stream.device]):  # the batch draws the numbers that it would draw without a failure
            torch.rand((), device=stream.device)
    except RuntimeError:
        raise TrainingError(f"recording a CUDA graph failed ({first_line(error)}); use compile=off") from None

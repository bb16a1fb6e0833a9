"""Functions recorded as CUDA graphs.

At the size of these models, launching the operators of a function takes the host longer than their arithmetic takes a
GPU. A CUDA graph launches all of them at once, with the same results.
"""

import logging
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from cifar_ignite.errors import first_line

TensorFunction = Callable[..., Tensor]

logger = logging.getLogger(__name__)


def record_cuda_graph(function: TensorFunction, *inputs: Tensor) -> TensorFunction:
    """Return `function` as one launch on a CUDA GPU, and unchanged on any other device.

    Random numbers come from the global generator, whose seed is that of each call. Nothing in the function may read
    from the device or depend on anything but its inputs and tensors that stay where they are. It is called several
    times while it is recorded. If that fails, a warning is logged, and the function is returned unchanged.

    Args:
        function: Function of tensors that returns a tensor and needs no gradients.
        inputs: Tensors like those of all later calls: same devices, shapes and dtypes.
    """
    if inputs[0].device.type != "cuda":
        return function
    try:
        with torch.no_grad():
            # Later inputs are copied to it.
            memory = tuple(tensor.clone() for tensor in inputs)
            graph = cast(TensorFunction, torch.cuda.make_graphed_callables(function, memory))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        logger.warning("no CUDA graph (%s): operators are launched one by one", first_line(error))
        return function
    # A graph writes its result to the same memory each time.
    return lambda *tensors: graph(*tensors).clone()

"""The forward pass: autocast, test-time augmentation (TTA), and compilation for training."""

import gc
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_ignite.augment.elementwise import memory_format
from cifar_ignite.config import Config
from cifar_ignite.data.loaders import TrainLoader, shard_slice
from cifar_ignite.distributed.collectives import is_single_process, unchanged_model
from cifar_ignite.errors import TrainingError, first_line

Forward = Callable[[Tensor], Tensor]
TTA_MODES = ("flip", "shift")

# Iterations of a training above which compilation is worth it: on a CPU and an H100, it saves time after 300 to 2,900,
# depending on what Inductor's cache contains (docs/results/profile.md).
MIN_COMPILED_ITERATIONS = 2_000

logger = logging.getLogger(__name__)


def create_forward(
    model: nn.Module, device: torch.device, amp_dtype: torch.dtype, *, compiled_batch: int = 0
) -> Forward:
    """Return the model as a function from images to float32 logits, under autocast to `amp_dtype`.

    Args:
        model: Model.
        device: Device of the model.
        amp_dtype: Dtype of convolutions and matrix products; float32 disables autocast.
        compiled_batch: Size of the batches that go through torch.compile; all others, such as the smaller last batch of
            an epoch, run eagerly. 0 compiles nothing.

    Raises:
        TrainingError: If torch.compile does not support this version of Python.
    """
    compiled = _compile_model(model, device) if compiled_batch else model

    def forward(images: Tensor) -> Tensor:
        network = compiled if len(images) == compiled_batch else model
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
            return network(images).float()

    return forward


def create_tta_forward(forward: Forward, tta: str) -> Forward:
    """Return a forward pass that averages the logits over several views of each image.

    Args:
        forward: Forward pass of the model.
        tta: "flip": The image and its horizontal flip, with equal weights. "shift": These two with half of the weight,
            and with the other half both of them shifted by one pixel up and left, and down and right, with reflection
            padding (as in Jordan, 2024, arXiv:2404.00498).
    """

    def flip(images: Tensor) -> Tensor:
        return (forward(images) + forward(images.flip(-1))) / 2

    def shift(images: Tensor) -> Tensor:
        padded = F.pad(images, [1] * 4, mode="reflect")
        height, width = images.shape[-2:]
        up_left, down_right = padded[..., 2:, 2:], padded[..., :height, :width]
        return flip(images) / 2 + (flip(up_left) + flip(down_right)) / 4

    return {"flip": flip, "shift": shift}[tta]


def should_compile(config: Config, device: torch.device, iterations: int) -> bool:
    """Return whether the training pass is compiled: if requested, or by "auto" in a long training.

    A decaying drop probability would recompile every epoch; SyncBatchNorm communicates with other ranks, which may
    still be compiling. "auto" leaves out what has not been measured: Apple GPUs, and CUDA graphs in distributed runs.
    """
    if config.train.drop_path_decay_fraction or config.train.sync_batch_norm or config.compile == "off":
        return False
    is_measured = device.type == "cpu" or (device.type == "cuda" and is_single_process())
    return config.compile == "on" or (is_measured and iterations >= MIN_COMPILED_ITERATIONS)


def forget_earlier_runs(device: torch.device) -> None:
    """Discard what earlier runs in this process have left.

    Compiled code counts towards Dynamo's limit of recompilations, after which nothing is compiled, without a message.
    The objects of a run refer to each other, so they keep the memory of a GPU until garbage is collected.
    """
    if device.type != "cpu":  # it takes 0.2 s
        gc.collect()
    if "torch._dynamo" in sys.modules:  # importing it takes a second
        torch.compiler.reset()


def uses_cuda_graphs(config: Config, device: torch.device) -> bool:
    """Return whether functions are recorded as CUDA graphs; see `should_compile` for distributed runs."""
    return device.type == "cuda" and config.compile != "off" and is_single_process()


def create_training_forward(config: Config, model: nn.Module, loader: TrainLoader, amp_dtype: torch.dtype) -> Forward:
    """Return the forward pass of training, compiled and warmed up if the configuration requests it.

    Raises:
        TrainingError: If compilation fails and was requested (compile="on").
    """
    device = loader.images.device
    eager = create_forward(model, device, amp_dtype)
    iterations = config.train.epochs * len(loader)
    if loader.batch_size > len(loader.images) or not should_compile(config, device, iterations):
        return eager
    rows = shard_slice(loader.batch_size, loader.shard)
    size = rows.stop - rows.start
    images = zero_images(loader, size)
    try:
        compiled = create_forward(model, device, amp_dtype, compiled_batch=size)
        logger.info("compiled in %.0f s", warmup_compiled_forward(model, compiled, images))
    except TrainingError as error:
        if config.compile == "on":
            raise
        logger.warning("%s; continuing without compilation", error)
        return eager
    return compiled


def zero_images(loader: TrainLoader, count: int) -> Tensor:
    """Return images for passes that are not part of training: zeros, float (count, 3, H, W)."""
    images = torch.zeros(count, *loader.images.shape[1:], device=loader.images.device)
    return images.contiguous(memory_format=memory_format(images.device))


def _compile_model(model: nn.Module, device: torch.device) -> Forward:
    """Return the model through torch.compile; on a GPU, its kernels are launched as one CUDA graph.

    Inductor may choose the order of sums by measurement, differently in each process, unless it is deterministic.
    """
    options: dict[str, Any] | None = (
        {"triton.cudagraphs": True, "deterministic": True} if device.type == "cuda" else None
    )
    try:
        # Not in place (nn.Module.compile): the model stays eager for other batch sizes and for its state dict.
        graph = torch.compile(model, dynamic=False, options=options)
    except RuntimeError as error:  # this version of Python is not supported
        raise _compile_error(error) from None
    if options is None:
        return graph

    def replay(images: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        # A graph writes its output to the same memory each time.
        return graph(images).clone()

    return replay


def warmup_compiled_forward(model: nn.Module, forward: Forward, images: Tensor) -> float:
    """Compile `forward` by training passes on `images`, and restore the model's buffers and gradients.

    Returns:
        Seconds that it took.

    Raises:
        TrainingError: If compilation fails; the model is unchanged.
    """
    started = time.monotonic()
    try:
        with unchanged_model(model):
            model.train()
            for _ in range(3):  # a CUDA graph is recorded in the second pass
                model.zero_grad()  # gradients of a pass lie in memory that the next pass overwrites
                forward(images).sum().backward()
    except Exception as error:  # the compilers, of torch and of the system, raise nearly anything
        raise _compile_error(error) from None
    return time.monotonic() - started


def _compile_error(error: Exception) -> TrainingError:
    return TrainingError(f"torch.compile failed ({first_line(error)}); use compile=off")

"""The training and evaluation steps as Ignite Engines.

The training step is the same few lines whatever hangs on it: clipping, schedules, metrics and saving are handlers
(handlers.py). Steps return tensors on the device and never wait for it.
"""

import time
from collections.abc import Callable

import torch
from ignite.engine import Engine, EventEnum, Events
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from cifar_ignite.config import InputError, RunFailedError

LossFn = Callable[[Tensor, Tensor], Tensor]
Forward = Callable[[Tensor], Tensor]

# Iterations of a CPU training after which compiling has paid (benchmarks/PROFILE.md). On a GPU auto leaves it off.
COMPILE_PAYS_AFTER = 2_000


class TrainingEvents(EventEnum):
    """What a training step fires beside Ignite's own events."""

    BACKWARD_COMPLETED = "backward_completed"
    """Gradients are there, the optimizer has not used them yet."""


def select_device(name: str) -> torch.device:
    """auto is the GPU if there is one. On a GPU, repeatable algorithms are asked for."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device: no CUDA GPU is available to torch here; take device=auto or device=cpu")
    torch.backends.cudnn.deterministic = True
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def select_precision(name: str, device: torch.device) -> torch.dtype:
    """The type that convolutions and matrix products compute in; auto is bf16 where the device has instructions for it.

    Everything that is summed over many values (BatchNorm's statistics, the loss, the update) stays float32.
    """
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # torch.cpu.get_capabilities is the public way, but torch 2.11 has only these.
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def create_forward(
    model: nn.Module, device: torch.device, precision: torch.dtype, *, compiled_batch: int = 0
) -> Forward:
    """The model as a function from images to float32 logits, computed by torch.autocast in `precision`.

    Args:
        compiled_batch: batches of this size go through torch.compile (see `compile_model`), all others, such as the
            smaller last one of an epoch, through the model as it is; 0 compiles nothing.
    """
    compiled = compile_model(model, device) if compiled_batch else model

    def forward(images: Tensor) -> Tensor:
        network = compiled if len(images) == compiled_batch else model
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            return network(images).float()

    return forward


def pays_to_compile(name: str, device: torch.device, iterations: int) -> bool:
    """auto compiles where that was measured to pay: on a CPU, once a training is long enough to win the time back."""
    return name == "on" or (name == "auto" and device.type == "cpu" and iterations >= COMPILE_PAYS_AFTER)


def compile_model(model: nn.Module, device: torch.device) -> Forward:
    """The model through torch.compile; on a GPU its kernels are launched as one CUDA graph."""
    # Not in place (nn.Module.compile): the model itself stays as it is for other batch sizes, and its state dict too.
    if device.type != "cuda":
        return torch.compile(model, dynamic=False)
    graph = torch.compile(model, dynamic=False, mode="reduce-overhead")

    def replay(images: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        # A graph writes its output to the same memory each time.
        return graph(images).clone()

    return replay


def warm_up(model: nn.Module, forward: Forward, images: Tensor) -> float:
    """Have `forward` compiled by training passes on `images` that leave no trace in the model.

    Returns:
        The seconds that it took.

    Raises:
        RunFailedError: compilation fails; the model is as it was.
    """
    buffers = [buffer.clone() for buffer in model.buffers()]
    started = time.monotonic()
    try:
        model.train()
        for _ in range(3):  # a CUDA graph is recorded in the second pass
            model.zero_grad()  # gradients of the pass before lie in memory that the next one takes
            forward(images).sum().backward()
    except Exception as error:  # the compilers, of torch and of the system, raise nearly anything
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RunFailedError(f"torch.compile fails here ({reason}); take compile=off") from None
    finally:
        model.zero_grad()
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    return time.monotonic() - started


def create_trainer(
    model: nn.Module, forward: Forward, optimizer: Optimizer, loss_fn: LossFn, scaler: GradScaler
) -> Engine:
    """An engine whose step does one update on (images, targets).

    Args:
        model: is put into training mode.
        forward: images to logits, through the model.
        optimizer: of the model's parameters.
        loss_fn: of logits and targets.
        scaler: lifts fp16 gradients above underflow; a disabled one does nothing.

    Its output is (logits, targets): float (B, num_classes) each, on the device, detached.
    """

    def train_step(engine: Engine, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, targets = batch
        optimizer.zero_grad()
        logits = forward(images)
        scaler.scale(loss_fn(logits, targets)).backward()
        scaler.unscale_(optimizer)
        engine.fire_event(TrainingEvents.BACKWARD_COMPLETED)
        scaler.step(optimizer)
        scaler.update()
        return logits.detach(), targets

    trainer = Engine(train_step)
    trainer.register_events(*TrainingEvents)
    # Once an epoch, since validation comes between two: a walk over all modules costs as much as a launch of kernels.
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda: model.train())
    return trainer


def weigh(loss_fn: LossFn, weight: Callable[[], float]) -> LossFn:
    """The loss of one process's part of a batch, multiplied by a weight that is asked for each time; 0 without images.

    Also without images it is a function of the logits, so that a gradient, of zeros, reaches all parameters.
    """

    def weighed(logits: Tensor, targets: Tensor) -> Tensor:
        return (loss_fn(logits, targets) if len(logits) else logits.sum()) * weight()

    return weighed


def create_evaluator(model: nn.Module, forward: Forward) -> Engine:
    """An engine whose step returns (logits, labels): float (B, num_classes) and int64 (B,) or None, on the device."""

    @torch.inference_mode()
    def evaluate_step(engine: Engine, batch: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        images, labels = batch
        return forward(images), labels

    evaluator = Engine(evaluate_step)
    evaluator.add_event_handler(Events.STARTED, lambda: model.eval())
    return evaluator

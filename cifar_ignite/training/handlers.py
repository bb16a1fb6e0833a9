"""Handlers of training: each function attaches one behavior.

Ignite calls the handlers of one event in the order in which they were attached; `state.attach_handlers` is that order.
"""

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.ops import StochasticDepth

from cifar_ignite.checkpointing.run_record import EpochMetrics, RunRecord
from cifar_ignite.config import TrainConfig
from cifar_ignite.data.loaders import EvalLoader
from cifar_ignite.distributed.collectives import all_reduce_max, broadcast_buffers, check_interval
from cifar_ignite.errors import NonFiniteError
from cifar_ignite.training.device import device_check_interval, skips_updates
from cifar_ignite.training.engines import TrainingEvents
from cifar_ignite.training.metrics import EpochTimer
from cifar_ignite.training.signals import StopFlag

logger = logging.getLogger(__name__)


# --- Within an iteration ------------------------------------------------------------------------------------------


def attach_peer_check(trainer: Engine, check_every: int, group: Any) -> None:
    """Check that all ranks are alive before the host reads the gradient; attach before the gradient checks.

    `group`, on the CPU, notices a lost rank at once; reading the gradient would wait for an all-reduce that never ends.
    """

    def check(engine: Engine) -> None:
        iteration = engine.state.iteration
        if iteration % check_every == 0 or iteration % (engine.state.epoch_length or 1) == 0:
            all_reduce_max(0, group)

    trainer.add_event_handler(TrainingEvents.BACKWARD_COMPLETED, check)


def attach_grad_clipping(
    trainer: Engine, model: nn.Module, optimizer: Optimizer, scaler: GradScaler, options: TrainConfig
) -> Callable[[], None]:
    """Clip the global norm of the gradient, and skip updates with a gradient that is not finite.

    A fused optimizer skips its update on the device if its `found_inf` is set (as torch's GradScaler does), so nothing
    waits for the device; the host checks every `log_every` iterations on a CUDA GPU, and at the end of an epoch. On a
    CPU, and on MPS, where optimizers cannot skip an update, it checks before every update.

    Args:
        trainer: Engine of `create_trainer`.
        model: Model whose gradient is clipped.
        optimizer: Fused optimizer of the model.
        scaler: Gradient scaler; an enabled one finds its scale by trial and skips overflows, so training stops only if
            the gradient still overflows at a scale of 1.
        options: `clip_grad_norm`, the largest 2-norm (None does not clip), and `log_every`.

    Returns:
        Function that checks now; to be called before a checkpoint is saved.

    Raises:
        NonFiniteError: If a gradient was not finite; raised by the trainer's `run`, with the iteration and the learning
            rate. The weights are those before it.
    """
    parameters = list(model.parameters())
    device = parameters[0].device
    max_norm, check_every = options.clip_grad_norm, device_check_interval(device, options.log_every)
    # Iteration and learning rate of the first gradient that was not finite; 0 while there is none. MPS has no float64.
    first_iteration = torch.zeros((), dtype=torch.int64, device=device)
    first_lr = torch.zeros((), device=device)

    def clip_and_flag(engine: Engine) -> None:
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if max_norm:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        is_non_finite = ~(norm < math.inf)  # also true for NaN
        if skips_updates(device):
            optimizer.found_inf = is_non_finite.float()  # type: ignore[attr-defined]
        if scaler.is_enabled():  # only overflows without a finite gradient in between count
            first_iteration.mul_(is_non_finite)
        is_first = is_non_finite & (first_iteration == 0)
        first_iteration.masked_fill_(is_first, engine.state.iteration)
        first_lr.masked_fill_(is_first, optimizer.param_groups[0]["lr"])
        if engine.state.iteration % check_every == 0:
            raise_if_non_finite()

    def raise_if_non_finite() -> None:
        iteration = int(first_iteration)
        if iteration and scaler.get_scale() <= 1:
            epoch = math.ceil(iteration / (trainer.state.epoch_length or 1))
            lr = float(first_lr)
            raise NonFiniteError(f"the gradient is not finite at epoch {epoch}, iteration {iteration}, lr {lr:.3g}")

    trainer.add_event_handler(TrainingEvents.BACKWARD_COMPLETED, clip_and_flag)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, raise_if_non_finite)
    return raise_if_non_finite


def attach_ema(trainer: Engine, model: nn.Module, decay: float) -> nn.Module:
    """Update an exponential moving average of weights and BatchNorm statistics after each iteration.

    After n iterations the decay is min(decay, (1 + n) / (10 + n)), so that the initial weights have little effect (as
    in tf.train.ExponentialMovingAverage). Only the average itself has to be saved. The statistics are averaged like the
    weights, because copied ones would belong to other weights.

    Ignite's EMAHandler updates tensor by tensor; on a GPU, launching that takes longer than many training steps.

    Returns:
        EMA model, in evaluation mode.
    """
    ema_model = copy.deepcopy(model).eval().requires_grad_(False)
    pairs = zip(ema_model.state_dict().values(), model.state_dict().values(), strict=True)
    averaged, current = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)

    def update(engine: Engine) -> None:
        n = engine.state.iteration
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, None)

    trainer.add_event_handler(Events.ITERATION_COMPLETED, update)
    return ema_model


# --- At the start or the end of an epoch --------------------------------------------------------------------------


def attach_drop_path_decay(trainer: Engine, model: nn.Module, fraction: float, epochs: int) -> None:
    """Decay the drop probabilities of stochastic depth linearly, per epoch, over the last `fraction` of `epochs`."""
    if not fraction:
        return
    layers = [(module, module.p) for module in model.modules() if isinstance(module, StochasticDepth)]

    def decay(engine: Engine) -> None:
        remaining = epochs - engine.state.epoch + 1
        for layer, drop_prob in layers:
            layer.p = drop_prob * min(1, remaining / (fraction * epochs))

    trainer.add_event_handler(Events.EPOCH_STARTED, decay)


def attach_buffer_broadcast(trainer: Engine, model: nn.Module) -> None:
    """Copy rank 0's BatchNorm statistics to all ranks at the end of each epoch."""
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: broadcast_buffers(model))


def attach_validation(trainer: Engine, evaluator: Engine, val_loader: EvalLoader, optimizer: Optimizer) -> None:
    """Run the evaluator after each epoch.

    Raises:
        NonFiniteError: If the validation loss is not finite: weights have overflowed, and their accuracy means nothing.
    """

    def validate(engine: Engine) -> None:
        loss = evaluator.run(val_loader).metrics["loss"]
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the validation loss is not finite at epoch {engine.state.epoch}, iteration {engine.state.iteration}, "
                f"lr {optimizer.param_groups[0]['lr']:.3g}"
            )

    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)


def attach_history(
    trainer: Engine, evaluator: Engine | None, optimizer: Optimizer, record: RunRecord, timer: EpochTimer
) -> None:
    """Append the metrics of each epoch to the record's history: one row of metrics.csv.

    Args:
        trainer: Engine with training metrics.
        evaluator: Engine with validation metrics; None without validation.
        optimizer: Optimizer with the learning rate.
        record: Record with the history.
        timer: Timer of the epoch.
    """

    def append(engine: Engine) -> None:
        val = evaluator.state.metrics if evaluator else {"loss": None, "accuracy": None}
        metrics: EpochMetrics = {
            "epoch": engine.state.epoch,
            "train_loss": engine.state.metrics["loss"],
            "train_acc": engine.state.metrics["accuracy"],
            "val_loss": val["loss"],
            "val_acc": val["accuracy"],
            "lr": optimizer.param_groups[0]["lr"],
            "seconds": timer.seconds,
            "images_per_second": timer.images_per_second,
        }
        record.history.append(metrics)

    trainer.add_event_handler(Events.EPOCH_COMPLETED, append)


def create_early_stopping(trainer: Engine, record: RunRecord, patience: int) -> EarlyStopping:
    """Return Ignite's handler that stops after `patience` epochs without a higher validation accuracy."""
    stopping = EarlyStopping(patience, score_function=lambda _: record.val_acc, trainer=trainer)
    stopping.logger.setLevel(logging.WARNING)  # it would print to the terminal but not to training.log
    return stopping


def attach_early_stopping(trainer: Engine, stopping: EarlyStopping) -> None:
    """Check after each epoch, after the history was appended.

    A plain handler, because `EarlyStopping.attach` resets the count whenever the engine starts, also on resuming.
    """

    def stop(engine: Engine) -> None:
        stopping(engine)
        if trainer.should_terminate:
            logger.info("early stopping: no higher validation accuracy for %d epochs", stopping.patience)

    trainer.add_event_handler(Events.EPOCH_COMPLETED, stop)


# --- Stopping -----------------------------------------------------------------------------------------------------


def attach_stop_check(trainer: Engine, evaluator: Engine | None, flag: StopFlag, check_every: int) -> None:
    """Stop between two iterations, of training or of validation, after a signal.

    Args:
        trainer: Engine of training.
        evaluator: Engine of validation, if there is one.
        flag: Flag that signals set.
        check_every: Iterations between checks of several ranks; a single process checks after each one.

    Raises:
        StopRequested: If a signal was received; raised by the trainer's `run`.
    """
    event = Events.ITERATION_COMPLETED(every=check_interval(check_every))
    for engine in (trainer, evaluator):
        if engine:
            engine.add_event_handler(event, flag.raise_if_set)

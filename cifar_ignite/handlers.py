"""What hangs on the engines: each function attaches one behaviour.

Ignite calls the handlers of one event in the order they were attached: the order in `train.fit` is that of the events.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping, LRScheduler
from ignite.metrics import Accuracy, Loss, Metric
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torchvision.ops import StochasticDepth

from cifar_ignite.checkpoints import Row, RunRecord
from cifar_ignite.config import RunFailedError, ScheduleConfig
from cifar_ignite.engines import LossFn, TrainingEvents
from cifar_ignite.loader import EvalLoader
from cifar_ignite.signals import StopFlag

logger = logging.getLogger(__name__)


class NonFiniteError(RunFailedError):
    """The gradient became infinite or NaN; the weights are those before it."""


# --- Within an iteration ------------------------------------------------------------------------------------------


def attach_schedule(trainer: Engine, optimizer: Optimizer, schedule: ScheduleConfig, iterations: int) -> LRScheduler:
    """Set the learning rate of each iteration, from the first on.

    onecycle: torch's OneCycleLR (Smith and Topin, 2017, arXiv:1708.07120), cosine up and cosine down.
    cosine: linear warm-up, then SGDR's cosine (Loshchilov and Hutter, 2016, arXiv:1608.03983) without restarts.
    linear: linear warm-up, then linear.

    Args:
        trainer: its iterations are counted.
        optimizer: the learning rate of each of its groups is set, which now is the highest that it gets.
        schedule: the shape.
        iterations: of the whole training.

    The rate is a function of the iteration alone: nothing of it is saved, `set_schedule` resumes it.

    Returns:
        The handler around the torch schedule.
    """
    if schedule.name == "onecycle":
        # OneCycleLR divides by the warm-up's iterations less one, so one iteration is taken as a trifle more.
        warmup = schedule.warmup_fraction * (1 + 1e-9 * (schedule.warmup_fraction * iterations == 1))
        torch_schedule: Any = OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=iterations,
            pct_start=warmup,
            div_factor=schedule.div_factor,
            final_div_factor=schedule.final_div_factor,
            cycle_momentum=False,
        )
    else:
        torch_schedule = LambdaLR(optimizer, lambda iteration: lr_factor(iteration, iterations, schedule))
    handler = LRScheduler(torch_schedule)
    trainer.add_event_handler(Events.ITERATION_STARTED, handler)
    return handler


def set_schedule(handler: LRScheduler, iteration: int) -> None:
    """Put the schedule, and the optimizer's learning rate, where they are after so many iterations."""
    if iteration:
        handler.lr_scheduler.last_epoch = iteration - 1
        handler(None)


def lr_factor(iteration: int, iterations: int, schedule: ScheduleConfig) -> float:
    """Share of the peak learning rate at `iteration` (from 0): linear warm-up, then half a cosine or a line."""
    start = 1 / schedule.div_factor
    end = start / schedule.final_div_factor
    warmup = schedule.warmup_fraction * iterations
    if iteration < warmup:
        return start + (1 - start) * iteration / warmup
    left = 1 - (iteration - warmup) / (iterations - warmup)
    return end + (1 - end) * (left if schedule.name == "linear" else (1 - math.cos(math.pi * left)) / 2)


def attach_gradient_guard(
    trainer: Engine,
    model: nn.Module,
    optimizer: Optimizer,
    scaler: GradScaler,
    max_norm: float | None,
    check_every: int,
) -> Callable[[], None]:
    """Clip the global gradient norm, and make no update with a gradient that is not finite.

    A fused optimizer skips its update on the device when its `found_inf` is set (as torch's GradScaler does), so
    nothing waits for the device; the host looks every `check_every` iterations and before an epoch is judged.

    Args:
        trainer: a trainer of engines.py.
        model: whose gradients are clipped.
        optimizer: fused.
        scaler: an enabled one finds its scale by trial and skips what overflows: only when gradients still overflow
            at a scale of 1 does training stop.
        max_norm: gradients are scaled down to this 2-norm; None leaves them.
        check_every: iterations between looks; 1 stops at the very iteration.

    Returns:
        Looks at once; to be called before a state is saved.

    Raises:
        NonFiniteError: from the trainer's `run`, naming the iteration and the learning rate.
    """
    parameters = list(model.parameters())
    # Iteration and learning rate of the first gradient that was not finite; 0 while there is none.
    bad = torch.zeros(2, dtype=torch.float64, device=parameters[0].device)

    def guard(engine: Engine) -> None:
        norm = nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
        infinite = ~norm.isfinite()
        optimizer.found_inf = infinite.float()  # type: ignore[attr-defined]
        if scaler.is_enabled():  # only an unbroken row of overflows counts
            bad.mul_(infinite)
        first = infinite & (bad[0] == 0)
        bad[0].masked_fill_(first, engine.state.iteration)
        bad[1].masked_fill_(first, optimizer.param_groups[0]["lr"])
        if engine.state.iteration % check_every == 0:
            look()

    def look() -> None:
        iteration, lr = bad.tolist()
        if iteration and scaler.get_scale() <= 1:
            epoch = math.ceil(iteration / (trainer.state.epoch_length or 1))
            raise NonFiniteError(f"the gradient is not finite at epoch {epoch}, iteration {iteration:.0f}, lr {lr:.3g}")

    trainer.add_event_handler(TrainingEvents.BACKWARD_COMPLETED, guard)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, look)
    return look


def attach_ema(trainer: Engine, model: nn.Module, decay: float) -> nn.Module:
    """Keep an exponential moving average of weights and of BatchNorm statistics, updated after each iteration.

    After n iterations the decay is min(decay, (1 + n) / (10 + n)), so that the initial weights are soon forgotten
    (as in tf.train.ExponentialMovingAverage). Nothing beyond the average itself has to be saved. The statistics are
    averaged like the weights: copied ones would be those of other weights.

    Ignite's EMAHandler averages tensor by tensor: on a GPU, launching that takes longer than many a training step.

    Returns:
        The averaged model, in evaluation mode.
    """
    average = copy.deepcopy(model).eval().requires_grad_(False)
    pairs = zip(average.state_dict().values(), model.state_dict().values(), strict=True)
    averaged, current = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)

    @torch.no_grad()
    def update(engine: Engine) -> None:
        n = engine.state.iteration
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    trainer.add_event_handler(Events.ITERATION_COMPLETED, update)
    return average


def attach_drop_path_ramp(trainer: Engine, model: nn.Module, share: float, epochs: int) -> None:
    """Lower the drop probabilities of stochastic depth linearly, epoch by epoch, over the last `share` of `epochs`."""
    drops = [(module, module.p) for module in model.modules() if isinstance(module, StochasticDepth)]

    def lower(engine: Engine) -> None:
        left = epochs - engine.state.epoch + 1
        for module, rate in drops:
            module.p = rate * min(1, left / (share * epochs))

    trainer.add_event_handler(Events.EPOCH_STARTED, lower)


class MeanLoss(Loss):
    """Ignite's, summed in double precision: then sums do not depend on the order or on who summed what.

    Nothing is added for an empty batch, whose mean would be NaN.
    """

    def reset(self) -> None:
        super().reset()
        self._sum = self._sum.double()

    def update(self, output: Sequence[Tensor]) -> None:
        if len(output[1]):
            super().update(output)


def attach_metrics(engine: Engine, loss_fn: LossFn, device: torch.device) -> dict[str, Metric]:
    """Mean loss and accuracy over the images of an epoch, accumulated on the device.

    The engine's output is (logits, targets), where targets are labels (B,) or distributions (B, num_classes); a
    distribution counts as its likeliest class for the accuracy.
    """

    def hard(output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        logits, targets = output
        return logits, targets.argmax(1) if targets.ndim == 2 else targets

    metrics: dict[str, Metric] = {
        "loss": MeanLoss(loss_fn, device=device),
        "accuracy": Accuracy(hard, device=device),
    }
    for name, metric in metrics.items():
        metric.attach(engine, name)
    return metrics


class EpochTimer:
    """Seconds spent on the iterations of the current epoch, by all processes that worked on it."""

    def __init__(self, trainer: Engine) -> None:
        self._before, self._started = 0.0, math.nan
        trainer.add_event_handler(Events.EPOCH_STARTED, self._start)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._stop)

    def _start(self, engine: Engine) -> None:
        if engine.state.iteration % (engine.state.epoch_length or 1) == 0:
            self._before = 0.0
        self._started = time.monotonic()

    def _stop(self, engine: Engine) -> None:
        self._before, self._started = self.seconds, math.nan

    @property
    def seconds(self) -> float:
        return self._before if math.isnan(self._started) else self._before + time.monotonic() - self._started

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._before = state["seconds"]


# --- At the end of an epoch ---------------------------------------------------------------------------------------


def attach_validation(trainer: Engine, evaluator: Engine, val_loader: EvalLoader, optimizer: Optimizer) -> None:
    """Run the evaluator after each epoch.

    Raises:
        NonFiniteError: the loss is not finite: weights have overflowed, no accuracy of theirs means anything.
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
    trainer: Engine, evaluator: Engine | None, optimizer: Optimizer, record: RunRecord, images: int, timer: EpochTimer
) -> None:
    """Append a row to the record's history after each epoch: the columns of metrics.csv.

    Args:
        trainer: has train metrics.
        evaluator: has validation metrics, or None.
        optimizer: for the learning rate.
        record: gets the row.
        images: trained on in an epoch.
        timer: for the seconds.
    """

    def append(engine: Engine) -> None:
        val = evaluator.state.metrics if evaluator else {"loss": None, "accuracy": None}
        row: Row = {
            "epoch": engine.state.epoch,
            "train_loss": engine.state.metrics["loss"],
            "train_acc": engine.state.metrics["accuracy"],
            "val_loss": val["loss"],
            "val_acc": val["accuracy"],
            "lr": optimizer.param_groups[0]["lr"],
            "seconds": timer.seconds,
            "images_per_second": images / timer.seconds,
        }
        record.history.append(row)

    trainer.add_event_handler(Events.EPOCH_COMPLETED, append)


def attach_early_stopping(trainer: Engine, record: RunRecord, patience: int) -> EarlyStopping:
    """Stop when validation accuracy has not risen for `patience` epochs.

    Added as a plain handler: `EarlyStopping.attach` resets its count whenever the engine starts.
    """
    stopping = EarlyStopping(patience, score_function=lambda _: record.val_acc, trainer=trainer)
    stopping.logger.setLevel(logging.WARNING)  # it would tell the terminal, but not training.log

    def stop(engine: Engine) -> None:
        stopping(engine)
        if trainer.should_terminate:
            logger.info("stopping early: no better validation accuracy for %d epochs", patience)

    trainer.add_event_handler(Events.EPOCH_COMPLETED, stop)
    return stopping


# --- Stopping -----------------------------------------------------------------------------------------------------


def attach_stop(trainer: Engine, evaluator: Engine | None, flag: StopFlag, every: int = 1) -> None:
    """Leave the engines between two iterations, in training or in validation, once a signal has come.

    Args:
        trainer: is looked after.
        evaluator: too, if there is one.
        flag: tells of signals.
        every: iterations between looks.

    Raises:
        StopRequested: from the trainer's `run`.
    """
    for engine in (trainer, evaluator):
        if engine:
            engine.add_event_handler(Events.ITERATION_COMPLETED(every=every), flag.look)

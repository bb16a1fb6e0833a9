"""What hangs on the engines: each function attaches one behaviour.

Ignite calls the handlers of one event in the order they were attached; train.py attaches them in the order below.
"""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, EarlyStopping, LRScheduler, ProgressBar, TensorboardLogger
from ignite.metrics import Accuracy, Loss, Metric
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from cifar_ignite.checkpoints import DurableSaver, RunRecord
from cifar_ignite.config import InputError, RunFailedError, ScheduleConfig
from cifar_ignite.engines import LossFn, TrainingEvents
from cifar_ignite.figures import draw_history
from cifar_ignite.loader import EvalLoader

logger = logging.getLogger(__name__)


class NonFiniteError(RunFailedError):
    """The gradient became infinite or NaN; the weights are those before it."""


# --- Within an iteration ------------------------------------------------------------------------------------------


def attach_schedule(
    trainer: Engine, optimizer: Optimizer, schedule: ScheduleConfig, peak_lr: float, iterations: int
) -> LRScheduler:
    """Set the learning rate of each iteration, from the first on.

    onecycle: torch's OneCycleLR (Smith and Topin, 2017, arXiv:1708.07120), cosine up and cosine down.
    cosine: linear warm-up, then SGDR's cosine (Loshchilov and Hutter, 2016, arXiv:1608.03983) without restarts.

    Args:
        trainer: its iterations are counted.
        optimizer: its learning rate is set.
        schedule: the shape.
        peak_lr: the highest learning rate.
        iterations: of the whole training.

    Returns:
        The handler, whose state belongs in the checkpoint.
    """
    if schedule.name == "onecycle":
        if schedule.warmup_fraction * iterations == 1:  # OneCycleLR divides by warm-up iterations - 1
            raise InputError("schedule.warmup_fraction: one iteration is no warm-up; take 0 or more iterations")
        torch_schedule: Any = OneCycleLR(
            optimizer,
            max_lr=peak_lr,
            total_steps=iterations,
            pct_start=schedule.warmup_fraction,
            div_factor=schedule.div_factor,
            final_div_factor=schedule.final_div_factor,
            cycle_momentum=False,
        )
    else:
        torch_schedule = LambdaLR(optimizer, lambda iteration: cosine_factor(iteration, iterations, schedule))
    handler = LRScheduler(torch_schedule)
    trainer.add_event_handler(Events.ITERATION_STARTED, handler)
    return handler


def cosine_factor(iteration: int, iterations: int, schedule: ScheduleConfig) -> float:
    """Share of the peak learning rate at `iteration` (from 0): linear warm-up, then half a cosine."""
    start = 1 / schedule.div_factor
    end = start / schedule.final_div_factor
    warmup = schedule.warmup_fraction * iterations
    if iteration < warmup:
        return start + (1 - start) * iteration / warmup
    return end + (1 - end) * (1 + math.cos(math.pi * (iteration - warmup) / (iterations - warmup))) / 2


def attach_gradient_guard(
    trainer: Engine, model: nn.Module, optimizer: Optimizer, max_norm: float | None, check_every: int
) -> None:
    """Clip the global gradient norm, and make no update with a gradient that is not finite.

    A fused optimizer skips its update on the device when its `found_inf` is set (as torch's GradScaler does), so
    nothing waits for the device; the host looks every `check_every` iterations and before an epoch is judged.

    Args:
        trainer: a trainer of engines.py.
        model: whose gradients are clipped.
        optimizer: fused.
        max_norm: gradients are scaled down to this 2-norm; None leaves them.
        check_every: iterations between looks; 1 stops at the very iteration.

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
        now = torch.tensor([engine.state.iteration, optimizer.param_groups[0]["lr"]], dtype=torch.float64)
        bad.copy_(torch.where(infinite & (bad[0] == 0), now.to(bad.device, non_blocking=True), bad))
        if engine.state.iteration % check_every == 0:
            look(engine)

    def look(engine: Engine) -> None:
        iteration, lr = bad.tolist()
        if iteration:
            raise NonFiniteError(
                f"the gradient is not finite at iteration {iteration:.0f} (epoch {engine.state.epoch}, lr {lr:.3g}); "
                "a lower optimizer.lr or a tighter train.clip_grad_norm usually helps"
            )

    trainer.add_event_handler(TrainingEvents.BACKWARD_COMPLETED, guard)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, look)


def attach_metrics(engine: Engine, loss_fn: LossFn, device: torch.device) -> dict[str, Metric]:
    """Mean loss and accuracy over the images of an epoch, accumulated on the device.

    The engine's output is (logits, targets), where targets are labels (B,) or distributions (B, num_classes); a
    distribution counts as its likeliest class for the accuracy.
    """

    def hard(output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        logits, targets = output
        return logits, targets.argmax(1) if targets.ndim == 2 else targets

    metrics: dict[str, Metric] = {
        "loss": Loss(loss_fn, device=device),
        "accuracy": Accuracy(hard, device=device),
    }
    for name, metric in metrics.items():
        metric.attach(engine, name)
    return metrics


def attach_progress_bar(trainer: Engine, metrics: dict[str, Metric], optimizer: Optimizer, every: int) -> None:
    """A bar an epoch with loss, accuracy, learning rate and time left; looks at the metrics every so many iterations.

    Without a terminal there is no bar.
    """

    def postfix(_: Any) -> dict[str, str]:
        return {
            "loss": f"{metrics['loss'].compute():.3f}",
            "acc": f"{100 * metrics['accuracy'].compute():.1f}%",
            "lr": f"{optimizer.param_groups[0]['lr']:.2e}",
        }

    bar = ProgressBar(disable=None, dynamic_ncols=True)
    bar.attach(trainer, output_transform=postfix, event_name=Events.ITERATION_COMPLETED(every=every))


# --- At the end of an epoch ---------------------------------------------------------------------------------------


def attach_validation(trainer: Engine, evaluator: Engine, val_loader: EvalLoader) -> None:
    """Run the evaluator after each epoch."""
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _: evaluator.run(val_loader))


def attach_history(
    trainer: Engine, evaluator: Engine | None, optimizer: Optimizer, record: RunRecord, images: int, csv: Path
) -> None:
    """Append a row to the record's history after each epoch, and write metrics.csv from the history.

    The file is always whole and always agrees with the newest checkpoint, also after resuming an earlier one.

    Args:
        trainer: has train metrics.
        evaluator: has validation metrics, or None.
        optimizer: for the learning rate.
        record: gets the row.
        images: trained on in an epoch.
        csv: the file.
    """

    def append(engine: Engine) -> None:
        val = evaluator.state.metrics if evaluator else {"loss": None, "accuracy": None}
        seconds = engine.state.times[Events.EPOCH_COMPLETED.name] or math.nan
        row = {
            "epoch": engine.state.epoch,
            "train_loss": engine.state.metrics["loss"],
            "train_acc": engine.state.metrics["accuracy"],
            "val_loss": val["loss"],
            "val_acc": val["accuracy"],
            "lr": optimizer.param_groups[0]["lr"],
            "seconds": seconds,
            "images_per_second": images / seconds,
        }
        record.history.append(row)
        pd.DataFrame(record.history).to_csv(csv, index=False)

    trainer.add_event_handler(Events.EPOCH_COMPLETED, append)


def attach_epoch_line(trainer: Engine, record: RunRecord) -> None:
    """Log a line an epoch: what was learnt, how fast, how long until the end."""
    started: dict[str, float] = {}

    def start(engine: Engine) -> None:
        started.update(time=time.monotonic(), epoch=engine.state.epoch)

    def line(engine: Engine) -> None:
        row, epoch, epochs = record.history[-1], engine.state.epoch, engine.state.max_epochs or 0
        val = ""
        if row["val_acc"] is not None:
            best = " (best)" if row is max(record.history, key=lambda row: row["val_acc"]) else ""
            val = f"  val loss {row['val_loss']:.3f} acc {row['val_acc']:.2%}{best}"
        left = (time.monotonic() - started["time"]) / (epoch - started["epoch"]) * (epochs - epoch)
        logger.info(
            f"epoch {epoch:{len(str(epochs))}}/{epochs}  train loss {row['train_loss']:.3f} acc {row['train_acc']:.2%}"
            f"{val}  lr {row['lr']:.2e}  {row['seconds']:.1f} s  {row['images_per_second']:.0f} images/s"
            f"  {format_seconds(left)} left"
        )

    trainer.add_event_handler(Events.STARTED, start)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, line)


def format_seconds(seconds: float) -> str:
    """3725 -> "1:02:05"."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"


def attach_tensorboard(trainer: Engine, evaluator: Engine | None, optimizer: Optimizer, folder: Path) -> None:
    """Write train and validation metrics and the learning rate as TensorBoard events."""
    board = TensorboardLogger(log_dir=str(folder))
    names = ["loss", "accuracy"]
    board.attach_output_handler(trainer, Events.EPOCH_COMPLETED, tag="train", metric_names=names)
    board.attach_opt_params_handler(trainer, Events.EPOCH_COMPLETED, optimizer=optimizer)
    if evaluator:
        board.attach_output_handler(
            evaluator,
            Events.COMPLETED,
            tag="val",
            metric_names=names,
            global_step_transform=lambda *_: trainer.state.epoch,
        )
    trainer.add_event_handler(Events.COMPLETED, lambda _: board.close())


def attach_figures(trainer: Engine, record: RunRecord, folder: Path, every: int) -> None:
    """Draw the history every so many epochs and at the end."""

    def draw(_: Engine) -> None:
        draw_history(record.history, folder)

    trainer.add_event_handler(Events.EPOCH_COMPLETED(every=every) | Events.COMPLETED, draw)


def attach_best_model(
    trainer: Engine, model: nn.Module, record: RunRecord, folder: Path, publish: Callable[[Path], None]
) -> Checkpoint:
    """Keep the model of the best validation accuracy in `folder`; `publish` is called with each new best file.

    Attached to the trainer, after the history has the epoch's row, so that the file tells its own accuracy.
    """
    best = Checkpoint(
        {"model": model, "record": record},
        DurableSaver(folder),
        filename_pattern="best_epoch_{global_step:04d}.pth",
        score_function=lambda _: record.val_acc or 0.0,
        global_step_transform=lambda engine, _: engine.state.epoch,
    )

    def save(engine: Engine) -> None:
        before = best.last_checkpoint
        best(engine)
        if best.last_checkpoint != before:
            publish(folder / str(best.last_checkpoint))

    trainer.add_event_handler(Events.EPOCH_COMPLETED, save)
    return best


def attach_early_stopping(trainer: Engine, record: RunRecord, patience: int) -> EarlyStopping:
    """Stop when validation accuracy has not risen for `patience` epochs.

    Added as a plain handler: `EarlyStopping.attach` resets its count whenever the engine starts.
    """
    stopping = EarlyStopping(patience, score_function=lambda _: record.val_acc, trainer=trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, stopping)
    return stopping


def attach_checkpoints(trainer: Engine, state: dict[str, Any], folder: Path, every: int) -> None:
    """Save the whole training state: the newest two of all epochs, and every so many epochs one that stays.

    Attached last, so that the state is that of a finished epoch, and after a resumed state is loaded.
    """
    kept = Checkpoint(
        state,
        DurableSaver(folder),
        filename_pattern="epoch_{global_step:04d}.pt",
        global_step_transform=lambda engine, _: engine.state.epoch,
        n_saved=None,
    )
    latest = Checkpoint(
        state,
        DurableSaver(folder),
        filename_pattern="latest_{global_step:09d}.pt",
        global_step_transform=lambda engine, _: engine.state.iteration,
        n_saved=2,
    )
    # What an interrupted run left counts among the newest two.
    before = [(int(path.stem.split("_")[1]), path.name) for path in folder.glob("latest_*.pt")]
    latest.load_state_dict({"_saved": sorted(item for item in before if item[0] <= trainer.state.iteration)})
    trainer.add_event_handler(Events.EPOCH_COMPLETED(every=every), kept)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, latest)

"""The learning rate schedule, a function of the iteration alone: nothing of it is saved in a checkpoint."""

import math
from typing import Any

from ignite.engine import Engine, Events
from ignite.handlers import LRScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from cifar_ignite.config import ScheduleConfig


def attach_lr_schedule(trainer: Engine, optimizer: Optimizer, schedule: ScheduleConfig, iterations: int) -> LRScheduler:
    """Set the learning rate before each iteration.

    onecycle: torch's OneCycleLR (Smith and Topin, 2017, arXiv:1708.07120), cosine up and cosine down.
    cosine: linear warm-up, then SGDR's cosine (Loshchilov and Hutter, 2016, arXiv:1608.03983) without restarts.
    linear: linear warm-up, then linear decay.

    Args:
        trainer: Engine of the training.
        optimizer: Optimizer; the current learning rate of each parameter group is its peak.
        schedule: Shape of the schedule.
        iterations: Iterations of the complete training.

    Returns:
        Ignite's handler around the torch schedule.
    """
    if schedule.name == "onecycle":
        # OneCycleLR divides by the warm-up's iterations minus one, so one iteration is made slightly longer.
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


def set_lr_iteration(handler: LRScheduler, iteration: int) -> None:
    """Set the schedule, and the optimizer's learning rate, to the state after `iteration` iterations."""
    if iteration:
        handler.lr_scheduler.last_epoch = iteration - 1
        handler(None)


def lr_factor(iteration: int, iterations: int, schedule: ScheduleConfig) -> float:
    """Return learning rate / peak at `iteration` (from 0): linear warm-up, then half a cosine or a line."""
    start = 1 / schedule.div_factor
    end = start / schedule.final_div_factor
    warmup = schedule.warmup_fraction * iterations
    if iteration < warmup:
        return start + (1 - start) * iteration / warmup
    remaining = 1 - (iteration - warmup) / (iterations - warmup)
    decay = remaining if schedule.name == "linear" else (1 - math.cos(math.pi * remaining)) / 2
    return end + (1 - end) * decay

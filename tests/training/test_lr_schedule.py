"""Learning rate schedules against torch's own and against closed forms."""

import math

import pytest
from ignite.engine import Engine
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, SequentialLR

from cifar_ignite.config import ScheduleConfig
from cifar_ignite.training.lr_schedule import attach_lr_schedule, set_lr_iteration
from tests.training.helpers import create_sgd


def record_lrs(schedule, peak, iterations, start=0):
    """Return the learning rate with which each iteration, from `start` on, updates the weights, over two epochs."""
    optimizer, lrs = create_sgd(lr=peak), []
    trainer = Engine(lambda engine, batch: lrs.append(optimizer.param_groups[0]["lr"]))
    handler = attach_lr_schedule(trainer, optimizer, schedule, iterations)
    set_lr_iteration(handler, start)
    trainer.run(range((iterations - start + 1) // 2), max_epochs=2)
    return lrs[: iterations - start]


def record_torch_lrs(optimizer, scheduler, iterations):
    """Return the learning rates of a torch schedule."""
    lrs = []
    for iteration in range(iterations):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if iteration < iterations - 1:  # OneCycleLR refuses one more step
            scheduler.step()
    return lrs


@pytest.mark.parametrize("warmup", [0.0, 0.3, 0.75])
def test_onecycle_equals_torch_from_first_iteration(warmup):
    schedule = ScheduleConfig(warmup_fraction=warmup, div_factor=10, final_div_factor=100)
    optimizer = create_sgd()
    oracle = OneCycleLR(
        optimizer, 0.4, total_steps=100, pct_start=warmup, div_factor=10, final_div_factor=100, cycle_momentum=False
    )
    assert record_lrs(schedule, 0.4, 100) == pytest.approx(record_torch_lrs(optimizer, oracle, 100), abs=1e-9)


@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_cosine_equals_closed_form_from_first_iteration(warmup):
    schedule = ScheduleConfig(name="cosine", warmup_fraction=warmup, div_factor=5, final_div_factor=20)
    start, end, rise = 0.4 / 5, 0.4 / 100, warmup * 80
    expected = [
        start + (0.4 - start) * i / rise
        if i < rise
        else end + (0.4 - end) * 0.5 * (1 + math.cos(math.pi * (i - rise) / (80 - rise)))
        for i in range(80)
    ]
    assert record_lrs(schedule, 0.4, 80) == pytest.approx(expected, abs=1e-9)


def test_cosine_without_warmup_equals_torch():
    schedule = ScheduleConfig(name="cosine", warmup_fraction=0, div_factor=1, final_div_factor=1e4)
    optimizer = create_sgd(lr=0.4)
    oracle = CosineAnnealingLR(optimizer, T_max=50, eta_min=0.4e-4)
    assert record_lrs(schedule, 0.4, 50) == pytest.approx(record_torch_lrs(optimizer, oracle, 50), abs=1e-9)


@pytest.mark.parametrize("warmup", [0, 10])
def test_linear_equals_torch(warmup):
    """The oracle is PyTorch's LinearLR up, then LinearLR down."""
    schedule = ScheduleConfig(name="linear", warmup_fraction=warmup / 40, div_factor=5, final_div_factor=100)
    optimizer = create_sgd(lr=0.5)
    oracle = LinearLR(optimizer, 1.0, 0.002, total_iters=40 - warmup)
    if warmup:
        oracle = SequentialLR(optimizer, [LinearLR(optimizer, 0.2, 1.0, total_iters=warmup), oracle], [warmup])
    assert record_lrs(schedule, 0.5, 40) == pytest.approx(record_torch_lrs(optimizer, oracle, 40))


def test_onecycle_with_warmup_of_one_iteration_does_not_divide_by_zero():
    lrs = record_lrs(ScheduleConfig(warmup_fraction=0.1, div_factor=10), 0.5, 10)
    assert lrs[0] == pytest.approx(0.05, abs=1e-9)
    assert lrs[1] > 0.45
    assert lrs == [lrs[0], *sorted(lrs[1:], reverse=True)]


@pytest.mark.parametrize("name", ["onecycle", "cosine", "linear"])
def test_lr_schedule_set_to_any_iteration_continues_bit_identically(name):
    schedule = ScheduleConfig(name=name, warmup_fraction=0.25)
    expected = record_lrs(schedule, 0.3, 20)
    for start in (0, 1, 4, 5, 6, 19):
        assert record_lrs(schedule, 0.3, 20, start) == expected[start:]


def test_lr_schedule_scales_each_parameter_group_from_its_own_peak():
    optimizer, lrs = create_sgd([{"params": create_sgd().param_groups[0]["params"], "lr": lr} for lr in (0.1, 0.4)]), []
    trainer = Engine(lambda engine, batch: lrs.append([group["lr"] for group in optimizer.param_groups]))
    attach_lr_schedule(trainer, optimizer, ScheduleConfig(), 10)
    trainer.run(range(10), max_epochs=1)
    assert [high / low for low, high in lrs] == pytest.approx([4] * 10)

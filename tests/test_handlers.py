"""Handlers with fake engines and fake scores: milliseconds, exact."""

import math

import pandas as pd
import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from cifar_ignite import handlers
from cifar_ignite.checkpoints import RunRecord
from cifar_ignite.config import InputError, ScheduleConfig
from cifar_ignite.engines import create_evaluator, create_trainer
from cifar_ignite.loader import EvalLoader

CPU = torch.device("cpu")


def sgd(parameters, **options):
    return torch.optim.SGD(parameters, **({"lr": 0.1, "momentum": 0.9, "fused": True} | options))


# --- Learning rate ------------------------------------------------------------------------------------------------


def rates(schedule, peak, iterations):
    """What the optimizer's learning rate is while each iteration's update is made."""
    optimizer, seen = sgd([nn.Parameter(torch.zeros(1))], lr=peak), []
    trainer = Engine(lambda engine, batch: seen.append(optimizer.param_groups[0]["lr"]))
    handlers.attach_schedule(trainer, optimizer, schedule, peak, iterations)
    trainer.run(range(iterations // 2), max_epochs=2)
    return seen


@pytest.mark.parametrize("warmup", [0.0, 0.3, 0.75])
def test_onecycle_equals_torch_from_the_first_iteration(warmup):
    schedule = ScheduleConfig(warmup_fraction=warmup, div_factor=10, final_div_factor=100)
    optimizer = sgd([nn.Parameter(torch.zeros(1))])
    oracle = OneCycleLR(
        optimizer, 0.4, total_steps=100, pct_start=warmup, div_factor=10, final_div_factor=100, cycle_momentum=False
    )
    expected = []
    for _ in range(100):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        oracle.step() if len(expected) < 100 else None
    assert rates(schedule, 0.4, 100) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_cosine_equals_its_closed_form_from_the_first_iteration(warmup):
    schedule = ScheduleConfig(name="cosine", warmup_fraction=warmup, div_factor=5, final_div_factor=20)
    start, end, rise = 0.4 / 5, 0.4 / 100, warmup * 80
    expected = [
        start + (0.4 - start) * i / rise
        if i < rise
        else end + (0.4 - end) * 0.5 * (1 + math.cos(math.pi * (i - rise) / (80 - rise)))
        for i in range(80)
    ]
    assert rates(schedule, 0.4, 80) == pytest.approx(expected, abs=1e-9)


def test_cosine_without_warmup_equals_torch():
    schedule = ScheduleConfig(name="cosine", warmup_fraction=0, div_factor=1, final_div_factor=1e4)
    optimizer = sgd([nn.Parameter(torch.zeros(1))], lr=0.4)
    oracle = CosineAnnealingLR(optimizer, T_max=50, eta_min=0.4e-4)
    expected = []
    for _ in range(50):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        oracle.step()
    assert rates(schedule, 0.4, 50) == pytest.approx(expected, abs=1e-9)


def test_a_warmup_of_one_iteration_is_refused_clearly():
    with pytest.raises(InputError, match="schedule.warmup_fraction"):
        rates(ScheduleConfig(warmup_fraction=0.5), 0.1, 2)


# --- Gradients ----------------------------------------------------------------------------------------------------


def guarded(batches, max_norm=None, check_every=1):
    """Train a linear model on (input, target) pairs; returns the model and the norms that the optimizer saw."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer, norms = sgd(model.parameters(), momentum=0.0), []
    trainer = create_trainer(model, optimizer, lambda logits, targets: (logits - targets).sum())
    handlers.attach_gradient_guard(trainer, model, optimizer, max_norm, check_every)
    step = optimizer.step
    optimizer.step = lambda: (norms.append(model.weight.grad.norm().item()), step())
    error = None
    try:
        trainer.run(batches, max_epochs=1)
    except handlers.NonFiniteError as raised:
        error = str(raised)
    return model.weight.detach(), norms, error


def pair(value):
    return torch.full((1, 2), float(value)), torch.zeros(1, 1)


def test_gradients_are_clipped_to_the_configured_norm():
    _, norms, error = guarded([pair(30), pair(0.001)], max_norm=0.5)
    assert error is None
    assert norms == pytest.approx([0.5, 0.001 * math.sqrt(2)], rel=1e-4)
    assert guarded([pair(30)], max_norm=None)[1] == pytest.approx([30 * math.sqrt(2)])


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_non_finite_gradient_stops_before_its_update(bad):
    weight, norms, error = guarded([pair(1), pair(bad), pair(1)])
    assert torch.allclose(weight, torch.full((1, 2), 0.9))
    assert len(norms) == 1
    assert "not finite at iteration 2 (epoch 1, lr 0.1)" in error


def test_looking_seldom_still_makes_no_update_with_a_non_finite_gradient():
    """As on a GPU: the device skips the update, the host learns of it later, at the latest when the epoch ends."""
    weight, norms, error = guarded([pair(1), pair(math.nan), pair(1), pair(1)], check_every=100)
    assert torch.allclose(weight, torch.full((1, 2), 0.7))
    assert len(norms) == 4
    assert "iteration 2" in error


# --- Metrics ------------------------------------------------------------------------------------------------------


def test_losses_and_accuracies_are_means_over_images_also_with_a_smaller_last_batch():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8)
    labels = torch.randint(0, 10, (50,))
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    loader = EvalLoader(images, labels, batch_size=32, mean=(0.5,) * 3, std=(0.2,) * 3)
    evaluator = create_evaluator(model)
    handlers.attach_metrics(evaluator, nn.functional.cross_entropy, CPU)
    got = evaluator.run(loader).metrics
    with torch.no_grad():
        logits = model((images / 255 - 0.5) / 0.2)
    assert got["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert got["accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_train_metrics_take_distributions_as_targets():
    engine = Engine(lambda engine, batch: batch)
    handlers.attach_metrics(engine, nn.CrossEntropyLoss(label_smoothing=0.1), CPU)
    torch.manual_seed(0)
    logits, targets = torch.randn(10, 4), torch.rand(10, 4).softmax(1)
    got = engine.run([(logits[:7], targets[:7]), (logits[7:], targets[7:])]).metrics
    expected = nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
    assert got["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert got["accuracy"] == pytest.approx((logits.argmax(1) == targets.argmax(1)).float().mean().item())


# --- At the end of an epoch ---------------------------------------------------------------------------------------


def scored(scores, attach):
    """Run an engine for as many epochs as there are validation accuracies; returns how many it ran."""
    record = RunRecord({}, [])
    trainer = Engine(lambda engine, batch: None)

    @trainer.on(Events.EPOCH_COMPLETED)
    def append(engine):
        record.history.append({"epoch": engine.state.epoch, "val_acc": scores[engine.state.epoch - 1]})

    attached = attach(trainer, record)
    trainer.run([0], max_epochs=len(scores))
    return trainer.state.epoch, attached


def test_early_stopping_stops_after_patience_epochs_without_a_rise():
    epochs, _ = scored([0.1, 0.5, 0.4, 0.45, 0.5, 0.9], lambda t, r: handlers.attach_early_stopping(t, r, 3))
    assert epochs == 5
    epochs, _ = scored([0.1, 0.5, 0.4, 0.45, 0.6, 0.5], lambda t, r: handlers.attach_early_stopping(t, r, 3))
    assert epochs == 6


def test_the_best_model_is_the_first_of_the_highest_and_published_once(tmp_path):
    published = []

    def attach(trainer, record):
        return handlers.attach_best_model(trainer, nn.Linear(1, 1), record, tmp_path, published.append)

    scored([0.2, 0.5, 0.5, 0.1, 0.6, 0.6], attach)
    assert [path.name for path in published] == ["best_epoch_0001.pth", "best_epoch_0002.pth", "best_epoch_0005.pth"]
    assert [path.name for path in tmp_path.iterdir()] == ["best_epoch_0005.pth"]


def test_the_history_is_what_pandas_reads_back(tmp_path):
    record = RunRecord({}, [])
    trainer = Engine(lambda engine, batch: None)

    @trainer.on(Events.EPOCH_COMPLETED)
    def metrics(engine):
        engine.state.metrics = {"loss": 1 / 3 / engine.state.epoch, "accuracy": 0.1 * engine.state.epoch}

    handlers.attach_history(trainer, None, sgd([nn.Parameter(torch.zeros(1))]), record, 500, tmp_path / "metrics.csv")
    trainer.run([0, 0], max_epochs=3)
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert list(table) == [
        "epoch", "train_loss", "train_acc", "val_loss", "val_acc", "lr", "seconds", "images_per_second",
    ]  # fmt: skip
    assert table["epoch"].tolist() == [1, 2, 3]
    assert table["train_loss"].tolist() == [1 / 3, 1 / 6, 1 / 9]
    assert table["val_acc"].isna().all()
    assert (table["images_per_second"] * table["seconds"]).tolist() == pytest.approx([500] * 3)


def test_seconds_are_written_as_people_read_them():
    assert handlers.format_seconds(3725.4) == "1:02:05"
    assert handlers.format_seconds(0.2) == "0:00:00"

"""Handlers with fake engines and fake scores: milliseconds, exact."""

import math
import time

import pytest
import torch
from conftest import row, scored
from ignite.engine import Engine, Events
from torch import nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, SequentialLR
from torch.optim.swa_utils import AveragedModel
from torchvision.ops import StochasticDepth

from cifar_ignite import handlers
from cifar_ignite.checkpoints import RunRecord
from cifar_ignite.config import ScheduleConfig
from cifar_ignite.engines import create_evaluator, create_trainer
from cifar_ignite.loader import EvalLoader
from cifar_ignite.models import create_model
from cifar_ignite.reporting import format_seconds

NO_SCALER = GradScaler("cpu", enabled=False)
CPU = torch.device("cpu")


def sgd(parameters, **options):
    return torch.optim.SGD(parameters, **({"lr": 0.1, "momentum": 0.9, "fused": True} | options))


# --- Learning rate ------------------------------------------------------------------------------------------------


def rates(schedule, peak, iterations):
    """What the optimizer's learning rate is while each iteration's update is made."""
    optimizer, seen = sgd([nn.Parameter(torch.zeros(1))], lr=peak), []
    trainer = Engine(lambda engine, batch: seen.append(optimizer.param_groups[0]["lr"]))
    handlers.attach_schedule(trainer, optimizer, schedule, iterations)
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


@pytest.mark.parametrize("warmup", [0, 10])
def test_linear_equals_torch(warmup):
    """PyTorch's LinearLR up, then LinearLR down."""
    schedule = ScheduleConfig(name="linear", warmup_fraction=warmup / 40, div_factor=5, final_div_factor=100)
    optimizer = sgd([nn.Parameter(torch.zeros(1))], lr=0.5)
    oracle = LinearLR(optimizer, 1.0, 0.002, total_iters=40 - warmup)
    if warmup:
        oracle = SequentialLR(optimizer, [LinearLR(optimizer, 0.2, 1.0, total_iters=warmup), oracle], [warmup])
    expected = []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        oracle.step()
    assert rates(schedule, 0.5, 40) == pytest.approx(expected)


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


def test_a_warmup_of_one_iteration_is_no_division_by_zero():
    seen = rates(ScheduleConfig(warmup_fraction=0.1, div_factor=10), 0.5, 10)
    assert seen[0] == pytest.approx(0.05, abs=1e-9)
    assert seen[1] > 0.45
    assert seen == [seen[0], *sorted(seen[1:], reverse=True)]


# --- Gradients ----------------------------------------------------------------------------------------------------


def guarded(batches, max_norm=None, check_every=1):
    """Train a linear model on (input, target) pairs; returns the model and the norms that the optimizer saw."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer, norms = sgd(model.parameters(), momentum=0.0), []
    trainer = create_trainer(model, model, optimizer, lambda logits, targets: (logits - targets).sum(), NO_SCALER)
    handlers.attach_gradient_guard(trainer, model, optimizer, NO_SCALER, max_norm, check_every)
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
    assert error == "the gradient is not finite at epoch 1, iteration 2, lr 0.1"


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
    evaluator = create_evaluator(model, model)
    handlers.attach_metrics(evaluator, nn.functional.cross_entropy, CPU)
    got = evaluator.run(loader).metrics
    with torch.no_grad():
        logits = model((images / 255 - 0.5) / 0.2)
    assert got["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert got["accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_evaluation_is_deterministic_and_changes_nothing():
    """Dropout is off, BatchNorm uses its statistics and leaves them alone, also after training mode."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(48, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 10)
    ).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.randn(20, 3, 4, 4)
    logits = [create_evaluator(model.train(), model).run([(images, None)]).output[0] for _ in range(2)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], model.eval()(images))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


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


def test_early_stopping_stops_after_patience_epochs_without_a_rise():
    epochs, _ = scored([0.1, 0.5, 0.4, 0.45, 0.5, 0.9], lambda t, r: handlers.attach_early_stopping(t, r, 3))
    assert epochs == 5
    epochs, _ = scored([0.1, 0.5, 0.4, 0.45, 0.6, 0.5], lambda t, r: handlers.attach_early_stopping(t, r, 3))
    assert epochs == 6


def test_early_stopping_survives_many_runs_of_the_evaluator():
    """EarlyStopping.attach(evaluator) would reset its count each time the evaluator starts, and never stop."""
    record, trainer, evaluator = RunRecord("run", {}, []), Engine(lambda *_: None), Engine(lambda *_: None)

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate(engine):
        evaluator.run([0])
        record.history.append(row(engine.state.epoch, 0.5))

    handlers.attach_early_stopping(trainer, record, 2)
    trainer.run([0], max_epochs=10)
    assert trainer.state.epoch == 3


def test_a_validation_loss_that_is_not_finite_stops_the_run():
    trainer, evaluator = Engine(lambda *_: None), Engine(lambda engine, batch: batch)
    handlers.attach_metrics(evaluator, nn.functional.cross_entropy, CPU)
    loader = [(torch.full((2, 3), math.nan), torch.tensor([0, 1]))]
    handlers.attach_validation(trainer, evaluator, loader, sgd([nn.Parameter(torch.zeros(1))]))
    with pytest.raises(handlers.NonFiniteError, match="validation loss is not finite at epoch 1, iteration 1, lr 0.1"):
        trainer.run([0], max_epochs=2)


def test_the_history_has_a_row_an_epoch():
    record = RunRecord("run", {}, [])
    trainer = Engine(lambda engine, batch: time.sleep(0.01))
    timer = handlers.EpochTimer(trainer)

    @trainer.on(Events.EPOCH_COMPLETED)
    def metrics(engine):
        time.sleep(0.05)  # validation, say: not training time
        engine.state.metrics = {"loss": 1 / engine.state.epoch, "accuracy": 0.1 * engine.state.epoch}

    handlers.attach_history(trainer, None, sgd([nn.Parameter(torch.zeros(1))]), record, 500, timer)
    trainer.run([0, 0], max_epochs=3)
    assert [row["epoch"] for row in record.history] == [1, 2, 3]
    assert [row["train_loss"] for row in record.history] == [1, 1 / 2, 1 / 3]
    for one in record.history:
        assert one["val_acc"] is None
        assert one["seconds"] >= 0.02
        assert one["images_per_second"] * one["seconds"] == pytest.approx(500)


def test_the_timer_adds_up_what_several_processes_spent_on_an_epoch():
    def epoch(timer_state, iterations, done):
        trainer = Engine(lambda engine, batch: time.sleep(0.02))
        timer = handlers.EpochTimer(trainer)
        if timer_state:
            timer.load_state_dict(timer_state)
            trainer.load_state_dict({"iteration": done, "epoch_length": 4, "max_epochs": 1})
        if iterations < 4 - done:
            trainer.add_event_handler(Events.ITERATION_COMPLETED(once=iterations), lambda engine: engine.terminate())
        trainer.run([0] * 4, max_epochs=1)
        return timer.state_dict()

    first = epoch(None, 2, 0)
    assert first["seconds"] >= 0.04
    assert epoch(first, 4, 2)["seconds"] >= first["seconds"] + 0.04


# --- Averaging ----------------------------------------------------------------------------------------------------


def test_ema_averages_weights_and_statistics_and_shares_no_memory():
    """As torch's AveragedModel, with a decay that grows to the configured one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4))
    trainer = create_trainer(model, model, sgd(model.parameters()), nn.functional.mse_loss, NO_SCALER)
    average = handlers.attach_ema(trainer, model, 0.3)
    decays = iter([2 / 11, 3 / 12, 0.3, 0.3, 0.3])

    def lerp(averaged, current, _):
        if not averaged[0].is_floating_point():  # BatchNorm counts its batches
            return
        decay = next(decays)
        for one, other in zip(averaged, current, strict=True):
            one.copy_(decay * one + (1 - decay) * other)

    expected = AveragedModel(model, multi_avg_fn=lerp, use_buffers=True)
    expected.n_averaged += 1  # it would begin with a copy of the first
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: expected.update_parameters(model))
    trainer.run([(torch.randn(8, 3), torch.randn(8, 4)) for _ in range(5)])
    assert next(decays, None) is None
    for key, value in average.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value, expected.module.state_dict()[key], atol=1e-6), key
            assert not torch.equal(value, model.state_dict()[key]), key
            assert value.data_ptr() != model.state_dict()[key].data_ptr(), key
    assert not average.training


def test_the_average_of_a_short_run_has_forgotten_the_initial_weights():
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 1000.0)
    trainer = Engine(lambda engine, batch: None)
    average = handlers.attach_ema(trainer, model, 0.999)
    nn.init.constant_(model.weight, 1.0)
    trainer.run(range(60), max_epochs=1)
    assert average.weight.item() == pytest.approx(1.0, abs=0.01)


def test_drop_probabilities_fall_over_the_last_epochs():
    model = create_model("stochastic_resnet", num_classes=10, width=2, drop_path_rate=0.4)
    trainer = Engine(lambda engine, batch: None)
    handlers.attach_drop_path_ramp(trainer, model, 0.5, 8)
    seen = []
    drops = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda: seen.append([drop.p for drop in drops]))
    trainer.run([0], max_epochs=8)
    for share, rates in zip([1, 1, 1, 1, 1, 0.75, 0.5, 0.25], seen, strict=True):
        assert rates == pytest.approx([0.05 * (block + 1) * share for block in range(8)])


def test_seconds_are_written_as_people_read_them():
    assert format_seconds(3725.4) == "1:02:05"
    assert format_seconds(0.2) == "0:00:00"

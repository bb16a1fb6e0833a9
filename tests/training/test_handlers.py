"""Handlers on engines that do nearly nothing, with chosen metrics: fast and exact."""

import copy
import math

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn
from torchvision.ops import StochasticDepth

from cifar_ignite.checkpointing.run_record import RunRecord
from cifar_ignite.config import TrainConfig
from cifar_ignite.distributed.env import DistEnv
from cifar_ignite.distributed.process_group import DistributedContext
from cifar_ignite.errors import NonFiniteError
from cifar_ignite.models.registry import create_model
from cifar_ignite.training import handlers
from cifar_ignite.training.engines import TrainingEvents, create_trainer
from cifar_ignite.training.metrics import EpochTimer, attach_metrics
from cifar_ignite.training.signals import StopFlag, StopRequested
from tests.helpers import epoch_metrics, run_with_scores
from tests.training.helpers import CPU, NO_SCALER, create_sgd, idle_engine

# --- Gradients ----------------------------------------------------------------------------------------------------


def train_linear(batches, **options):
    """Train a linear model with weights of 1 on (images, targets); return weight, norms of its gradients, error."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer, norms = create_sgd(model.parameters(), momentum=0.0), []
    trainer = create_trainer(model, model, optimizer, lambda logits, targets: (logits - targets).sum(), NO_SCALER)
    handlers.attach_grad_clipping(trainer, model, optimizer, NO_SCALER, TrainConfig(**options))
    step = optimizer.step
    optimizer.step = lambda: (norms.append(model.weight.grad.norm().item()), step())
    error = None
    try:
        trainer.run(batches, max_epochs=1)
    except NonFiniteError as raised:
        error = str(raised)
    return model.weight.detach(), norms, error


def batch_with_gradient(value):
    """Return (images, targets) for which the gradient of the weights is `value` twice."""
    return torch.full((1, 2), float(value)), torch.zeros(1, 1)


def test_grad_clipping_scales_gradient_to_configured_norm():
    _, norms, error = train_linear([batch_with_gradient(30), batch_with_gradient(0.001)], clip_grad_norm=0.5)
    assert error is None
    assert norms == pytest.approx([0.5, 0.001 * math.sqrt(2)], rel=1e-4)


def test_grad_clipping_without_norm_leaves_gradient_unchanged():
    assert train_linear([batch_with_gradient(30)], clip_grad_norm=None)[1] == pytest.approx([30 * math.sqrt(2)])


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_grad_clipping_stops_before_update_with_non_finite_gradient(value):
    batches = [batch_with_gradient(1), batch_with_gradient(value), batch_with_gradient(1)]
    weight, norms, error = train_linear(batches, clip_grad_norm=None)
    assert torch.allclose(weight, torch.full((1, 2), 0.9))
    assert len(norms) == 1
    assert error == "the gradient is not finite at epoch 1, iteration 2, lr 0.1"


def test_grad_clipping_skips_update_with_sparse_checks(monkeypatch):
    """As on a GPU: the device skips the update, and the host finds out later, at the latest at the end of the epoch."""
    monkeypatch.setattr(handlers, "device_check_interval", lambda device, log_every: log_every)
    batches = [batch_with_gradient(value) for value in (1, math.nan, 1, 1)]
    weight, norms, error = train_linear(batches, clip_grad_norm=None, log_every=100)
    assert torch.allclose(weight, torch.full((1, 2), 0.7))
    assert len(norms) == 4
    assert "iteration 2" in error


def test_grad_clipping_without_skipped_updates_stops_before_update(monkeypatch):
    """As on MPS, where the optimizer must not find `found_inf`: the host checks before each update."""
    monkeypatch.setattr(handlers, "skips_updates", lambda device: False)
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = create_sgd(model.parameters(), momentum=0.0, fused=False)
    trainer = create_trainer(model, model, optimizer, lambda logits, targets: logits.sum(), NO_SCALER)
    handlers.attach_grad_clipping(trainer, model, optimizer, NO_SCALER, TrainConfig(clip_grad_norm=None))
    with pytest.raises(NonFiniteError, match="iteration 2"):
        trainer.run([batch_with_gradient(value) for value in (1, math.nan, 1)], max_epochs=1)
    assert torch.allclose(model.weight, torch.full((1, 2), 0.9))


def test_grad_clipping_returned_check_raises_before_next_interval(monkeypatch):
    """Called before a checkpoint is saved, it must not wait for the next check."""
    monkeypatch.setattr(handlers, "device_check_interval", lambda device, log_every: log_every)
    model = nn.Linear(2, 1, bias=False)
    optimizer = create_sgd(model.parameters())
    trainer = create_trainer(model, model, optimizer, lambda logits, targets: logits.sum(), NO_SCALER)
    check = handlers.attach_grad_clipping(trainer, model, optimizer, NO_SCALER, TrainConfig(log_every=100))
    errors = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def save(engine):
        try:
            check()
        except NonFiniteError as error:
            errors.append((engine.state.iteration, str(error)))
            engine.terminate()

    trainer.run([batch_with_gradient(value) for value in (1, math.nan, 1)], max_epochs=1)
    ((iteration, message),) = errors
    assert iteration == 2
    assert "iteration 2" in message


# --- EMA and stochastic depth -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("check_every", "iterations"), [(1, [1, 2, 3]), (2, [2, 3]), (5, [3])])
def test_peer_check_runs_before_gradient_is_read_and_at_end_of_epoch(monkeypatch, check_every, iterations):
    """Reading the gradient would wait for an all-reduce that a lost rank never joins."""
    checked, read = [], []
    trainer = idle_engine()
    trainer.register_events(*TrainingEvents)
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: trainer.fire_event(TrainingEvents.BACKWARD_COMPLETED))
    monkeypatch.setattr(handlers, "all_reduce_max", lambda value, group: checked.append(trainer.state.iteration))
    handlers.attach_peer_check(trainer, check_every, "cpu group")
    trainer.add_event_handler(TrainingEvents.BACKWARD_COMPLETED, lambda: read.append(list(checked)))
    trainer.run([0] * 3)
    assert checked == iterations
    assert read[-1] == iterations


def test_ema_averages_weights_and_statistics_and_shares_no_memory():
    """The decay rises to the configured one: (1 + n) / (10 + n) after n iterations."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4))
    trainer = create_trainer(model, model, create_sgd(model.parameters()), nn.functional.mse_loss, NO_SCALER)
    ema_model = handlers.attach_ema(trainer, model, 0.3)
    expected = copy.deepcopy(model.state_dict())
    decays = iter([2 / 11, 3 / 12, 0.3, 0.3, 0.3])

    @trainer.on(Events.ITERATION_COMPLETED)
    def update_expected(engine):
        decay = next(decays)
        for name, value in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value

    trainer.run([(torch.randn(8, 3), torch.randn(8, 4)) for _ in range(5)])
    assert next(decays, None) is None
    for name, value in ema_model.state_dict().items():
        if value.is_floating_point():  # BatchNorm also counts its batches
            assert torch.allclose(value, expected[name], atol=1e-6), name
            assert not torch.equal(value, model.state_dict()[name]), name
            assert value.data_ptr() != model.state_dict()[name].data_ptr(), name
    assert not ema_model.training
    assert not any(parameter.requires_grad for parameter in ema_model.parameters())


def test_ema_of_short_run_ignores_initial_weights():
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 1000.0)
    trainer = idle_engine()
    ema_model = handlers.attach_ema(trainer, model, 0.999)
    nn.init.constant_(model.weight, 1.0)
    trainer.run(range(60), max_epochs=1)
    assert ema_model.weight.item() == pytest.approx(1.0, abs=0.01)


def test_drop_path_decay_lowers_probabilities_over_last_epochs():
    model = create_model("stochastic_resnet", num_classes=10, width=2, drop_path_rate=0.4)
    layers = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    trainer, seen = idle_engine(), []
    handlers.attach_drop_path_decay(trainer, model, 0.5, 8)
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda: seen.append([layer.p for layer in layers]))
    trainer.run([0], max_epochs=8)
    for factor, drop_probs in zip([1, 1, 1, 1, 1, 0.75, 0.5, 0.25], seen, strict=True):
        assert drop_probs == pytest.approx([0.05 * (block + 1) * factor for block in range(8)])


def test_drop_path_decay_of_zero_changes_nothing():
    model = create_model("stochastic_resnet", num_classes=10, width=2)
    layers = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    before = [layer.p for layer in layers]
    trainer = idle_engine()
    handlers.attach_drop_path_decay(trainer, model, 0.0, 2)
    trainer.run([0], max_epochs=2)
    assert [layer.p for layer in layers] == before


# --- Validation and history ---------------------------------------------------------------------------------------


def test_validation_stops_run_with_non_finite_loss():
    trainer, evaluator = idle_engine(), Engine(lambda engine, batch: batch)
    attach_metrics(evaluator, nn.functional.cross_entropy, CPU)
    loader = [(torch.full((2, 3), math.nan), torch.tensor([0, 1]))]
    handlers.attach_validation(trainer, evaluator, loader, create_sgd())
    with pytest.raises(NonFiniteError, match="validation loss is not finite at epoch 1, iteration 1, lr 0.1"):
        trainer.run([0], max_epochs=2)


def append_history(evaluator, max_epochs):
    """Train with chosen training metrics; return the history."""
    record, trainer = RunRecord("run", {}, []), idle_engine()
    timer = EpochTimer(trainer, images_per_epoch=500)

    @trainer.on(Events.EPOCH_COMPLETED)
    def set_metrics(engine):
        engine.state.metrics = {"loss": 1 / engine.state.epoch, "accuracy": 0.1 * engine.state.epoch}

    handlers.attach_history(trainer, evaluator, create_sgd(), record, timer)
    trainer.run([0, 0], max_epochs=max_epochs)
    return record.history


def test_history_has_one_row_per_epoch():
    history = append_history(None, 3)
    assert [metrics["epoch"] for metrics in history] == [1, 2, 3]
    assert [metrics["train_loss"] for metrics in history] == [1, 1 / 2, 1 / 3]
    assert [metrics["lr"] for metrics in history] == [0.1] * 3
    for metrics in history:
        assert metrics["val_loss"] is None
        assert metrics["val_acc"] is None
        assert metrics["images_per_second"] * metrics["seconds"] == pytest.approx(500)


def test_history_takes_validation_metrics_from_evaluator():
    evaluator = idle_engine()
    evaluator.state.metrics = {"loss": 0.7, "accuracy": 0.8}
    (metrics,) = append_history(evaluator, 1)
    assert (metrics["val_loss"], metrics["val_acc"]) == (0.7, 0.8)


# --- Stopping -----------------------------------------------------------------------------------------------------


def attach_early_stopping(trainer, record, patience):
    handlers.attach_early_stopping(trainer, handlers.create_early_stopping(trainer, record, patience))


@pytest.mark.parametrize(
    ("scores", "epochs"), [([0.1, 0.5, 0.4, 0.45, 0.5, 0.9], 5), ([0.1, 0.5, 0.4, 0.45, 0.6, 0.5], 6)]
)
def test_early_stopping_stops_after_patience_epochs_without_higher_accuracy(scores, epochs):
    ran, _ = run_with_scores(scores, lambda trainer, record: attach_early_stopping(trainer, record, 3))
    assert ran == epochs


def test_early_stopping_keeps_count_when_evaluator_restarts():
    """EarlyStopping.attach(evaluator) would reset its count each time the evaluator starts, and never stop."""
    record, trainer, evaluator = RunRecord("run", {}, []), idle_engine(), idle_engine()

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate(engine):
        evaluator.run([0])
        record.history.append(epoch_metrics(engine.state.epoch, 0.5))

    attach_early_stopping(trainer, record, 2)
    trainer.run([0], max_epochs=10)
    assert trainer.state.epoch == 3


def test_early_stopping_logs_reason_once(caplog):
    caplog.set_level("INFO")
    run_with_scores([0.5] * 9, lambda trainer, record: attach_early_stopping(trainer, record, 2))
    messages = [record.getMessage() for record in caplog.records if "stopping" in record.getMessage().lower()]
    assert messages == ["early stopping: no higher validation accuracy for 2 epochs"]


@pytest.mark.parametrize("in_validation", [False, True])
def test_stop_check_leaves_engines_between_two_iterations(in_validation):
    flag, seen = StopFlag(DistributedContext(DistEnv())), []
    active = Engine(lambda engine, batch: seen.append(batch) or (flag.on_signal(15, None) if batch == 3 else None))
    trainer = Engine(lambda engine, batch: active.run(range(10))) if in_validation else active
    handlers.attach_stop_check(trainer, active if in_validation else None, flag, check_every=20)
    with pytest.raises(StopRequested):
        trainer.run(range(10), max_epochs=1)
    assert seen == [0, 1, 2, 3]

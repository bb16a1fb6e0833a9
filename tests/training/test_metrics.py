"""Loss, accuracy and time of an epoch."""

import time

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from cifar_ignite.config import AugmentConfig
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.data.loaders import EvalLoader
from cifar_ignite.training.engines import create_evaluator
from cifar_ignite.training.metrics import EpochTimer, Float64Loss, attach_metrics
from tests.training.helpers import CPU


def run_with_metrics(loss_fn, batches):
    """Return the metrics of batches of (logits, targets)."""
    engine = Engine(lambda engine, batch: batch)
    attach_metrics(engine, loss_fn, CPU)
    return engine.run(batches).metrics


def test_metrics_average_over_images_with_smaller_last_batch():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8)
    labels = torch.randint(0, 10, (50,))
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    dataset = ImageDataset(images, labels, list(range(50)), tuple("abcdefghij"))
    augment = AugmentConfig(mean=(0.5,) * 3, std=(0.2,) * 3)
    evaluator = create_evaluator(model, model)
    attach_metrics(evaluator, nn.functional.cross_entropy, CPU)
    metrics = evaluator.run(EvalLoader(dataset, batch_size=32, augment=augment)).metrics
    with torch.no_grad():
        logits = model((images / 255 - 0.5) / 0.2)
    assert metrics["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert metrics["accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_metrics_accept_distributions_as_targets():
    torch.manual_seed(0)
    logits, targets = torch.randn(10, 4), torch.rand(10, 4).softmax(1)
    batches = [(logits[:7], targets[:7]), (logits[7:], targets[7:])]
    metrics = run_with_metrics(nn.CrossEntropyLoss(label_smoothing=0.1), batches)
    expected = nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert metrics["accuracy"] == pytest.approx((logits.argmax(1) == targets.argmax(1)).float().mean().item())


def test_loss_skips_empty_batch():
    """A rank's shard of a small batch can be empty, and the mean over nothing is NaN."""
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4), torch.randint(0, 4, (6,))
    expected = run_with_metrics(nn.functional.cross_entropy, [(logits, labels)])
    assert run_with_metrics(nn.functional.cross_entropy, [(logits, labels), (logits[:0], labels[:0])]) == expected


def test_loss_does_not_depend_on_order_of_batches():
    """In float32, adding 3 to 1e8 changes nothing."""
    values = [1e8] + [3.0] * 100
    batches = [(torch.full((1, 2), value), torch.zeros(1, dtype=torch.long)) for value in values]

    def mean(logits, targets):
        return logits.mean()

    loss = run_with_metrics(mean, batches)["loss"]
    assert loss == run_with_metrics(mean, batches[::-1])["loss"] == sum(values) / 101


def test_loss_reads_batches_only_when_mean_or_state_is_needed(monkeypatch):
    """On a device, each read would wait for it."""
    loss, reads, tolist = Float64Loss(nn.functional.mse_loss), [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(len(tensor)) or tolist(tensor))
    for value in (1.0, 2.0, 3.0):
        loss.update((torch.full((4,), value), torch.zeros(4)))
    assert reads == []
    assert loss.compute() == (1 + 4 + 9) / 3
    loss.update((torch.zeros(4), torch.zeros(4)))
    ((state,),) = loss.state_dict().values()
    assert state["_sum"].dtype == torch.float64
    assert (float(state["_sum"]), state["_num_examples"]) == (4 * 14, 16)
    assert reads == [3, 1]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; its only element is the time."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def clocked_engine(clock):
    """Return an engine whose iterations take one second."""

    def train_step(engine, batch):
        clock[0] += 1

    return Engine(train_step)


def test_timer_excludes_handlers_after_epoch(clock):
    trainer = clocked_engine(clock)
    timer, seconds = EpochTimer(trainer, images_per_epoch=500), []

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate(engine):
        clock[0] += 100
        seconds.append(timer.seconds)

    trainer.run([0, 0], max_epochs=3)
    assert seconds == [2, 2, 2]
    assert timer.images_per_second == 250


def test_timer_of_resumed_epoch_adds_time_before_interruption(clock):
    trainer = clocked_engine(clock)
    timer = EpochTimer(trainer, images_per_epoch=4)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=6), lambda engine: engine.terminate())
    trainer.run([0] * 4, max_epochs=2)
    saved = timer.state_dict()
    assert saved == {"seconds": 2}

    clock[0] += 100
    resumed = clocked_engine(clock)
    timer, seconds = EpochTimer(resumed, images_per_epoch=4), []
    timer.load_state_dict(saved)
    resumed.load_state_dict({"iteration": 6, "epoch_length": 4, "max_epochs": 3})
    resumed.add_event_handler(Events.EPOCH_COMPLETED, lambda: seconds.append(timer.seconds))
    resumed.run([0] * 4, max_epochs=3)
    assert seconds == [2 + 2, 4]  # two iterations before the interruption and two after it

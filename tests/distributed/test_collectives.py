"""Collectives: several ranks compute what a single process computes."""

import copy

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Engine
from torch import nn

from cifar_ignite.augment.pipeline import create_train_transform
from cifar_ignite.config import AugmentConfig
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.data.loaders import EvalLoader, Shard, TrainLoader
from cifar_ignite.distributed import collectives
from cifar_ignite.distributed.collectives import (
    SyncedMetrics,
    all_reduce_max,
    broadcast_buffers,
    broadcast_from_rank0,
    check_interval,
    check_sync_batch_norm,
    gather_outputs,
    unchanged_model,
    wrap_ddp,
)
from cifar_ignite.errors import InputError
from cifar_ignite.models import create_model
from cifar_ignite.training.engines import create_evaluator, scale_loss
from cifar_ignite.training.forward import create_forward
from cifar_ignite.training.metrics import attach_metrics
from tests.helpers import posix_only

CPU = torch.device("cpu")
IMAGES = torch.zeros(2, 3, 32, 32)
GENERATOR = torch.Generator().manual_seed(0)
DATASET = ImageDataset(
    torch.randint(0, 256, (90, 3, 32, 32), dtype=torch.uint8, generator=GENERATOR),
    torch.randint(0, 10, (90,), generator=GENERATOR),
    list(range(90)),
    tuple("abcdefghij"),
)


def create_plain_model():
    """Return a model without BatchNorm and dropout, whose outputs do not depend on the other images of a batch."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10))


def attach_metrics_of(batches):
    """Return the metrics of an engine that has run on batches of (logits, labels)."""
    engine = Engine(lambda engine, batch: batch)
    metrics = attach_metrics(engine, nn.functional.cross_entropy, CPU)
    engine.run(batches)
    return metrics


def create_batches(seed, num_batches):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_batches, 5, 10, generator=generator)
    return list(zip(logits, torch.randint(10, (num_batches, 5), generator=generator), strict=True))


def test_collectives_return_their_input_without_process_group():
    model = create_plain_model()
    assert not torch.distributed.is_initialized()
    assert all_reduce_max(3) == 3
    assert check_interval(20) == 1
    assert broadcast_from_rank0(lambda: "text") == "text"
    broadcast_buffers(nn.BatchNorm2d(3))
    check_sync_batch_norm(CPU)
    assert wrap_ddp(model, model, IMAGES, sync_batch_norm=True) is model
    outputs = [torch.ones(2, 3), torch.zeros(1, 3)]
    assert torch.equal(gather_outputs(outputs, [slice(0, 2), slice(2, 4)], 3), torch.cat(outputs))


def test_unchanged_model_restores_buffers_and_deletes_gradients():
    model = nn.BatchNorm2d(3)
    saved = copy.deepcopy(model.state_dict())
    with unchanged_model(model):
        model(IMAGES + 1).sum().backward()
        assert not torch.equal(model.running_mean, saved["running_mean"])
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_synced_metrics_restore_what_they_saved():
    batches = create_batches(0, 4)
    synced = SyncedMetrics(attach_metrics_of(batches))
    assert synced.state_dict() == {}
    synced.gather()
    restored = attach_metrics_of(create_batches(1, 1))
    SyncedMetrics(restored).restore(synced.state_dict(), CPU)
    for name, metric in synced.metrics.items():
        assert restored[name].compute() == metric.compute()


@posix_only
def test_collectives_combine_values_of_all_ranks(run_on_ranks):
    batches = create_batches(0, 6)

    def work(context):
        rank = context.env.rank
        buffers = nn.BatchNorm1d(2)
        buffers.running_mean.fill_(rank + 1)
        broadcast_buffers(buffers)
        outputs = [torch.full((size, 2), rank + 1.0) for size in (2, 1 - rank)]
        rows = [slice(2 * rank, 2 * rank + 2), slice(4 + rank, 6 + rank)]
        synced = SyncedMetrics(attach_metrics_of(batches[rank::2]))
        synced.gather()
        restored = attach_metrics_of(batches[:1])
        SyncedMetrics(restored).restore(synced.state_dict(), CPU)
        for metric in restored.values():
            if rank:
                metric.reset()
        return {
            "max": [all_reduce_max(rank), all_reduce_max(-rank, context.cpu_group)],
            "text": broadcast_from_rank0(lambda: f"rank {rank}"),
            "buffer": buffers.running_mean,
            "gathered": gather_outputs(outputs, rows, 5)[:, 0],
            "metrics": [metric.compute() for metric in restored.values()],
            "check_interval": check_interval(20),
        }

    results = run_on_ranks(work)
    expected = [metric.compute() for metric in attach_metrics_of(batches).values()]
    for result in results:
        assert result["max"] == [1, 0]
        assert result["text"] == "rank 0"
        assert result["buffer"].tolist() == [1, 1]
        assert result["gathered"].tolist() == [1, 1, 2, 2, 1]
        assert result["metrics"] == pytest.approx(expected, rel=1e-12)
        assert result["check_interval"] == 20


@posix_only
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gradients_of_two_ranks_equal_those_of_one_process(run_on_ranks, dtype, tolerance):
    """Up to rounding, in every batch of two epochs; the last batch has one image, so one shard is empty."""
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    transform = create_train_transform(AugmentConfig(), 10, 2)

    def create_loader(shard):
        return TrainLoader(DATASET, batch_size=89, seed=5, transform=transform, shard=shard)

    def gradients(loader, forward, model):
        scaled_loss = scale_loss(loss_fn, loader)
        for _ in range(2):
            for images, targets in loader:
                model.zero_grad()
                scaled_loss(forward(images.to(dtype)), targets.to(dtype)).backward()
                yield torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    def work(context):
        model = create_plain_model().to(dtype)
        forward = wrap_ddp(model, model, IMAGES.to(dtype), sync_batch_norm=False)
        return list(gradients(create_loader(Shard(context.env.rank, 2)), forward, model))

    rank0, rank1 = run_on_ranks(work)
    model = create_plain_model().to(dtype)
    expected = list(gradients(create_loader(Shard()), model, model))
    assert len(expected) == len(rank0) == 4
    for gradient, other, single in zip(rank0, rank1, expected, strict=True):
        assert torch.equal(gradient, other)
        assert (gradient - single).norm() <= tolerance * single.norm()


@posix_only
@pytest.mark.parametrize("world_size", [2, 3])
def test_validation_metrics_of_several_ranks_equal_those_of_one_process(run_on_ranks, world_size):
    """Exactly, also if batches differ in size and some ranks have none in the last turn."""

    def metrics(shard):
        torch.manual_seed(2)
        model = create_model(num_classes=10, name="hybrid_resnet", width=2)
        evaluator = create_evaluator(model, create_forward(model, CPU, torch.float32))
        attach_metrics(evaluator, nn.functional.cross_entropy, CPU)
        return evaluator.run(EvalLoader(DATASET, batch_size=13, augment=AugmentConfig(), shard=shard)).metrics

    expected = metrics(Shard())
    assert run_on_ranks(lambda _: metrics(Shard.current()), world_size) == [expected] * world_size


@pytest.mark.parametrize("sync_batch_norm", [False, True])
def test_wrap_ddp_synchronizes_batch_norm_if_requested(monkeypatch, sync_batch_norm):
    """Only the request to Ignite: torch synchronizes BatchNorm between GPUs only."""
    requested = {}
    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    model = create_plain_model()
    monkeypatch.setattr(collectives.idist, "auto_model", lambda module, **options: requested.update(options) or module)
    wrap_ddp(model, model, IMAGES, sync_batch_norm=sync_batch_norm)
    assert requested["sync_bn"] == sync_batch_norm


def test_sync_batch_norm_between_cpus_is_refused(monkeypatch):
    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    with pytest.raises(InputError, match=r"train\.sync_batch_norm: requires GPUs"):
        check_sync_batch_norm(CPU)
    check_sync_batch_norm(torch.device("cuda"))

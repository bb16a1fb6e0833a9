"""Device operators per iteration: at small batches, launching them takes longer on a GPU than their arithmetic.

They are counted on the CPU. Views, allocations and host reads launch nothing; the host draws of CutMix do count here.
"""

from collections import Counter
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine
from torch.utils._python_dispatch import TorchDispatchMode

from cifar_ignite.augment.pipeline import create_pipeline
from cifar_ignite.config import OptimizerConfig, TrainConfig
from cifar_ignite.config_io import load_config
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.data.loaders import TrainLoader
from cifar_ignite.models.registry import create_model
from cifar_ignite.training.handlers import attach_grad_clipping
from cifar_ignite.training.optimizers import create_optimizer
from tests.training.helpers import NO_SCALER, create_sgd

CONFIGS = Path(__file__).parents[2] / "configs"
LAUNCHES_NOTHING = ("aten::empty", "aten::_local_scalar_dense", "aten::_unsafe_view", "profiler::")


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that launch work on the device."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and not function.name().startswith(LAUNCHES_NOTHING):
            self.counts[function.name()] += 1
        return function(*args, **(kwargs or {}))


def count_operators(function, *arguments):
    """Return the number of operators in the second call; the first one creates cached constants."""
    function(*arguments)
    with OperatorCounter() as counter:
        function(*arguments)
    return counter.counts.total()


def set_gradients(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


def create_channels_last_model(**options):
    return create_model("se_resnet", num_classes=10, **options).to(memory_format=torch.channels_last)


def test_counter_counts_arithmetic_but_no_views():
    tensor = torch.zeros(2, 3)
    assert (
        count_operators(lambda: (tensor.T.flatten(), tensor[0].view(3, 1).expand(3, 4), torch.empty(2), len(tensor)))
        == 1
    )
    assert count_operators(lambda: (tensor + 1).mul_(2).sum().item()) == 3


def test_muon_has_at_most_170_operators():
    model = create_channels_last_model()
    optimizer = create_optimizer(OptimizerConfig(name="muon"), model, torch.float32)
    optimizer.found_inf = torch.zeros(())

    def step():
        set_gradients(model)
        optimizer.step()

    gradients = count_operators(set_gradients, model)
    assert gradients == len(list(model.parameters()))
    assert count_operators(step) - gradients <= 170


@pytest.mark.parametrize(
    ("recipe", "changes", "limit"),
    [("se", {"cutmix_p": 1.0}, 110), ("se", {"cutmix_p": 0.0}, 95), ("se_best", {}, 130), ("se_fast", {}, 20)],
)
def test_augmentation_has_limited_number_of_operators(recipe, changes, limit):
    config = load_config(CONFIGS / f"{recipe}.json").augment.model_copy(update=changes)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    flip_mask = torch.zeros(8, dtype=torch.bool)
    assert count_operators(create_pipeline(config, 10), images, torch.arange(8), flip_mask) <= limit


@pytest.mark.parametrize(("clip_grad_norm", "limit"), [(None, 10), (1.0, 15)])
def test_grad_clipping_has_at_most_15_operators(clip_grad_norm, limit):
    model, engine = create_channels_last_model(width=4), Engine(lambda engine, batch: None)
    optimizer = create_sgd(model.parameters())
    handlers = []
    engine.add_event_handler = lambda event, handler: handlers.append(handler)
    options = TrainConfig(clip_grad_norm=clip_grad_norm, log_every=10)
    attach_grad_clipping(engine, model, optimizer, NO_SCALER, options)
    set_gradients(model)
    assert count_operators(handlers[0], engine) <= limit


def test_train_loader_gathers_labels_once_per_epoch():
    """A batch takes one operator, the selection of its images, whatever its transform does."""
    dataset = ImageDataset(
        torch.zeros(40, 3, 4, 4, dtype=torch.uint8), torch.arange(40) % 2, list(range(40)), ("a", "b")
    )
    batches = iter(TrainLoader(dataset, batch_size=4, seed=0, transform=lambda images, labels, *_: (images, labels)))
    assert count_operators(next, batches) == 1

"""Initial model, and what the state of a run saves and restores."""

import pytest
import torch
from torch import nn

from cifar_ignite.checkpointing.run_record import RunRecord
from cifar_ignite.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from cifar_ignite.data.dataset import train_val_split
from cifar_ignite.data.loaders import create_loaders
from cifar_ignite.data.registry import load_dataset
from cifar_ignite.errors import InputError
from cifar_ignite.models.registry import MODELS
from cifar_ignite.training.state import TrainingState, create_initial_model
from tests.training.helpers import CPU


def flat_net(*, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes))


def initial_weights(**options):
    model = create_initial_model(Config(model=ModelConfig(width=2), **options), 10, CPU)
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


def create_state(config, tmp_path):
    """Return the state of a run on the CPU."""
    train_set, val_set = train_val_split(load_dataset(config.data, train=True), config.data.val_size, 0)
    model = create_initial_model(config, 10, CPU)
    loaders = create_loaders(config, train_set, val_set, CPU)
    return TrainingState(config, model, loaders, RunRecord("run", {}, []), tmp_path)


def test_initial_model_depends_on_seed_only():
    torch.manual_seed(1)
    first = initial_weights()
    torch.manual_seed(2)
    assert torch.equal(initial_weights(optimizer=OptimizerConfig(name="muon")), first)
    assert not torch.equal(initial_weights(seed=1), first)


def test_initial_model_is_in_channels_last():
    model = create_initial_model(Config(model=ModelConfig(width=2)), 10, CPU)
    assert model.stages[0].residual[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"optimizer": OptimizerConfig(name="muon")}, "optimizer.name"),
        ({"train": TrainConfig(drop_path_decay_fraction=0.5)}, "train.drop_path_decay_fraction"),
    ],
)
def test_initial_model_that_lacks_something_required_is_refused(monkeypatch, options, key):
    monkeypatch.setitem(MODELS, "flat_net", flat_net)
    with pytest.raises(InputError, match=rf"^{key}: flat_net has no "):
        create_initial_model(Config(model=ModelConfig(name="flat_net"), **options), 10, CPU)


def test_state_saves_only_what_the_run_has(tiny_config, tmp_path):
    required = {"model", "optimizer", "trainer", "metrics", "timer", "record"}
    without_validation = create_state(tiny_config(data={"val_size": 0}), tmp_path)
    assert without_validation.to_save().keys() == required
    assert without_validation.evaluator is None
    everything = tiny_config(train={"ema_decay": 0.9, "patience": 5}, precision="fp16")
    expected = required | {"ema", "scaler", "best", "early_stopping"}
    assert create_state(everything, tmp_path).to_save().keys() == expected


def test_state_evaluates_ema_model_if_there_is_one(tiny_config, tmp_path):
    state = create_state(tiny_config(), tmp_path)
    assert state.eval_model is state.model
    state = create_state(tiny_config(train={"ema_decay": 0.9}), tmp_path)
    assert state.eval_model is state.ema_model
    assert state.best.to_save["model"] is state.ema_model

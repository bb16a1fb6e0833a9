"""CUDA graphs without a GPU: what is recorded when, and that recorded functions give the results of the functions."""

import copy
import logging

import pytest
import torch

from cifar_ignite import cuda_graphs
from cifar_ignite.augment import pipeline
from cifar_ignite.config import AugmentConfig, Config, DataConfig, OptimizerConfig
from cifar_ignite.cuda_graphs import record_cuda_graph
from cifar_ignite.data import loaders
from cifar_ignite.data.registry import load_dataset
from cifar_ignite.models.registry import create_model
from cifar_ignite.training import muon
from cifar_ignite.training.optimizers import create_optimizer
from tests.helpers.cuda_graphs import graph_in_static_memory
from tests.training.fake_cuda import CUDA, fake_cuda
from tests.training.helpers import CPU


@pytest.fixture
def recorded(monkeypatch):
    """Record graphs on the CPU; returns the list of the inputs of all recordings."""
    recordings = []

    def record(function, *inputs):
        recordings.append(inputs)
        graph = graph_in_static_memory(function, tuple(tensor.clone() for tensor in inputs))
        return lambda *tensors: graph(*tensors).clone()

    for module in (pipeline, muon):
        monkeypatch.setattr(module, "record_cuda_graph", record)
    return recordings


# --- Recording ----------------------------------------------------------------------------------------------------


def test_function_on_cpu_is_returned_unchanged():
    assert record_cuda_graph(torch.neg, torch.ones(2)) is torch.neg


def test_graph_is_recorded_on_copies_and_its_result_is_copied(monkeypatch):
    calls = []

    def make_graph(function, inputs):
        calls.append(inputs)
        return lambda *tensors: inputs[0]

    with fake_cuda():
        sample = torch.ones(2, device=CUDA)
        monkeypatch.setattr(cuda_graphs.torch.cuda, "make_graphed_callables", make_graph)
        result = record_cuda_graph(torch.neg, sample)(sample)
        assert calls[0][0] is not sample
        assert result is not calls[0][0]


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted\nand more"), torch.OutOfMemoryError("full")])
def test_failure_is_logged_and_function_returned_unless_memory_is_full(monkeypatch, caplog, error):
    def fail(function, inputs):
        raise error

    with fake_cuda():
        monkeypatch.setattr(cuda_graphs.torch.cuda, "make_graphed_callables", fail)
        sample = torch.ones(2, device=CUDA)
        if isinstance(error, torch.OutOfMemoryError):
            with pytest.raises(torch.OutOfMemoryError):
                record_cuda_graph(torch.neg, sample)
            return
        with caplog.at_level(logging.WARNING, "cifar_ignite"):
            assert record_cuda_graph(torch.neg, sample) is torch.neg
    assert "no CUDA graph (operation not permitted)" in caplog.text


# --- Augmentation -------------------------------------------------------------------------------------------------


def create_loader(dataset, data, augment, **options):
    config = Config(data=data, augment=augment, **options)
    return loaders.create_loaders(config, dataset, dataset, CPU)[0]


@pytest.mark.parametrize("strong_off_fraction", [0.0, 0.5])
def test_batches_are_those_without_graph(recorded, strong_off_fraction):
    """Two epochs of two complete batches and a smaller one, with random numbers of both kinds of generators."""
    data = DataConfig(dataset="synthetic", batch_size=16, synthetic={"train_size": 40})
    augment = AugmentConfig(
        crop_padding=2, trivial_augment="wide", cutmix_p=0.5, strong_off_fraction=strong_off_fraction
    )
    dataset = load_dataset(data, train=True)
    expected = create_loader(dataset, data, augment, compile="off", train={"epochs": 2})
    assert recorded == []
    graphed = create_loader(dataset, data, augment, train={"epochs": 2})
    assert [len(inputs[0]) for inputs in recorded] == [16] * (2 if strong_off_fraction else 1)
    batches = [[*expected, *expected], [*graphed, *graphed]]
    for (images, targets), (other_images, other_targets) in zip(*batches, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(targets, other_targets)


def test_no_graph_for_dataset_smaller_than_batch_or_in_several_processes(recorded, monkeypatch):
    data = DataConfig(dataset="synthetic", batch_size=16, synthetic={"train_size": 12})
    create_loader(load_dataset(data, train=True), data, AugmentConfig())
    data = DataConfig(dataset="synthetic", batch_size=16, synthetic={"train_size": 40})
    monkeypatch.setattr(loaders.Shard, "current", lambda: loaders.Shard(0, 2))
    create_loader(load_dataset(data, train=True), data, AugmentConfig())
    assert recorded == []


# --- Muon ---------------------------------------------------------------------------------------------------------


def make_steps(model, optimizer, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (seed + 1)  # as a schedule does
        optimizer.found_inf = torch.tensor(float(seed == 2))
        optimizer.step()


def test_muon_makes_updates_of_muon_without_graph(recorded):
    """Also after its state is loaded, as on resuming: the graph must not use the buffers from before."""
    model = create_model("hybrid_resnet", num_classes=10, width=4).to(memory_format=torch.channels_last)
    other = copy.deepcopy(model)
    config = OptimizerConfig(name="muon")
    graphed = create_optimizer(config, model, torch.float32, use_cuda_graph=True)
    expected = create_optimizer(config, other, torch.float32)
    for seeds in ((0, 1, 2, 3), (4, 5)):
        make_steps(model, graphed, seeds)
        make_steps(other, expected, seeds)
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True))
        graphed.load_state_dict(copy.deepcopy(graphed.state_dict()))
    assert len(recorded) == 2

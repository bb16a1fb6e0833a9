"""CUDA graphs without a GPU: what is recorded when, and that recorded functions give the results of the functions."""

import contextlib
import copy
import gc
import logging
import math
from types import SimpleNamespace

import pytest
import torch

from cifar_ignite.augment import pipeline
from cifar_ignite.config import AugmentConfig, Config, DataConfig, OptimizerConfig
from cifar_ignite.config_io import load_config
from cifar_ignite.cuda_graphs import record_cuda_graph
from cifar_ignite.data import loaders
from cifar_ignite.data.registry import load_dataset
from cifar_ignite.errors import TrainingError
from cifar_ignite.models.registry import create_model
from cifar_ignite.train import train
from cifar_ignite.training import forward, muon, state
from cifar_ignite.training.forward import uses_cuda_graphs
from cifar_ignite.training.optimizers import create_optimizer
from tests.helpers.cuda_graphs import record_in_static_memory
from tests.training.fake_cuda import CUDA, fake_cuda
from tests.training.helpers import CPU, CPU_OVERRIDES


class Recorder(list):
    """Stands in for `record_cuda_graph` on the CPU; the list of the inputs of all recordings.

    Attributes:
        during_replay: Context of each call of a recorded function, in which a graph does not see what the host does.
    """

    during_replay = contextlib.nullcontext

    def __call__(self, function, *inputs):
        self.append(inputs)
        graph = record_in_static_memory(function, *inputs)

        def replay(*tensors):
            with self.during_replay():
                return graph(*tensors)

        return replay


@pytest.fixture
def recorded(monkeypatch):
    recorder = Recorder()
    for module in (pipeline, muon):
        monkeypatch.setattr(module, "record_cuda_graph", recorder)
    return recorder


# --- Recording ----------------------------------------------------------------------------------------------------


class FakeDriver:
    """Stands in for torch's functions about streams and generators, which need a GPU."""

    def __init__(self, monkeypatch):
        self.stream, self.streams, self.forked = SimpleNamespace(device=CUDA), [], []
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.stream)
        monkeypatch.setattr(torch.cuda, "set_stream", self.streams.append)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.random, "fork_rng", self.fork_rng)

    @contextlib.contextmanager
    def fork_rng(self, devices):
        self.forked.append(devices)
        try:
            yield
        finally:
            self.forked.pop()

    def record(self, monkeypatch, make_graph):
        def make(function, inputs):
            assert self.forked == [[CUDA]]  # random numbers of the recording are not those of the training
            assert not torch.is_grad_enabled()
            assert not gc.isenabled()
            return make_graph(function, inputs)

        monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
        self.sample = torch.ones(2, device=CUDA)
        return record_cuda_graph(torch.neg, self.sample)


@pytest.fixture
def driver(monkeypatch):
    with fake_cuda():
        yield FakeDriver(monkeypatch)


def test_function_on_cpu_is_returned_unchanged():
    assert record_cuda_graph(torch.neg, torch.ones(2)) is torch.neg


def test_graph_is_recorded_on_copies_and_its_result_is_copied(driver, monkeypatch):
    memory = []

    def make_graph(function, inputs):
        memory.extend(inputs)
        return lambda *tensors: inputs[0]

    result = driver.record(monkeypatch, make_graph)(driver.sample)
    assert gc.isenabled()
    assert memory[0] is not driver.sample
    assert result is not memory[0]


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted\nand more"), torch.OutOfMemoryError("full")])
def test_failed_recording_is_logged_and_function_returned(driver, monkeypatch, caplog, error):
    def fail(function, inputs):
        raise error

    def draw(*size, device):
        assert driver.forked == [[CUDA]]
        draws.append(device)

    draws = []
    monkeypatch.setattr(torch, "rand", draw)
    with caplog.at_level(logging.WARNING, "cifar_ignite"):
        assert driver.record(monkeypatch, fail) is torch.neg
    assert "no CUDA graph" in caplog.text
    assert driver.streams == [driver.stream]  # torch may have left it
    assert draws == [CUDA]
    assert gc.isenabled()


def test_failed_recording_that_broke_generator_ends_run(driver, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("Offset increment outside graph capture")

    monkeypatch.setattr(torch, "rand", fail)
    with pytest.raises(TrainingError, match="compile=off"):
        driver.record(monkeypatch, fail)


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
    graphed = create_loader(dataset, data, augment, train={"epochs": 2})
    batches = [[*expected, *expected], [*graphed, *graphed]]
    assert [len(inputs[0]) for inputs in recorded] == [16] * (2 if strong_off_fraction else 1)
    for (images, targets), (other_images, other_targets) in zip(*batches, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(targets, other_targets)


def test_no_graph_of_smaller_batch_or_with_compile_off_or_in_several_processes(recorded, monkeypatch):
    data = DataConfig(dataset="synthetic", batch_size=16, synthetic={"train_size": 12})
    list(create_loader(load_dataset(data, train=True), data, AugmentConfig()))
    data = DataConfig(dataset="synthetic", batch_size=16, synthetic={"train_size": 40})
    list(create_loader(load_dataset(data, train=True), data, AugmentConfig(), compile="off"))
    monkeypatch.setattr(loaders.Shard, "current", lambda: loaders.Shard(0, 2))
    list(create_loader(load_dataset(data, train=True), data, AugmentConfig()))
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

    @contextlib.contextmanager
    def without_learning_rate():  # a graph has that of its recording
        group = graphed.param_groups[-1]
        lr, group["lr"] = group["lr"], math.nan
        yield
        group["lr"] = lr

    recorded.during_replay = without_learning_rate
    for seeds in ((0, 1, 2, 3), (4, 5)):
        make_steps(model, graphed, seeds)
        make_steps(other, expected, seeds)
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True))
        graphed.load_state_dict(copy.deepcopy(graphed.state_dict()))
    assert len(recorded) == 2


def test_muon_records_again_if_momentum_changes_or_weight_moves(recorded):
    model = create_model("se_resnet", num_classes=10, width=2)
    optimizer = create_optimizer(OptimizerConfig(name="muon"), model, torch.float32, use_cuda_graph=True)
    make_steps(model, optimizer, (0, 1))
    assert len(recorded) == 1
    optimizer.param_groups[-1]["momentum"] = 0.5
    make_steps(model, optimizer, (3,))
    assert len(recorded) == 2
    weight = model.stem[0].weight
    weight.data = weight.data.clone()
    before = weight.detach().clone()
    make_steps(model, optimizer, (4,))
    assert len(recorded) == 3
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("is_used", [True, False])
def test_training_records_update_of_muon_if_graphs_are_used(recorded, monkeypatch, tmp_path, is_used):
    """With one update; the augmentation of its only, smaller batch is not recorded."""
    monkeypatch.setattr(state, "uses_cuda_graphs", lambda config, device: is_used)
    overrides = [*CPU_OVERRIDES, f"output_dir={tmp_path}", "data.batch_size=64", "train.epochs=1"]
    train(load_config("se_fast", overrides))
    assert len(recorded) == is_used


def test_graphs_are_used_on_gpu_in_single_process_unless_compile_is_off(monkeypatch):
    assert [uses_cuda_graphs(Config(compile=mode), CUDA) for mode in ("auto", "on", "off")] == [True, True, False]
    assert not uses_cuda_graphs(Config(), CPU)
    monkeypatch.setattr(forward, "is_single_process", lambda: False)
    assert not uses_cuda_graphs(Config(), CUDA)

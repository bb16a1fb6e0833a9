"""Compilation of the training pass: when, with which result, and what a failure does."""

import copy

import ignite.distributed as idist
import pytest
import torch

from cifar_ignite.config import Config, DataConfig, TrainConfig
from cifar_ignite.config_io import load_config
from cifar_ignite.data.loaders import create_loaders
from cifar_ignite.data.registry import load_dataset
from cifar_ignite.errors import TrainingError
from cifar_ignite.models.registry import create_model
from cifar_ignite.train import train
from cifar_ignite.training import forward as forward_module
from cifar_ignite.training.forward import (
    create_forward,
    create_training_forward,
    should_compile,
    warmup_compiled_forward,
)
from tests.training.helpers import CPU, CPU_OVERRIDES, relative_error

CUDA = torch.device("cuda")


def refusing_compile(model, **options):
    """Stand in for torch.compile with a version of Python that it does not support."""
    raise RuntimeError("no compiler")


def broken_compile(model, **options):
    """Stand in for torch.compile on a machine without a compiler."""

    def call(*arguments):
        raise RuntimeError("no compiler\nand a long explanation")

    return call


def test_compiled_forward_equals_eager_and_warmup_restores_model():
    torch.manual_seed(0)
    model = create_model("se_resnet", num_classes=10, width=4, dropout=0.0)
    images = torch.randn(16, 3, 32, 32)
    before = copy.deepcopy(model.state_dict())
    compiled = create_forward(model, CPU, torch.float32, compiled_batch=16)

    def checked(images):
        # A CUDA graph would overwrite gradients of an earlier pass.
        assert all(parameter.grad is None for parameter in model.parameters())
        return compiled(images)

    assert warmup_compiled_forward(model, checked, torch.zeros(16, 3, 32, 32)) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    eager = copy.deepcopy(model).train()
    model.train()
    assert relative_error(compiled(images), eager(images)) < 1e-5
    assert relative_error(model.stem[1].running_mean, eager.stem[1].running_mean) < 1e-5
    # Other batch sizes, such as that of the last batch, are not compiled.
    assert torch.equal(compiled(images[:5]), eager(images[:5]))


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_should_compile_auto_compiles_long_trainings(device):
    assert [should_compile(Config(), device, iterations) for iterations in (1_999, 2_000)] == [False, True]


def test_should_compile_auto_leaves_out_what_was_never_measured(monkeypatch):
    assert not should_compile(Config(), torch.device("mps"), 10**6)
    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    assert should_compile(Config(), CPU, 10**6)
    assert not should_compile(Config(), CUDA, 10**6)
    assert should_compile(Config(compile="on"), CUDA, 1)


def test_compiled_model_on_gpu_is_deterministic_cuda_graph(monkeypatch):
    """Options that Inductor does not know would raise here."""
    requested = {}

    def recorder(model, **options):
        requested.update(options)
        return compile_(model, **options)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", recorder)
    create_forward(create_model("se_resnet", num_classes=10, width=2), CUDA, torch.float32, compiled_batch=2)
    cuda_graphs = torch._inductor.list_mode_options("reduce-overhead")
    assert requested["options"] == cuda_graphs | {"deterministic": True}


def test_should_compile_follows_explicit_request():
    assert should_compile(Config(compile="on"), CUDA, 1)
    assert not should_compile(Config(compile="off"), CPU, 10**6)


@pytest.mark.parametrize("options", [{"drop_path_decay_fraction": 0.5}, {"sync_batch_norm": True}])
def test_should_compile_is_false_with_incompatible_options(options):
    assert not should_compile(Config(train=TrainConfig(**options)), CPU, 10**6)


@pytest.mark.parametrize(
    ("mode", "compiler"), [("auto", broken_compile), ("auto", refusing_compile), ("on", broken_compile)]
)
def test_failing_compiler_ends_run_only_if_compilation_was_requested(command, tiny_file, monkeypatch, mode, compiler):
    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(forward_module, "MIN_COMPILED_ITERATIONS", 1)
    status, out, err = command("train", "--config", tiny_file, "--set", f"compile={mode}")
    message = "torch.compile failed (no compiler); use compile=off"
    if mode == "on":
        assert status == 1
        assert err.startswith(f"cifar_ignite: {message}")
    else:
        assert status == 0
        assert f"{message}; continuing without compilation" in out


def test_warmup_with_failing_compiler_restores_model():
    model = create_model("se_resnet", num_classes=10, width=2)
    before = copy.deepcopy(model.state_dict())

    def fail_late(images):
        model(images)  # changes the statistics of BatchNorm
        raise RuntimeError("no compiler")

    with pytest.raises(TrainingError, match="compile=off"):
        warmup_compiled_forward(model, fail_late, torch.zeros(4, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_training_forward_of_dataset_smaller_than_batch_is_eager(monkeypatch):
    """No batch would have the compiled size."""
    monkeypatch.setattr(torch, "compile", broken_compile)
    data = DataConfig(dataset="synthetic", batch_size=128, synthetic={"train_size": 20})
    config = Config(compile="on", data=data)
    dataset = load_dataset(data, train=True)
    loader, _ = create_loaders(config, dataset, dataset, CPU)
    model = create_model("se_resnet", num_classes=10, width=2)
    logits = create_training_forward(config, model, loader, torch.float32)(torch.zeros(2, 3, 32, 32))
    assert logits.shape == (2, 10)


def test_every_training_of_a_process_is_compiled(tmp_path, monkeypatch):
    """Beyond Dynamo's limit of recompilations, here one, which counts the code of all models of a class together."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(forward_module, "MIN_COMPILED_ITERATIONS", 1)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic, **_: compile_(function, backend=backend))
    counts = []
    with torch._dynamo.config.patch(recompile_limit=1):
        for dropout in (0.1, 0.2):
            overrides = [*CPU_OVERRIDES, f"output_dir={tmp_path}", "compile=auto", f"model.dropout={dropout}"]
            train(load_config("se_fast", [*overrides, "train.epochs=1"]))
            counts.append(len(graphs))
    assert 0 < counts[0] < counts[1]

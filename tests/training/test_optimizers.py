"""The optimizer's parameter groups and its first update."""

import math

import pytest
import torch
from torch import nn

from cifar_ignite.config import OptimizerConfig
from cifar_ignite.models.registry import create_model
from cifar_ignite.training import optimizers
from cifar_ignite.training.optimizers import create_optimizer, find_conv_weights

NAMES = pytest.mark.parametrize("name", ["sgd", "muon"])


def create_tiny_model():
    torch.manual_seed(0)
    return create_model("hybrid_resnet", num_classes=10, width=2)


@NAMES
def test_optimizer_has_every_parameter_in_one_group(name):
    model = create_tiny_model()
    optimizer = create_optimizer(OptimizerConfig(name=name), model, torch.float32)
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))


def test_find_conv_weights_returns_all_convolutions_followed_by_batchnorm():
    model = create_tiny_model()
    num_norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert len(find_conv_weights(model)) == num_norms


@NAMES
def test_optimizer_leaves_frozen_parameters_out(name):
    model = create_tiny_model()
    frozen = model.stem[0].weight.requires_grad_(False)
    optimizer = create_optimizer(OptimizerConfig(name=name), model, torch.float32)
    grouped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert grouped == {id(parameter) for parameter in model.parameters()} - {id(frozen)}


@pytest.mark.parametrize(("decay_norm_and_bias", "expected"), [(True, 0.1), (False, 0.0)])
def test_optimizer_decays_norm_and_bias_only_if_configured(decay_norm_and_bias, expected):
    config = OptimizerConfig(weight_decay=0.1, decay_norm_and_bias=decay_norm_and_bias)
    weights, vectors = create_optimizer(config, create_tiny_model(), torch.float32).param_groups
    assert weights["weight_decay"] == 0.1
    assert vectors["weight_decay"] == expected
    assert all(parameter.ndim > 1 for parameter in weights["params"])
    assert all(parameter.ndim == 1 for parameter in vectors["params"])


@NAMES
def test_update_after_skipped_one_equals_first_update(name):
    """torch's SGD creates momentum buffers in its first update, and leaves them uninitialized if that is skipped."""
    results = []
    for num_skipped in (0, 1):
        model = create_tiny_model()
        optimizer = create_optimizer(OptimizerConfig(name=name, momentum=0.9), model, torch.float32)
        for found_inf in [1.0] * num_skipped + [0.0]:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, math.nan if found_inf else 0.1)
            optimizer.found_inf = torch.tensor(found_inf)
            optimizer.step()
        results.append(list(model.parameters()))
        assert all(state["momentum_buffer"].isfinite().all() for state in optimizer.state.values())
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@NAMES
@pytest.mark.parametrize(
    ("skips", "amp_dtype", "is_fused"),
    [(True, torch.float16, True), (False, torch.float16, False), (False, torch.float32, True)],
)
def test_optimizer_is_fused_unless_scaler_must_skip_updates_on_host(monkeypatch, name, skips, amp_dtype, is_fused):
    monkeypatch.setattr(optimizers, "skips_updates", lambda device: skips)
    optimizer = create_optimizer(OptimizerConfig(name=name), create_tiny_model(), amp_dtype)
    assert {group["fused"] for group in optimizer.param_groups} == {is_fused}

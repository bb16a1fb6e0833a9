"""The networks: sizes, shapes, options, and stochastic depth as in the paper."""

import pytest
import torch
from torch import nn
from torchvision.ops import SqueezeExcitation, StochasticDepth

from cifar_ignite.models import MODELS, create_model
from cifar_ignite.models.resnet import BasicBlock, ResNetConfig

PARAMETERS = {"se_resnet": 2_820_390, "stochastic_resnet": 2_797_610, "hybrid_resnet": 2_820_390}


def test_parameter_counts_are_the_documented_ones():
    assert MODELS.keys() == PARAMETERS.keys()
    for name, count in PARAMETERS.items():
        assert sum(p.numel() for p in create_model(name, num_classes=10).parameters()) == count


def test_state_dict_keys_stay_the_same_between_versions():
    keys = list(create_model("hybrid_resnet", num_classes=10, width=2).state_dict())
    assert keys[0] == "stem.0.weight"
    assert keys[-2:] == ["head.3.weight", "head.3.bias"]
    assert "stages.2.shortcut.0.weight" in keys
    assert "stages.7.residual.5.fc2.bias" in keys


@pytest.mark.parametrize("name", PARAMETERS)
def test_forward_and_backward_reach_all_parameters(name):
    model = create_model(name, num_classes=7, width=4)
    logits = model(torch.randn(3, 3, 32, 32))
    assert logits.shape == (3, 7)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "has_se", "has_depth"),
    [("se_resnet", True, False), ("stochastic_resnet", False, True), ("hybrid_resnet", True, True)],
)
def test_models_contain_squeeze_excitation_and_stochastic_depth(name, has_se, has_depth):
    model = create_model(name, num_classes=10)
    types = [type(module) for module in model.modules()]
    assert (SqueezeExcitation in types, StochasticDepth in types) == (has_se, has_depth)
    assert types.count(nn.Dropout) == 1
    assert types.count(BasicBlock) == 8
    tail = [SqueezeExcitation] * has_se + [StochasticDepth] * has_depth
    block_types = [type(module) for module in model.stages[0].residual]
    assert block_types == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d, *tail]


def test_options_have_documented_defaults_and_effects():
    model = create_model("hybrid_resnet", num_classes=10)
    assert (model.stem[0].out_channels, model.head[2].p) == (32, 0.3)
    assert model.stages[0].residual[5].fc1.out_channels == 32 // 16
    assert model.stages[7].residual[6].p == 0.2
    changed = create_model("hybrid_resnet", num_classes=10, width=8, dropout=0.1, se_reduction=4, drop_path_rate=0.4)
    assert (changed.stem[0].out_channels, changed.head[2].p) == (8, 0.1)
    assert changed.stages[0].residual[5].fc1.out_channels == 2
    assert changed.stages[7].residual[6].p == 0.4


@pytest.mark.parametrize("name", ["se_resnet", "stochastic_resnet"])
def test_dropout_has_documented_default_and_effect(name):
    assert create_model(name, num_classes=10).head[2].p == 0.3
    assert create_model(name, num_classes=10, dropout=0.1).head[2].p == 0.1


def test_drop_probs_rise_linearly_to_drop_path_rate():
    model = create_model("stochastic_resnet", num_classes=10, drop_path_rate=0.2)
    drop_probs = [module.p for module in model.modules() if isinstance(module, StochasticDepth)]
    assert drop_probs == pytest.approx([0.025 * (block + 1) for block in range(8)])


def test_drop_path_rate_does_not_affect_evaluation():
    """The same weights give the same logits for every rate, and the rate adds no parameters."""
    torch.manual_seed(0)
    without = create_model("hybrid_resnet", num_classes=10, width=4, drop_path_rate=0.0).eval()
    dropping = create_model("hybrid_resnet", num_classes=10, width=4, drop_path_rate=0.9).eval()
    dropping.load_state_dict(without.state_dict())
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(without(images), dropping(images))


def test_training_drops_residual_branches_and_keeps_their_expectation():
    torch.manual_seed(0)
    block = BasicBlock(4, 4, 1, drop_prob=0.3, config=ResNetConfig()).eval()
    image = torch.randn(1, 4, 8, 8)
    branch = block.residual[:-1](image)
    depth = block.residual[-1].train()
    outputs = depth(branch.expand(20_000, -1, -1, -1))
    is_dropped = (outputs == 0).flatten(1).all(1)
    assert is_dropped.float().mean() == pytest.approx(0.3, abs=0.015)
    assert torch.allclose(outputs[~is_dropped], branch / 0.7, atol=1e-6)
    assert torch.allclose(outputs.mean(0), branch[0], atol=0.05 * branch.abs().max().item())


def test_dropped_block_is_relu_of_shortcut():
    block = BasicBlock(4, 8, 2, drop_prob=0.999999, config=ResNetConfig(se_reduction=2)).train()
    for parameter in block.shortcut.parameters():
        nn.init.normal_(parameter)
    image = torch.randn(16, 4, 8, 8)
    logits = block(image)
    assert torch.equal(logits, block.shortcut(image).relu())
    assert (block.shortcut(image) < 0).any()


@pytest.mark.parametrize("name", PARAMETERS)
def test_zero_init_residual_starts_blocks_as_shortcuts(name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=10, width=4, zero_init_residual=True, dropout=0.0)
    image = torch.randn(2, 3, 32, 32)
    for block in model.stages:
        assert not block.residual[4].weight.any()
    first = model.stages[0]
    assert torch.equal(first(model.stem(image)), model.stem(image))
    model(image).square().sum().backward()
    assert all(block.residual[4].weight.grad.any() for block in model.stages)
    assert all(block.residual[4].weight.all() for block in create_model(name, num_classes=10, width=4).stages)

"""The networks: sizes, shapes, and stochastic depth as the paper has it."""

import pytest
import torch
from torch import nn
from torchvision.ops import SqueezeExcitation, StochasticDepth

from cifar_ignite.config import InputError
from cifar_ignite.models import MODELS, create_model, describe_models, register_model
from cifar_ignite.models.resnet import BasicBlock

PARAMETERS = {"se_resnet": 2_820_390, "stochastic_resnet": 2_797_610, "hybrid_resnet": 2_820_390}


def test_parameter_counts():
    assert MODELS.keys() == PARAMETERS.keys()
    for name, count in PARAMETERS.items():
        assert sum(p.numel() for p in create_model(name, num_classes=10).parameters()) == count


def test_the_table_of_models():
    table = describe_models()
    assert "2,820,390" in table
    assert "2,797,610" in table
    assert table.count("139.3M") == 3


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_and_gradients(name):
    model = create_model(name, num_classes=7, width=4)
    logits = model(torch.randn(3, 3, 32, 32))
    assert logits.shape == (3, 7)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_is_in_which_model():
    for name, has_se, has_depth in (
        ("se_resnet", True, False),
        ("stochastic_resnet", False, True),
        ("hybrid_resnet", True, True),
    ):
        kinds = [type(module) for module in create_model(name, num_classes=10).modules()]
        assert (SqueezeExcitation in kinds, StochasticDepth in kinds) == (has_se, has_depth)
        assert kinds.count(nn.Dropout) == 1
        assert kinds.count(BasicBlock) == 8
        model = create_model(name, num_classes=10)
        assert model.head[2].p == 0.3
        assert create_model(name, num_classes=10, dropout=0.1).head[2].p == 0.1
        kinds = [type(module) for module in model.stages[0].residual]
        tail = [SqueezeExcitation] * has_se + [StochasticDepth] * has_depth
        assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d, *tail]


def test_drop_probabilities_rise_linearly_to_the_rate():
    model = create_model("stochastic_resnet", num_classes=10, drop_path_rate=0.2)
    drops = [module.p for module in model.modules() if isinstance(module, StochasticDepth)]
    assert drops == pytest.approx([0.025 * (block + 1) for block in range(8)])


def test_evaluation_ignores_the_rate():
    """The same weights give the same logits whatever the rate, and the rate adds no parameters."""
    torch.manual_seed(0)
    without = create_model("hybrid_resnet", num_classes=10, width=4, drop_path_rate=0.0).eval()
    dropping = create_model("hybrid_resnet", num_classes=10, width=4, drop_path_rate=0.9).eval()
    dropping.load_state_dict(without.state_dict())
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(without(images), dropping(images))


def test_training_drops_whole_branches_and_keeps_their_expectation():
    torch.manual_seed(0)
    block = BasicBlock(4, 4, 1, None, 0.3).eval()
    image = torch.randn(1, 4, 8, 8)
    branch = block.residual[:-1](image)
    depth = block.residual[-1].train()
    outputs = depth(branch.expand(20_000, -1, -1, -1))
    dropped = (outputs == 0).flatten(1).all(1)
    assert dropped.float().mean() == pytest.approx(0.3, abs=0.015)
    assert torch.allclose(outputs[~dropped], branch / 0.7, atol=1e-6)
    assert torch.allclose(outputs.mean(0), branch[0], atol=0.05 * branch.abs().max().item())


def test_a_dropped_block_is_its_shortcut_through_the_last_relu():
    block = BasicBlock(4, 8, 2, 2, 0.999999).train()
    for parameter in block.shortcut.parameters():
        nn.init.normal_(parameter)
    image = torch.randn(16, 4, 8, 8)
    out = block(image)
    assert torch.equal(out, block.shortcut(image).relu())
    assert (block.shortcut(image) < 0).any()


@pytest.mark.parametrize("name", PARAMETERS)
def test_residual_branches_can_begin_as_zero(name):
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


def test_unknown_models_and_options_are_named():
    with pytest.raises(InputError, match="no model 'resnet'; there are hybrid_resnet, se_resnet, stochastic_resnet"):
        create_model("resnet", num_classes=10)
    with pytest.raises(InputError, match="se_resnet has no such option; known: dropout, se_reduction, width"):
        create_model("se_resnet", num_classes=10, drop_path_rate=0.1)


def test_a_name_is_registered_once():
    def se_resnet(*, num_classes):
        raise AssertionError

    with pytest.raises(ValueError, match="already registered"):
        register_model(se_resnet)


def test_a_new_model_is_one_function_with_one_decorator(monkeypatch):
    monkeypatch.setattr("cifar_ignite.models.registry.MODELS", dict(MODELS))

    @register_model
    def linear(*, num_classes, dropout=0.0):
        return nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(3072, num_classes))

    assert create_model("linear", num_classes=10, dropout=None, width=None)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)

"""The model registry and the table of models."""

import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth
from typing_extensions import TypedDict, Unpack

from cifar_ignite.config import ModelConfig
from cifar_ignite.errors import InputError
from cifar_ignite.models import MODELS, create_model, format_model_table, register_model


@pytest.fixture
def scratch_registry(monkeypatch):
    monkeypatch.setattr("cifar_ignite.models.registry.MODELS", dict(MODELS))


def test_format_model_table_lists_sizes():
    table = format_model_table(10, 32)
    assert "2,820,390" in table
    assert "2,797,610" in table
    assert table.count("139.3M") == 3
    assert all(name in table for name in MODELS)


def test_create_model_with_unknown_name_lists_known_ones():
    with pytest.raises(InputError, match=r"model\.name: .*'resnet'.* hybrid_resnet, se_resnet, stochastic_resnet"):
        create_model("resnet", num_classes=10)


def test_create_model_with_unknown_option_names_key_and_known_ones():
    with pytest.raises(InputError, match=r"model\.drop_path_rate: se_resnet .* dropout, se_reduction, width, zero_"):
        create_model("se_resnet", num_classes=10, drop_path_rate=0.1)
    with pytest.raises(InputError, match=r"model\.widht: stochastic_resnet .*did you mean width\?"):
        create_model("stochastic_resnet", num_classes=10, widht=8)
    with pytest.raises(InputError, match=r"model\.se_reduction: stochastic_resnet"):
        create_model("stochastic_resnet", num_classes=10, se_reduction=8)


def test_hybrid_resnet_accepts_every_option_of_configuration():
    config = ModelConfig(
        name="hybrid_resnet", width=4, dropout=0.1, zero_init_residual=True, se_reduction=2, drop_path_rate=0.1
    )
    model = create_model(num_classes=10, **config.model_dump())
    assert model.stem[0].out_channels == 4
    assert max(module.p for module in model.modules() if isinstance(module, StochasticDepth)) == 0.1


def test_create_model_with_null_options_uses_defaults_of_builder():
    options = {name: None for name in ModelConfig.model_fields if name != "name"}
    for name in MODELS:
        model, default = create_model(name, num_classes=10, **options), MODELS[name](num_classes=10)
        assert str(model) == str(default)


def test_register_model_refuses_taken_name():
    def se_resnet(*, num_classes):
        raise AssertionError

    with pytest.raises(ValueError, match="already registered"):
        register_model(se_resnet)


@pytest.mark.usefixtures("scratch_registry")
def test_registered_function_with_keyword_options_is_created_by_its_name():
    @register_model
    def my_net(*, num_classes: int, width: int = 32, dropout: float = 0.3) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, width), nn.Dropout(dropout), nn.Linear(width, num_classes))

    model = create_model("my_net", num_classes=10, dropout=0.1, width=None, se_reduction=None)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert (model[1].out_features, model[2].p) == (32, 0.1)
    with pytest.raises(InputError, match=r"model\.se_reduction: my_net .*known: dropout, width"):
        create_model("my_net", num_classes=10, se_reduction=4)


@pytest.mark.usefixtures("scratch_registry")
def test_registered_function_with_typed_options_accepts_exactly_those():
    class Options(TypedDict, total=False):
        dropout: float

    class MoreOptions(Options, total=False):
        width: int

    @register_model
    def typed_net(*, num_classes: int, bias: bool = True, **options: Unpack[MoreOptions]) -> nn.Module:
        return nn.Linear(options.get("width", 2), num_classes, bias)

    assert create_model("typed_net", num_classes=10, width=3, dropout=0.1, bias=False).in_features == 3
    with pytest.raises(InputError, match=r"model\.options: typed_net .*known: bias, dropout, width"):
        create_model("typed_net", num_classes=10, options=1)

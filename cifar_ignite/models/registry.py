"""The model registry: a model is a function with the decorator `@register_model`."""

import inspect
from collections.abc import Callable
from typing import Any, get_args

import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import get_type_hints, is_typeddict

from cifar_ignite.config_io import suggest_name
from cifar_ignite.errors import InputError

ModelBuilder = Callable[..., nn.Module]
MODELS: dict[str, ModelBuilder] = {}


def register_model(builder: ModelBuilder) -> ModelBuilder:
    """Register a builder under the name of the function.

    The builder takes `num_classes` and keyword options with defaults, named as the fields of `ModelConfig`. Options may
    be parameters or the keys of a TypedDict: `**options: Unpack[MyOptions]`.

    Raises:
        ValueError: If the name is taken. The same function replaces itself: a cell of a notebook is run again.
    """
    registered = MODELS.get(builder.__name__, builder)
    if (registered.__module__, registered.__qualname__) != (builder.__module__, builder.__qualname__):
        raise ValueError(f"a model named {builder.__name__} is already registered")
    MODELS[builder.__name__] = builder
    return builder


def create_model(name: str, *, num_classes: int, **options: Any) -> nn.Module:
    """Create a registered model.

    Args:
        name: Key of `MODELS`.
        num_classes: Number of logits per image.
        options: Options of the builder; None selects the builder's default.

    Raises:
        InputError: If the model is unknown or does not have an option.
    """
    selected = select_options(name, **options)
    return MODELS[name](num_classes=num_classes, **selected)


def select_options(name: str, **options: Any) -> dict[str, Any]:
    """Return the options that are not None; arguments and errors are those of `create_model`."""
    if name not in MODELS:
        raise InputError(
            f"model.name: unknown model {name!r}; known: {', '.join(sorted(MODELS))}; import the module that registers "
            "any other one"
        )
    selected = {option: value for option, value in options.items() if value is not None}
    known = _option_names(MODELS[name])
    if unknown := sorted(selected.keys() - known):
        raise InputError(f"model.{unknown[0]}: {name} has no such option; {suggest_name(unknown[0], known)}")
    return selected


def _option_names(builder: ModelBuilder) -> set[str]:
    """Return the names of a builder's options: its parameters and the keys of an unpacked TypedDict."""
    names: set[str] = set()
    for name, parameter in inspect.signature(builder).parameters.items():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            names.add(name)
            continue
        for typed_dict in filter(is_typeddict, get_args(get_type_hints(builder).get(name))):
            names |= get_type_hints(typed_dict).keys()
    return names - {"num_classes"}


def format_model_table(num_classes: int, image_size: int) -> str:
    """Return a table of the registered models: parameters, multiply-adds per image, description.

    Args:
        num_classes: Number of logits per image.
        image_size: Side of the images in pixels.
    """
    rows = []
    for name in sorted(MODELS):
        with torch.device("meta"):  # shapes only, without memory or computation
            model = create_model(name, num_classes=num_classes).eval()
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(1, 3, image_size, image_size))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        description = (MODELS[name].__doc__ or "").strip().partition("\n")[0]  # no docstrings under python -OO
        rows.append((name, f"{parameters:,}", f"{counter.get_total_flops() / 2e6:.1f}M", description))
    return pd.DataFrame(rows, columns=["model", "parameters", "multiply-adds", "description"]).to_string(index=False)

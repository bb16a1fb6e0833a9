"""Models by name: a model is one function with one decorator."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from cifar_ignite.config import InputError, nearest

Builder = Callable[..., nn.Module]
MODELS: dict[str, Builder] = {}


def register_model(builder: Builder) -> Builder:
    """Make a builder available under its function name.

    The builder takes `num_classes` and keyword options with defaults, named as the fields of `ModelConfig`.

    Raises:
        ValueError: the name is taken.
    """
    if builder.__name__ in MODELS:
        raise ValueError(f"a model named {builder.__name__} is already registered")
    MODELS[builder.__name__] = builder
    return builder


def create_model(name: str, *, num_classes: int, **options: Any) -> nn.Module:
    """Build a registered model.

    Args:
        name: a key of `MODELS`.
        num_classes: logits an image.
        options: of the builder; None leaves an option at the builder's default.

    Raises:
        InputError: there is no such model, or the model has no such option.
    """
    if name not in MODELS:
        raise InputError(f"model.name: no model {name!r}; there are {', '.join(sorted(MODELS))}")
    given = {option: value for option, value in options.items() if value is not None}
    known = set(inspect.signature(MODELS[name]).parameters) - {"num_classes"}
    if foreign := sorted(given.keys() - known):
        raise InputError(f"model.{foreign[0]}: {name} has no such option; {nearest(foreign[0], known)}")
    return MODELS[name](num_classes=num_classes, **given)

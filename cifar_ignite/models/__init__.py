"""The catalogue. Importing a module of models registers what is in it."""

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from cifar_ignite.models import resnet
from cifar_ignite.models.registry import MODELS, create_model, register_model

__all__ = ["MODELS", "create_model", "describe_models", "register_model", "resnet"]


def describe_models() -> str:
    """A table of the registered models: parameters, and multiply-adds for one 3x32x32 image."""
    rows = []
    for name in sorted(MODELS):
        with torch.device("meta"):  # shapes only: nothing is allocated, nothing computed
            model = create_model(name, num_classes=10).eval()
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(1, 3, 32, 32))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        about = (MODELS[name].__doc__ or "").strip().splitlines()[0]
        rows.append((name, f"{parameters:,}", f"{counter.get_total_flops() / 2e6:.1f}M", about))
    return pd.DataFrame(rows, columns=["model", "parameters", "multiply-adds", "what it is"]).to_string(index=False)

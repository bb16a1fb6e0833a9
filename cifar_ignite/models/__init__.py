"""Models and their registry; importing a module with models registers them."""

from cifar_ignite.models import resnet
from cifar_ignite.models.registry import MODELS, create_model, format_model_table, register_model

__all__ = ["MODELS", "create_model", "format_model_table", "register_model", "resnet"]

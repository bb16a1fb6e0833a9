"""Train image-classification ResNets on PyTorch-Ignite: small, readable, fast.

The Python API: `from cifar_ignite import load_config, train, evaluate, predict, export, load_model`, and the parts that
stand alone. Its functions raise `InputError` and `TrainingError`, and log through `logging.getLogger("cifar_ignite")`.

A name is imported when it is first used: torch takes seconds to import, and `--help` does not need it.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cifar_ignite.augment.pipeline import BatchTransform as BatchTransform
    from cifar_ignite.augment.pipeline import create_train_transform as create_train_transform
    from cifar_ignite.config import Config as Config
    from cifar_ignite.config_io import load_config as load_config
    from cifar_ignite.data import load_dataset as load_dataset
    from cifar_ignite.data import register_dataset as register_dataset
    from cifar_ignite.data.dataset import ImageDataset as ImageDataset
    from cifar_ignite.data.dataset import train_val_split as train_val_split
    from cifar_ignite.data.file_dataset import ImageFiles as ImageFiles
    from cifar_ignite.data.loaders import EvalLoader as EvalLoader
    from cifar_ignite.data.loaders import TrainLoader as TrainLoader
    from cifar_ignite.errors import InputError as InputError
    from cifar_ignite.errors import TrainingError as TrainingError
    from cifar_ignite.errors import TrainingInterrupted as TrainingInterrupted
    from cifar_ignite.evaluate import evaluate as evaluate
    from cifar_ignite.evaluation.report import Evaluation as Evaluation
    from cifar_ignite.evaluation.trained_model import NormalizedModel as NormalizedModel
    from cifar_ignite.evaluation.trained_model import load_model as load_model
    from cifar_ignite.export import export as export
    from cifar_ignite.models import create_model as create_model
    from cifar_ignite.models import register_model as register_model
    from cifar_ignite.predict import Predictions as Predictions
    from cifar_ignite.predict import predict as predict
    from cifar_ignite.train import TrainResult as TrainResult
    from cifar_ignite.train import train as train

__version__ = "0.1.0"

_NAMES_BY_MODULE = {
    "augment.pipeline": ("BatchTransform", "create_train_transform"),
    "config": ("Config",),
    "config_io": ("load_config",),
    "data": ("load_dataset", "register_dataset"),
    "data.dataset": ("ImageDataset", "train_val_split"),
    "data.file_dataset": ("ImageFiles",),
    "data.loaders": ("EvalLoader", "TrainLoader"),
    "errors": ("InputError", "TrainingError", "TrainingInterrupted"),
    "evaluate": ("evaluate",),
    "evaluation.report": ("Evaluation",),
    "evaluation.trained_model": ("NormalizedModel", "load_model"),
    "export": ("export",),
    "models": ("create_model", "register_model"),
    "predict": ("Predictions", "predict"),
    "train": ("TrainResult", "train"),
}
_MODULES = {name: f"{__name__}.{module}" for module, names in _NAMES_BY_MODULE.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package, in which `train` is always the function: importing the module `train` does not replace it.

    The import system sets each submodule as an attribute of its package; lazy_loader of scientific-python guards its
    packages in the same way.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in _MODULES):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

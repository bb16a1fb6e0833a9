"""Loading a trained model from a checkpoint."""

import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar_ignite.augment.elementwise import memory_format
from cifar_ignite.checkpointing.best_model import best_model_path, list_best_models
from cifar_ignite.checkpointing.io import load_checkpoint
from cifar_ignite.checkpointing.run_record import RunRecord
from cifar_ignite.config import AugmentConfig, Config
from cifar_ignite.config_io import flatten_dict, parse_config
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.data.folder import list_classes
from cifar_ignite.errors import InputError, check_named
from cifar_ignite.files import latest_first
from cifar_ignite.models import create_model
from cifar_ignite.models.registry import select_options
from cifar_ignite.training.calibration import PLAIN
from cifar_ignite.training.device import select_device

# What the weights were trained for: with other values, predictions would be wrong without an error.
FIXED_KEYS = ("data.image_size", "augment.mean", "augment.std")
NO_TEMPERATURE = "the checkpoint has none (only best models of runs with validation images do)"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedModel:
    """A model with the weights of a checkpoint.

    Attributes:
        path: Checkpoint file.
        record: Run that wrote the checkpoint: its name, configuration, class names and history.
        config: Configuration of the run, with overrides and the current `output_dir`.
        device: Device selected by the configuration.
        model: Model in the device's `memory_format`, with EMA weights if the run kept them; on the CPU, because a rank
            knows its GPU only after the process group is initialized.
        temperatures: Temperatures of the logits by name of the test-time augmentation, or `PLAIN` (see
            `training.calibration`); empty if the checkpoint has none.
    """

    path: Path
    record: RunRecord
    config: Config
    device: torch.device
    model: nn.Module
    temperatures: dict[str, float] = field(default_factory=dict)

    def temperature(self, tta: str | None) -> float | None:
        """Return the temperature with a test-time augmentation; that without if it has none of its own, or None."""
        return self.temperatures.get(tta or PLAIN, self.temperatures.get(PLAIN))


class NormalizedModel(nn.Module):
    """A trained model with its normalization, in eval mode: float32 logits (N, num_classes) of images.

    The images are (N, 3, H, W), RGB, uint8, or float32 in [0, 1], on the device of the module; of the size as in
    training (`data.image_size`).

    Attributes:
        model: Model without the normalization.
        class_names: Names of the classes, in the order of the logits.
        temperature: Temperature of the logits: `(logits / temperature).softmax(1)` are calibrated probabilities; None
            if the checkpoint has none.
        mean: Float (1, 3, 1, 1), mean per channel that is subtracted.
        std: Float (1, 3, 1, 1), standard deviation per channel that images are divided by.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        augment: AugmentConfig,
        class_names: Sequence[str],
        temperature: float | None = None,
    ) -> None:
        super().__init__()
        self.model, self.class_names, self.temperature = model, tuple(class_names), temperature
        mean, std = augment.normalization
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.eval()

    @classmethod
    def from_trained(cls, trained: TrainedModel) -> "NormalizedModel":
        """Return the module of a trained model, which they share."""
        return cls(trained.model, trained.config.augment, trained.record.class_names, trained.temperature(None))

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return self.model((images - self.mean) / self.std)


def load_model(source: str | Path | None = None, overrides: Sequence[str] = ()) -> NormalizedModel:
    """Load a trained model for use in your own code, on the device that its configuration selects.

    It computes in float32 with gradients enabled; call it inside `torch.inference_mode()` to predict.

    Args:
        source: Path of any checkpoint of this project, or the name of an experiment, for its best model; None loads the
            latest best model. A name without a directory that is no file is an experiment.
        overrides: Strings `section.key=value`, for example "device=cpu", or "output_dir=..." to look up best models
            elsewhere.

    Raises:
        InputError: If the checkpoint is missing or invalid, or its weights do not match its configuration.
    """
    check_named(source=source)
    is_name = isinstance(source, str) and os.path.basename(source) == source and not os.path.isfile(source)
    checkpoint, model_name = (None, str(source)) if is_name else (source, None)
    trained = load_trained_model(checkpoint, model_name, overrides)
    return NormalizedModel.from_trained(trained).to(trained.device)


def load_trained_model(
    checkpoint: str | Path | None,
    model_name: str | None,
    overrides: Sequence[str] = (),
    class_names: Sequence[str] | None = None,
) -> TrainedModel:
    """Load a trained model.

    Args:
        checkpoint: Any checkpoint of this project; None loads the latest best model that fits the data.
        model_name: Experiment whose latest best model is loaded; None allows all experiments.
        overrides: Strings `section.key=value`, applied to the checkpoint's configuration; they cannot change those of
            `FIXED_KEYS`.
        class_names: Classes of the data, in label order; None if the data are those of the configured dataset.

    Raises:
        InputError: If the checkpoint is missing or invalid, or does not match the configuration.
    """
    values = {override.partition("=")[0].strip(): override for override in overrides}
    selecting = {key: values[key] for key in ("output_dir", "data.dataset", "data.root") if key in values}
    wanted = parse_config({}, "--set", selecting.values())
    output_dir = wanted.output_dir
    data = {name: getattr(wanted.data, name) for name in ("dataset", "root") if f"data.{name}" in selecting}
    if checkpoint:
        path = Path(checkpoint)
        saved = load_checkpoint(path)
    else:
        path, saved = find_best_model(output_dir, model_name, lambda record: _fits(record, class_names, data))
    record: RunRecord = saved["record"]
    config = _override_config(path, record, [*overrides, f"output_dir={output_dir}"])
    _check_model(path, config)
    model = create_model(num_classes=len(record.class_names), **config.model.model_dump())
    try:
        model.load_state_dict(saved.get("ema", saved["model"]))
    except (RuntimeError, AttributeError, TypeError):
        raise InputError(f"{path}: the weights do not match the configured {config.model.name}") from None
    device = select_device(config.device)
    model = model.to(memory_format=memory_format(device))
    logger.info("checkpoint  %s (%s, epoch %d)", path, config.model.name, record.epoch)
    return TrainedModel(path, record, config, device, model, saved.get("temperatures", {}))


def _check_model(path: Path, config: Config) -> None:
    """Raise an `InputError` that names the checkpoint if its model is not registered or lacks an option."""
    try:
        select_options(**config.model.model_dump())
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _override_config(path: Path, record: RunRecord, overrides: Sequence[str]) -> Config:
    """Return the configuration of a checkpoint with overrides; null leaves the normalization at the recorded one.

    Raises:
        InputError: If an override is invalid, or changes a key of `FIXED_KEYS`.
    """
    recorded, config = (parse_config(record.config, str(path), changes) for changes in ((), overrides))
    trained_with, wanted = (flatten_dict(tree.model_dump(mode="json")) for tree in (recorded, config))
    for key in FIXED_KEYS:
        if None not in (wanted[key], trained_with[key]) and wanted[key] != trained_with[key]:
            raise InputError(
                f"{key}: {wanted[key]}, but {path} was trained with {trained_with[key]}; leave out this override, or "
                "train a model with it"
            )
    normalization = {name: getattr(config.augment, name) or getattr(recorded.augment, name) for name in ("mean", "std")}
    return config.model_copy(update={"augment": config.augment.model_copy(update=normalization)})


def log_temperature(trained: TrainedModel, tta: str | None) -> None:
    """Log the temperature that makes the confidences of the model match its accuracy, or that there is none."""
    temperature, name = trained.temperature(tta), f"with {tta}" if tta else "without test-time augmentation"
    if temperature is None:
        logger.info("temperature none: %s; probabilities are not calibrated", NO_TEMPERATURE)
    elif (tta or PLAIN) in trained.temperatures:
        logger.info("temperature %.3f %s", temperature, name)
    else:
        logger.info("temperature %.3f %s: the run did not reach its end, where it gets one for that", temperature, name)


def check_fits(trained: TrainedModel, dataset: ImageDataset, dataset_name: str) -> None:
    """Check that a dataset has the classes that a model was trained on, in the same order, and the same image size.

    Args:
        trained: Trained model.
        dataset: Images to predict.
        dataset_name: Name of the dataset in the message.

    Raises:
        InputError: If they differ.
    """
    size, trained_size = dataset.images.shape[-1], trained.config.data.image_size
    if size != trained_size:
        raise InputError(
            f"{trained.path}: trained on images of {trained_size} pixels, but those of {dataset_name} have {size}; "
            "name a model of this size with --model or --checkpoint, or train one"
        )
    if trained.record.class_names != list(dataset.class_names):
        raise InputError(
            f"{trained.path}: trained on the classes {', '.join(trained.record.class_names)}, but those of "
            f"{dataset_name} are {', '.join(dataset.class_names)}; name a model of these classes with --model or "
            "--checkpoint, or train one"
        )


# --- The best models ----------------------------------------------------------------------------------------------


def find_best_model(
    output_dir: Path, model_name: str | None, fits: Callable[[RunRecord], bool]
) -> tuple[Path, dict[str, Any]]:
    """Return the latest best model that fits the data, with its content (see `load_checkpoint`); otherwise the latest.

    Args:
        output_dir: Directory that contains best_models.
        model_name: Experiment of the model. None allows all; files that cannot be loaded, and those of models that are
            not registered, are then skipped.
        fits: Function that returns whether a model fits the data.

    Raises:
        InputError: If there is no best model, or none that can be loaded.
    """
    skipped: list[Path] = []
    errors: list[InputError] = []
    for path in _best_models(output_dir, model_name):
        try:
            saved = load_checkpoint(path)
            _check_model(path, parse_config(saved["record"].config, str(path)))
            if fits(saved["record"]):
                for other in skipped:
                    logger.info("skipped     %s: trained on other data", other)
                return path, saved
            skipped.append(path)
        except InputError as error:
            if model_name:
                raise
            logger.warning("skipped     %s", error)
            errors.append(error)
    if not skipped:
        raise errors[0]
    return skipped[0], load_checkpoint(skipped[0])


def _best_models(output_dir: Path, model_name: str | None) -> list[Path]:
    """Return the best models of an experiment, or of all if `model_name` is None, the latest first.

    Raises:
        InputError: If there are none.
    """
    found = available = list_best_models(output_dir)
    if model_name:
        named = [best_model_path(output_dir, model_name, selected=selected) for selected in (True, False)]
        # One that is named but not readable is loaded too, which reports why.
        found = latest_first(named) or [path for path in named if os.path.lexists(path)]
    if found:
        return found
    names = ", ".join(sorted(path.name.removesuffix("_best.pth") for path in available))
    hint = f"available: {names}" if names else "train one first: python -m cifar_ignite train --config se"
    wanted = f" of experiment {model_name!r}" if model_name else ""
    raise InputError(f"{output_dir / 'best_models'}: no best model{wanted}; {hint}")


def _fits(record: RunRecord, class_names: Sequence[str] | None, data: Mapping[str, Any]) -> bool:
    """Return whether a model was trained on these classes; if they are None, on the dataset that `data` names.

    A folder is compared by its classes, if it can be listed; the name of any other dataset determines them.
    """
    if class_names is not None:
        return record.class_names == list(class_names)
    trained_on = parse_config(record.config, record.run).data
    wanted = trained_on.model_copy(update=data)
    if wanted.dataset == "folder" and wanted != trained_on:
        with contextlib.suppress(InputError):  # loading it reports the error
            return record.class_names == list(list_classes(wanted.root))
    return wanted.dataset == trained_on.dataset

"""Arguments that the functions of several commands have in common."""

from pathlib import Path

from cifar_ignite.errors import InputError, check_named
from cifar_ignite.training.forward import TTA_MODES


def check_arguments(checkpoint: str | Path | None, model_name: str | None, tta: str | None = None) -> None:
    """Check which model a caller names, and the test-time augmentation; None is always valid.

    Raises:
        InputError: If a name is empty, both a checkpoint and an experiment are named, or there is no such augmentation.
    """
    check_named(checkpoint=checkpoint, model_name=model_name)
    if checkpoint is not None and model_name is not None:
        raise InputError(f"model_name: {model_name!r} has no effect with checkpoint {checkpoint}; name one of them")
    if tta is not None and tta not in TTA_MODES:
        raise InputError(f"tta: unknown test-time augmentation {tta!r}; known: {', '.join(TTA_MODES)}")

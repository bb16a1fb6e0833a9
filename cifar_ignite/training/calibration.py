"""Temperature scaling (Guo et al., 2017, arXiv:1706.04599): one number that makes confidences match accuracies.

Logits are divided by the temperature before the softmax, which changes no predicted class. It is fitted on validation
images and saved with the best model, together with those for test-time augmentation (TTA).
"""

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path

import ignite.distributed as idist
import torch
from ignite.engine import Engine
from ignite.handlers import EpochOutputStore
from torch import Tensor, nn

from cifar_ignite.checkpointing.io import load_checkpoint, save_checkpoint
from cifar_ignite.data.loaders import EvalLoader
from cifar_ignite.distributed.collectives import broadcast_from_rank0, broadcast_state, fail_together, gather_outputs
from cifar_ignite.training.forward import TTA_MODES, create_forward, create_tta_forward

PLAIN = "plain"
"""Name of the temperature without TTA."""
TEMPERATURES = (PLAIN, *TTA_MODES)
MAX_TEMPERATURE = 10.0
# Halves of an interval of 4.6: the logarithm is exact to 4e-15.
NUM_BISECTIONS = 50


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature with the lowest negative log-likelihood, in [1 / `MAX_TEMPERATURE`, `MAX_TEMPERATURE`].

    The loss is convex in the inverse temperature, so that bisection finds the zero of its slope, or the bound next to
    it. If no image is wrong, as is common for few images, more confidence is always better, and nothing shows how sure
    the model may be: the temperature is 1. So it is where the slope is zero or NaN everywhere (equal logits, no images,
    logits that are not finite).

    Args:
        logits: float (N, num_classes) on any device; float64 on the CPU is computed with.
        labels: int64 (N,).
    """
    logits = logits.cpu().double()  # MPS has no float64
    logits = logits - logits.amax(1, keepdim=True)
    label_logits = logits.gather(1, labels.cpu()[:, None]).squeeze(1)
    if (label_logits == 0).all():  # no image is wrong
        return 1.0
    low, high = -math.log(MAX_TEMPERATURE), math.log(MAX_TEMPERATURE)
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        mean_logits = ((logits * math.exp(middle)).softmax(1) * logits).sum(1)
        slope = (mean_logits - label_logits).mean().item()
        if slope > 0:
            high = middle
        elif slope < 0:
            low = middle
        else:
            break
    return math.exp(-(low + high) / 2)


class ValidationTemperature:
    """The temperature of the model that was validated last, fitted when a checkpoint with it is saved."""

    def __init__(self, evaluator: Engine, val_loader: EvalLoader) -> None:
        """
        Args:
            evaluator: Engine of validation.
            val_loader: Validation batches of this rank.
        """
        self.evaluator, self.val_loader = evaluator, val_loader
        EpochOutputStore(output_transform=lambda output: output[0]).attach(evaluator, "logits")
        self._logits = torch.empty(0)

    def gather(self) -> None:
        """Gather the logits of all ranks for the next `state_dict`, which only rank 0 calls."""
        loader = self.val_loader
        self._logits = gather_outputs(self.evaluator.state.logits, loader.rows(), len(loader.images))  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, float]:
        assert self.val_loader.labels is not None, "validation requires labels"
        return {PLAIN: fit_temperature(self._logits, self.val_loader.labels)}


def add_tta_temperatures(
    path: Path, model: nn.Module, val_loader: EvalLoader, amp_dtype: torch.dtype
) -> dict[str, float]:
    """Fit the temperatures of a saved model that its file lacks, which are those with TTA, and add them to the file.

    All ranks call it and predict their batches; only rank 0 reads and writes the file.

    Args:
        path: Best model of a run.
        model: Model of the same architecture on the device of the loader; its weights are not changed.
        val_loader: Validation batches of this rank.
        amp_dtype: Dtype under autocast.

    Returns:
        All temperatures of the model: `PLAIN` and `TTA_MODES`.

    Raises:
        InputError: If the file cannot be loaded.
        OSError, RuntimeError: If another rank fails, or the file cannot be written; it stays as it was.
    """
    assert val_loader.labels is not None, "validation requires labels"
    saved, model = {}, copy.deepcopy(model).eval()
    with fail_together():
        if idist.get_rank() == 0:
            saved = load_checkpoint(path)
            model.load_state_dict(saved["model"])
    broadcast_state(model)
    # The file of a run that began before temperatures were fitted has none.
    temperatures = json.loads(broadcast_from_rank0(lambda: json.dumps(saved.get("temperatures", {}))))
    with fail_together():
        outputs = _predict(model, val_loader, amp_dtype, [name for name in TEMPERATURES if name not in temperatures])
    for name, logits in outputs.items():
        gathered = gather_outputs(logits, val_loader.rows(), len(val_loader.images))
        temperatures[name] = fit_temperature(gathered, val_loader.labels)
    if idist.get_rank() == 0:
        save_checkpoint(path, saved | {"record": saved["record"].state_dict(), "temperatures": temperatures})
    return temperatures


def _predict(
    model: nn.Module, loader: EvalLoader, amp_dtype: torch.dtype, names: Sequence[str]
) -> dict[str, list[Tensor]]:
    """Return the logits of this rank's batches, by the name of the temperature that is fitted on them."""
    forward = create_forward(model, loader.images.device, amp_dtype)
    forwards = {name: forward if name == PLAIN else create_tta_forward(forward, name) for name in names}
    with torch.inference_mode():
        return {name: [predict(images) for images, _ in loader] for name, predict in forwards.items()}


def format_temperatures(temperatures: dict[str, float]) -> str:
    """Return "0.532, with TTA: flip 0.551, shift 0.549"."""
    tta = ", ".join(f"{name} {temperatures[name]:.3f}" for name in TTA_MODES if name in temperatures)
    return f"{temperatures[PLAIN]:.3f}" + (f", with TTA: {tta}" if tta else "")

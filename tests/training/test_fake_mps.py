"""Training and evaluation on fake MPS tensors: no float64, no operator without a kernel, and no known defect of MPS.

No Apple GPU was available: the rules are those of torch's sources, see fake_mps.py. Gradients are zeros; the operators
of the backward pass are recorded on a CPU.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ignite.metrics import Loss
from torch.utils._python_dispatch import TorchDispatchMode

from cifar_ignite.augment import elementwise, pipeline
from cifar_ignite.config_io import load_config
from cifar_ignite.errors import TrainingError
from cifar_ignite.evaluate import evaluate_model
from cifar_ignite.evaluation.report import Evaluation
from cifar_ignite.training import handlers, metrics, optimizers, state
from tests.helpers import REPOSITORY
from tests.training.fake_mps import MPS, fake_mps, has_mps_kernel
from tests.training.fake_runs import (
    create_trained_model,
    load_tiny_config,
    prepare_training,
    train_command,
    with_loss_fault,
)
from tests.training.helpers import CPU_OVERRIDES

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="fake MPS tensors need torch for Linux"),
    pytest.mark.usefixtures("blank_figures"),
]


@pytest.fixture
def train(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., set[str]]:
    """A function that trains a recipe for one epoch on fake MPS tensors and returns the names of its operators."""
    prepare_training(monkeypatch, MPS)

    def run(recipe: str, *overrides: str) -> set[str]:
        config = load_tiny_config(recipe, f"output_dir={tmp_path}", "train.epochs=1", *overrides)
        with fake_mps() as mode:
            train_command.train(config)
        return mode.names

    return run


def evaluate(tta: str, precision: str) -> Evaluation:
    """Evaluate a model, plain and with test-time augmentation, on fake MPS tensors."""
    trained, dataset = create_trained_model(MPS, precision)
    with fake_mps():
        trained.model.to(memory_format=elementwise.memory_format(MPS))
        return evaluate_model(trained, dataset, "test set", tta)


@pytest.mark.parametrize(
    ("recipe", "precision"), [("demo", "fp32"), ("stochastic", "bf16"), ("se_fast", "fp16"), ("hybrid_best", "auto")]
)
def test_training_works_within_limits_of_mps(train, recipe, precision):
    names = train(recipe, f"precision={precision}", "train.ema_decay=0.9")
    assert {"convolution", "_foreach_lerp_.Scalar"} <= names
    assert any(name.startswith("_fused_sgd_") for name in names) == (precision != "fp16")


@pytest.mark.parametrize("mixing", ["cutmix", "mixup"])
def test_augmentation_works_within_limits_of_mps(train, mixing):
    overrides = ["augment.cutmix_p=0", "augment.mixup_p=0", f"augment.{mixing}_p=1", "augment.cutout_size=8"]
    train("se", *overrides, "augment.trivial_augment=wide", "augment.crop_padding=2")


@pytest.mark.parametrize(("tta", "precision"), [("flip", "fp32"), ("shift", "fp16")])
def test_evaluation_works_within_limits_of_mps(tta, precision):
    evaluation = evaluate(tta, precision)
    assert len(evaluation.result.predictions) == len(evaluation.tta_result.predictions) == len(evaluation.dataset)


@pytest.mark.parametrize("recipe", ["se", "hybrid_best"])
def test_backward_pass_has_kernels_on_mps(tmp_path, recipe):
    """The operators of a training on a CPU, the backward pass included, apart from those that only a CPU has."""
    overrides = (*CPU_OVERRIDES, f"output_dir={tmp_path}", "train.epochs=1")
    with OperatorNames() as operators:
        train_command.train(load_config(REPOSITORY / "configs" / f"{recipe}.json", overrides))
    assert {"convolution_backward", "native_batch_norm_backward"} <= operators.names
    assert [name for name in sorted(operators.names) if not has_mps_kernel(name)] == []


class OperatorNames(TorchDispatchMode):
    """Records the names of all operators of torch itself."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten":
            self.names.add(func.name().removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


# --- Planted faults: the tests above notice ------------------------------------------------------------------------


class DeviceSumLoss(Loss):
    """Ignite's loss, summed in float64 on the device."""

    def __init__(self, loss_fn: Any) -> None:
        super().__init__(loss_fn, device=MPS)

    def reset(self) -> None:
        super().reset()
        self._sum = self._sum.double()


def use_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (state, pipeline):
        monkeypatch.setattr(module, "memory_format", lambda device: torch.channels_last)


def skip_updates_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "skips_updates", lambda device: True)


def use_fused_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "skips_updates", lambda device: True)


def sum_loss_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "Float64Loss", DeviceSumLoss)


FAULTS = {
    "float64": (with_loss_fault(lambda logits, targets: logits.double()), "fp32", TypeError),
    "float64 in loss": (sum_loss_on_device, "fp32", TypeError),
    "channels_last": (use_channels_last, "fp32", AssertionError),
    "found_inf": (skip_updates_on_device, "fp32", AssertionError),
    "fused": (use_fused_optimizer, "fp16", AssertionError),
    "operator": (with_loss_fault(lambda logits, targets: torch.heaviside(logits, logits)), "fp32", TrainingError),
}


@pytest.mark.parametrize(("plant", "precision", "error"), FAULTS.values(), ids=FAULTS)
def test_training_notices_limit_of_mps(train, monkeypatch, plant, precision, error):
    plant(monkeypatch)
    with pytest.raises(error, match="aten::" if error is TrainingError else None):
        train("se_fast", f"precision={precision}")


def test_evaluation_notices_limit_of_mps(monkeypatch):
    sum_loss_on_device(monkeypatch)
    with pytest.raises(TypeError, match="float64"):
        evaluate("flip", "fp32")

"""Training, evaluation and exported programs on fake CUDA tensors: no mixed devices, and the host never waits.

torch's backward pass needs a real device; its gradients are replaced by zeros.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.metrics import ConfusionMatrix
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.export.passes import move_to_device_pass

from cifar_ignite.augment import elementwise
from cifar_ignite.data.cifar10 import CIFAR10_CLASSES
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.evaluate import evaluate_model
from cifar_ignite.evaluation import inference
from cifar_ignite.evaluation.report import Evaluation
from cifar_ignite.evaluation.trained_model import NormalizedModel
from cifar_ignite.export import example_images, export_program
from cifar_ignite.training import handlers, loggers, state
from cifar_ignite.training.state import create_initial_model
from tests.helpers.runs import Stop, stop
from tests.training.fake_cuda import (
    CUDA,
    HostCopyError,
    HostSyncError,
    fake_cuda,
    forbid_waiting,
)
from tests.training.fake_runs import (
    CONFIGS,
    LOG_EVERY,
    PRECISIONS,
    create_trained_model,
    load_tiny_config,
    prepare_training,
    train_command,
    with_loss_fault,
    wrap,
)
from tests.training.helpers import CPU

pytestmark = [
    pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch is built without CUDA"),
    pytest.mark.usefixtures("blank_figures"),
    # Muon finds out whether its weights have moved.
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]
# Every recipe once, and one with Muon and stochastic depth in every precision.
IN_ALL_PRECISIONS = "hybrid_fast"
RUNS = [
    *((IN_ALL_PRECISIONS, precision) for precision in PRECISIONS),
    *zip([recipe for recipe in CONFIGS if recipe != IN_ALL_PRECISIONS], itertools.cycle(PRECISIONS)),
]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that trains a recipe for two epochs on fake CUDA tensors, with everything that a run attaches."""
    attach_stop_check = handlers.attach_stop_check

    def run(recipe: str, *overrides: str, **extra: Any) -> None:
        config = load_tiny_config(recipe, f"output_dir={tmp_path}", *overrides)
        with fake_cuda() as mode:

            def attach(trainer: Any, evaluator: Any, *rest: Any) -> None:  # the last one that is attached
                attach_stop_check(trainer, evaluator, *rest)
                forbid_waiting(trainer, mode, LOG_EVERY)
                forbid_waiting(evaluator, mode)

            monkeypatch.setattr(handlers, "attach_stop_check", attach)
            train_command.train(config, **extra)

    prepare_training(monkeypatch, CUDA)
    return run


# --- Training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "precision"), RUNS)
def test_training_never_waits_for_device(train, recipe, precision):
    train(recipe, f"precision={precision}")


@pytest.mark.parametrize("mixing", ["cutmix", "mixup"])
def test_mixing_never_waits_for_device(train, mixing):
    train("se", "augment.cutmix_p=0", "augment.mixup_p=0", f"augment.{mixing}_p=1", "train.epochs=1")


def test_run_uses_tf32_only_if_configured(train):
    for precision in ("tf32", "fp32"):
        with pytest.raises(Stop):
            train("demo", f"precision={precision}", attach=stop)
        assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")


# --- Evaluation and export ----------------------------------------------------------------------------------------


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Evaluation]:
    """A function that evaluates a model, plain and with test-time augmentation, on fake CUDA tensors."""

    def run(tta: str, precision: str) -> Evaluation:
        trained, dataset = create_trained_model(CUDA, precision)
        with fake_cuda() as mode:

            def create(function: Any, *args: Any) -> Any:
                evaluator = function(*args)
                forbid_waiting(evaluator, mode)
                return evaluator

            wrap(monkeypatch, inference, "create_evaluator", create)
            return evaluate_model(trained, dataset, "test set", tta)

    return run


@pytest.mark.parametrize(("tta", "precision"), [("flip", "fp32"), ("shift", "bf16"), ("shift", "fp16")])
def test_evaluation_never_waits_for_device(evaluate, tta, precision):
    evaluation = evaluate(tta, precision)
    assert len(evaluation.result.predictions) == len(evaluation.tta_result.predictions) == len(evaluation.dataset)


def run_exported_program(model: nn.Module, images: Tensor) -> Tensor:
    """Export a model on the CPU, and run the program on a fake GPU, where it may not wait."""
    program = export_program(model, images)
    with fake_cuda() as mode, torch.inference_mode():
        forward, images = move_to_device_pass(program, CUDA).module(), images.to(CUDA)
        mode.forbid()
        return forward(images)


def test_exported_program_runs_on_device():
    config = load_tiny_config("hybrid_best")
    model = NormalizedModel(create_initial_model(config, 10, CPU), config.augment, CIFAR10_CLASSES)
    logits = run_exported_program(model, example_images(32, torch.uint8)[:4])
    assert logits.shape == (4, 10)
    assert logits.device == CUDA


def test_exported_program_normalizes_float_images_on_device():
    model = NormalizedModel(nn.Identity(), load_tiny_config("hybrid_best").augment, CIFAR10_CLASSES)
    images = run_exported_program(model, example_images(32, torch.float32)[:4])
    assert images.shape == (4, 3, 32, 32)
    assert images.device == CUDA


# --- Planted faults: the tests above notice ------------------------------------------------------------------------


def check_gradient_each_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "device_check_interval", lambda device, log_every: 1)


def show_progress_each_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    wrap(monkeypatch, loggers, "attach_progress", lambda attach, *args: attach(*args[:-1], 1))


def copy_constants_each_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "constant", lambda values, device: torch.tensor(values, device=device))


def scaler_reads_found_inf(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with an optimizer that is not fused."""
    sgd = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda groups, fused, **options: sgd(groups, **options))


def raise_if_norm_is_non_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    def total_norm(function: Any, tensors: Any) -> Tensor:
        return function(tensors, error_if_nonfinite=True)

    wrap(monkeypatch, torch.nn.utils, "get_total_norm", total_norm)


def momentum_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(function: Any, *args: Any, **options: Any) -> Any:
        optimizer = function(*args, **options)
        for buffers in optimizer.state.values():
            buffers["momentum_buffer"] = torch.zeros(buffers["momentum_buffer"].shape)
        return optimizer

    wrap(monkeypatch, state, "create_optimizer", create)


def ema_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(function: Any, decay: float) -> Any:
        update = function(decay)
        return lambda averaged, *rest: update([torch.zeros(tensor.shape) for tensor in averaged], *rest)

    wrap(monkeypatch, handlers, "get_ema_multi_avg_fn", create)


def images_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageDataset, "to", lambda self, device: self)


def labels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    to = ImageDataset.to
    monkeypatch.setattr(ImageDataset, "to", lambda self, device: replace(to(self, device), labels=self.labels))


# torch's own errors of mixed devices: those of torch 2.14 and of torch 2.11.
MIXED_DEVICES = "same device|two different devices"
FAULTS = {
    "item": (with_loss_fault(lambda logits, targets: logits.sum().item()), HostSyncError),
    "float": (with_loss_fault(lambda logits, targets: float(logits.sum())), HostSyncError),
    "bool": (with_loss_fault(lambda logits, targets: bool(logits.isnan().any())), HostSyncError),
    "tolist": (with_loss_fault(lambda logits, targets: logits[0].tolist()), HostSyncError),
    "copy to host": (with_loss_fault(lambda logits, targets: logits.cpu()), HostSyncError),
    "copy into host": (with_loss_fault(lambda logits, targets: torch.zeros(4, 10).copy_(logits)), HostSyncError),
    "nonzero": (with_loss_fault(lambda logits, targets: targets.nonzero()), DynamicOutputShapeException),
    "unique": (with_loss_fault(lambda logits, targets: targets.unique()), DynamicOutputShapeException),
    "equal": (with_loss_fault(lambda logits, targets: torch.equal(logits, targets)), DataDependentOutputException),
    "mask read": (with_loss_fault(lambda logits, targets: logits[logits > 0]), HostSyncError),
    "mask write": (with_loss_fault(lambda logits, targets: logits.index_put_((logits > 0,), logits[0])), HostSyncError),
    "linear solver": (with_loss_fault(lambda logits, targets: torch.linalg.inv(logits.mT @ logits)), HostSyncError),
    "index on CPU": (with_loss_fault(lambda logits, targets: logits[torch.arange(2)]), HostSyncError),
    "arange on CPU": (with_loss_fault(lambda logits, targets: logits + torch.arange(10)), RuntimeError),
    "copy to device": (with_loss_fault(lambda logits, targets: torch.ones(10).to(CUDA)), HostCopyError),
    "new constant": (with_loss_fault(lambda logits, targets: torch.tensor([1.0], device=CUDA)), HostCopyError),
    "copy into device": (with_loss_fault(lambda logits, targets: logits[0].copy_(torch.ones(10))), HostCopyError),
    "gradient check": (check_gradient_each_iteration, HostSyncError),
    "progress": (show_progress_each_iteration, HostSyncError),
    "constants": (copy_constants_each_iteration, HostCopyError),
    "found_inf": (scaler_reads_found_inf, HostSyncError),
    "norm": (raise_if_norm_is_non_finite, HostSyncError),
    "momentum": (momentum_on_cpu, HostCopyError),
    "EMA": (ema_on_cpu, HostCopyError),
    "images": (images_on_cpu, RuntimeError),
    "labels": (labels_on_cpu, HostSyncError),
}


@pytest.mark.parametrize(("plant", "error"), FAULTS.values(), ids=FAULTS)
def test_training_notices_fault(train, monkeypatch, plant, error):
    plant(monkeypatch)
    with pytest.raises(error, match=MIXED_DEVICES if error is RuntimeError else None):
        train("se", "precision=fp16", "augment.cutmix_p=0")


def test_evaluation_notices_fault(evaluate, monkeypatch):
    """Ignite's own confusion matrix waits for the device."""
    monkeypatch.setattr(inference, "DeviceConfusionMatrix", ConfusionMatrix)
    with pytest.raises(HostSyncError, match="mask"):
        evaluate("flip", "fp32")


class ReadingModel(nn.Module):
    """A model that looks at a value."""

    def forward(self, images: Tensor) -> Tensor:
        return images * images.float().mean().item()


def test_exported_program_notices_fault():
    with pytest.raises(HostSyncError):
        run_exported_program(ReadingModel(), example_images(32, torch.float32)[:4])

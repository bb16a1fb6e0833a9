"""The training step in its fast variants against the plain one, gradient scaling, and the evaluation step."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.amp import GradScaler

from cifar_ignite.config import TrainConfig
from cifar_ignite.errors import NonFiniteError
from cifar_ignite.models.registry import create_model
from cifar_ignite.training.engines import create_evaluator, create_trainer, scale_loss
from cifar_ignite.training.forward import create_forward
from cifar_ignite.training.handlers import attach_grad_clipping
from tests.training.helpers import CPU, NO_SCALER, create_sgd, relative_error

NO_CLIPPING = TrainConfig(clip_grad_norm=None)


def update_once(model, images, labels, amp_dtype=torch.float32, fused=True):
    """Update a copy of the model once; return its logits and the change of its weights as one vector."""
    model = copy.deepcopy(model)
    before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    optimizer = create_sgd(model.parameters(), weight_decay=1e-4, fused=fused)
    scaler = GradScaler("cpu", enabled=amp_dtype == torch.float16)
    trainer = create_trainer(model, create_forward(model, CPU, amp_dtype), optimizer, F.cross_entropy, scaler)
    if fused:
        attach_grad_clipping(trainer, model, optimizer, scaler, NO_CLIPPING)
    logits, _ = trainer.run([(images, labels)]).output
    after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return logits, after - before


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(0)
    return torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))


@pytest.fixture(scope="module", params=["se_resnet", "stochastic_resnet"])
def model(request):
    torch.manual_seed(0)
    options = {"drop_path_rate": 0.0} if request.param == "stochastic_resnet" else {}
    return create_model(request.param, num_classes=10, width=8, dropout=0.0, **options)


# --- The training step --------------------------------------------------------------------------------------------


def test_train_step_in_channels_last_with_fused_update_equals_plain_step(model, batch):
    """In float64: in float32, rounding that crosses the kink of a ReLU changes the gradient by up to 1%."""
    model, images, labels = copy.deepcopy(model).double(), batch[0].double(), batch[1]
    plain = update_once(model, images, labels, fused=False)
    model.to(memory_format=torch.channels_last)
    fast = update_once(model, images.contiguous(memory_format=torch.channels_last), labels)
    assert relative_error(fast[0], plain[0]) < 1e-6
    assert relative_error(fast[1], plain[1]) < 1e-6


@pytest.mark.parametrize(
    ("amp_dtype", "max_logits_error", "max_update_error"), [(torch.bfloat16, 0.05, 0.5), (torch.float16, 0.01, 0.2)]
)
def test_train_step_in_half_precision_is_close_to_plain_step(
    model, batch, amp_dtype, max_logits_error, max_update_error
):
    """bf16 keeps 8 bits of a value and fp16 11, and the gradient of one small batch crosses kinks of ReLUs.

    A wrong gradient of the same length would have an error of 1.4.
    """
    plain, half = update_once(model, *batch), update_once(model, *batch, amp_dtype)
    assert half[0].dtype == torch.float32
    assert 0 < relative_error(half[0], plain[0]) < max_logits_error
    assert 0 < relative_error(half[1], plain[1]) < max_update_error


def test_train_step_returns_detached_logits_and_targets():
    model = nn.Linear(3, 4)
    trainer = create_trainer(model.eval(), model, create_sgd(model.parameters()), F.cross_entropy, NO_SCALER)
    labels = torch.tensor([0, 1])
    logits, targets = trainer.run([(torch.randn(2, 3), labels)]).output
    assert not logits.requires_grad
    assert targets is labels
    assert model.training


# --- Gradient scaling ---------------------------------------------------------------------------------------------


def train_scaled(gradients, init_scale):
    """Train one weight of 1 on these gradients; return weight, scale and error."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = create_sgd(model.parameters(), momentum=0.0)
    scaler = GradScaler("cpu", init_scale=init_scale)
    trainer = create_trainer(model, model, optimizer, lambda logits, _: logits.sum(), scaler)
    attach_grad_clipping(trainer, model, optimizer, scaler, NO_CLIPPING)
    error = None
    try:
        trainer.run([(torch.full((1, 1), value), None) for value in gradients])
    except NonFiniteError as raised:
        error = str(raised)
    return model.weight.item(), scaler.get_scale(), error


def test_overflow_lowers_scale_and_training_continues():
    weight, scale, error = train_scaled([1.0, math.inf, 1.0], init_scale=1024.0)
    assert error is None
    assert weight == pytest.approx(0.8)
    assert scale == 512.0


def test_overflow_at_scale_of_one_stops_and_names_first_consecutive_iteration():
    weight, scale, error = train_scaled([1.0, math.nan, 1.0, *[math.nan] * 20], init_scale=4.0)
    assert "iteration 4, lr 0.1" in error
    assert weight == pytest.approx(0.8)
    assert scale == 1.0


def test_scale_loss_multiplies_mean_by_scale_of_loader():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    loss = F.cross_entropy(logits, labels)
    assert torch.equal(scale_loss(F.cross_entropy, SimpleNamespace(loss_scale=1.0))(logits, labels), loss)
    assert torch.equal(scale_loss(F.cross_entropy, SimpleNamespace(loss_scale=0.75))(logits, labels), loss * 0.75)


def test_scale_loss_of_empty_shard_has_zero_gradient_for_every_parameter():
    model = nn.Linear(3, 4)
    scaled_loss = scale_loss(F.cross_entropy, SimpleNamespace(loss_scale=0.0))
    scaled_loss(model(torch.zeros(0, 3)), torch.zeros(0, dtype=torch.long)).backward()
    assert all(torch.equal(parameter.grad, torch.zeros_like(parameter)) for parameter in model.parameters())


# --- The evaluation step ------------------------------------------------------------------------------------------


def test_evaluate_step_is_deterministic_and_changes_nothing():
    """Dropout is off and BatchNorm uses its statistics without updating them, also after training mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 10))
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(20, 3, 4, 4)
    logits = [create_evaluator(model.train(), model).run([(images, None)]).output[0] for _ in range(2)]
    assert all(value.is_inference() for value in logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], model.eval()(images))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

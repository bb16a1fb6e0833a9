"""The fast ways of computing a step against the plain one, and training with scaled gradients."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.amp import GradScaler

from cifar_ignite import engines, handlers
from cifar_ignite.engines import create_forward, create_trainer, pays_to_compile, select_precision, warm_up
from cifar_ignite.models import create_model

CPU = torch.device("cpu")


def step(model, images, labels, precision=torch.float32, fused=True):
    """One update of a copy of the model; returns its logits and the change of its weights, as one vector."""
    model = copy.deepcopy(model)
    before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=fused)
    scaler = GradScaler("cpu", enabled=precision == torch.float16)
    trainer = create_trainer(model, create_forward(model, CPU, precision), optimizer, F.cross_entropy, scaler)
    if fused:
        handlers.attach_gradient_guard(trainer, model, optimizer, scaler, None, 1)
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


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def test_channels_last_and_fused_update_equal_the_plain_step(model, batch):
    """In float64, for in float32 a rounding that crosses the kink of a ReLU changes the gradient by up to 1%."""
    model, images, labels = copy.deepcopy(model).double(), batch[0].double(), batch[1]
    plain = step(model, images, labels, fused=False)
    model.to(memory_format=torch.channels_last)
    fast = step(model, images.contiguous(memory_format=torch.channels_last), labels)
    assert relative(fast[0], plain[0]) < 1e-6
    assert relative(fast[1], plain[1]) < 1e-6


@pytest.mark.parametrize(("precision", "logits", "update"), [(torch.bfloat16, 0.05, 0.5), (torch.float16, 0.01, 0.2)])
def test_half_precision_is_near_the_plain_step(model, batch, precision, logits, update):
    """bf16 keeps 8 bits of a value and fp16 11; the gradient of one small batch also crosses kinks of ReLUs.

    A wrong gradient of the same length would be off by 1.4.
    """
    plain, half = step(model, *batch), step(model, *batch, precision)
    assert half[0].dtype == torch.float32
    assert 0 < relative(half[0], plain[0]) < logits
    assert 0 < relative(half[1], plain[1]) < update


def test_precision_follows_the_configuration_and_the_device(monkeypatch):
    assert [select_precision(name, CPU) for name in ("fp32", "bf16", "fp16")] == [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        assert select_precision("auto", CPU) == expected
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert select_precision("auto", torch.device("cuda")) == torch.float32


def scaled_run(values, init_scale):
    """Train one weight on gradients of these values; returns weight, scale and the error."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    scaler = GradScaler("cpu", init_scale=init_scale)
    trainer = create_trainer(model, model, optimizer, lambda logits, _: logits.sum(), scaler)
    handlers.attach_gradient_guard(trainer, model, optimizer, scaler, None, 1)
    error = None
    try:
        trainer.run([(torch.full((1, 1), value), None) for value in values])
    except handlers.NonFiniteError as raised:
        error = str(raised)
    return model.weight.item(), scaler.get_scale(), error


def test_an_overflow_lowers_the_scale_and_training_goes_on():
    weight, scale, error = scaled_run([1.0, math.inf, 1.0], init_scale=1024.0)
    assert error is None
    assert weight == pytest.approx(0.8)
    assert scale == 512.0


def test_overflow_at_a_scale_of_one_stops_and_names_the_first_of_the_row():
    weight, scale, error = scaled_run([1.0, math.nan, 1.0, *[math.nan] * 20], init_scale=4.0)
    assert "iteration 4, lr 0.1" in error
    assert weight == pytest.approx(0.8)
    assert scale == 1.0


# --- Compiling ----------------------------------------------------------------------------------------------------


def test_a_compiled_step_equals_the_eager_one_and_warming_up_leaves_no_trace(batch):
    torch.manual_seed(0)
    model = create_model("se_resnet", num_classes=10, width=4, dropout=0.0)
    before = copy.deepcopy(model.state_dict())
    forward = create_forward(model, CPU, torch.float32, compiled_batch=16)

    def checked(images):
        assert all(parameter.grad is None for parameter in model.parameters())  # a CUDA graph would take their memory
        return forward(images)

    assert warm_up(model, checked, torch.zeros(16, 3, 32, 32)) > 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    eager = copy.deepcopy(model).train()
    model.train()
    assert relative(forward(batch[0]), eager(batch[0])) < 1e-5
    assert relative(model.stem[1].running_mean, eager.stem[1].running_mean) < 1e-5
    # Other batch sizes, such as the last one's, are not compiled.
    assert torch.equal(forward(batch[0][:5]), eager(batch[0][:5]))


def test_compiling_pays_on_a_cpu_for_long_trainings():
    cuda = torch.device("cuda")
    assert [pays_to_compile("auto", CPU, iterations) for iterations in (1_999, 2_000)] == [False, True]
    assert not pays_to_compile("auto", cuda, 10**6)
    assert pays_to_compile("on", cuda, 1)
    assert not pays_to_compile("off", CPU, 10**6)


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_failing_compiler_stops_a_run_only_if_compiling_was_asked_for(command, tiny_file, monkeypatch, mode):
    def broken(model, **options):
        def call(images):
            raise RuntimeError("no compiler\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(engines, "COMPILE_PAYS_AFTER", 1)
    status, out, err = command("train", "--config", tiny_file, "--set", f"compile={mode}")
    message = "torch.compile fails here (no compiler); take compile=off"
    if mode == "on":
        assert status == 1
        assert err.startswith(f"cifar_ignite: {message}")
    else:
        assert status == 0
        assert f"{message}; going on without it" in out

"""Choice of device and precision."""

import pytest
import torch

from cifar_ignite.errors import InputError
from cifar_ignite.training.device import (
    device_check_interval,
    dtype_name,
    enable_deterministic_algorithms,
    precision_name,
    resolve_amp_dtype,
    select_device,
    set_float32_precision,
)
from tests.training.helpers import CPU

CUDA, MPS = torch.device("cuda"), torch.device("mps")


@pytest.fixture
def available(monkeypatch):
    """A function that lets torch find GPUs of the named types only."""

    def set_available(*kinds):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in kinds)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in kinds)

    return set_available


@pytest.mark.parametrize(
    ("name", "kinds", "expected"),
    [
        ("auto", ["cuda", "mps"], CUDA),
        ("auto", ["cuda"], CUDA),
        ("auto", ["mps"], MPS),
        ("auto", [], CPU),
        ("cpu", ["cuda", "mps"], CPU),
        ("cuda", ["cuda"], CUDA),
        ("mps", ["cuda", "mps"], MPS),
    ],
)
def test_select_device_returns_first_available(available, name, kinds, expected):
    available(*kinds)
    assert select_device(name) == expected


@pytest.mark.parametrize(("name", "kinds"), [("cuda", ["mps"]), ("mps", ["cuda"]), ("mps", [])])
def test_select_device_refuses_missing_gpu(available, name, kinds):
    available(*kinds)
    with pytest.raises(InputError, match=r"^device: "):
        select_device(name)


def test_select_device_has_no_side_effects(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    select_device("auto")
    assert not torch.backends.cudnn.deterministic


def test_enable_deterministic_algorithms_sets_cudnn(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    enable_deterministic_algorithms()
    assert torch.backends.cudnn.deterministic


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_resolve_amp_dtype_follows_explicit_precision(precision, expected):
    assert resolve_amp_dtype(precision, CPU) == expected


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "amx_tile": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_tile": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_tile": False}, torch.float32),
        ({"architecture": "aarch64"}, torch.float32),
    ],
)
def test_resolve_amp_dtype_auto_follows_cpu_capabilities(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert resolve_amp_dtype("auto", CPU) == expected


@pytest.mark.parametrize(
    ("has_avx512_bf16", "has_amx", "expected"),
    [(True, False, torch.bfloat16), (False, True, torch.bfloat16), (False, False, torch.float32)],
)
def test_resolve_amp_dtype_auto_works_without_public_capabilities(monkeypatch, has_avx512_bf16, has_amx, expected):
    """As in torch 2.11."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512_bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx, raising=False)
    assert resolve_amp_dtype("auto", CPU) == expected


@pytest.mark.parametrize(
    ("has_bf16", "capability", "expected"),
    [
        (True, (8, 0), torch.bfloat16),
        (False, (7, 5), torch.float16),
        (False, (7, 0), torch.float16),
        (False, (6, 1), torch.float32),
    ],
)
def test_resolve_amp_dtype_auto_follows_gpu(monkeypatch, has_bf16, capability, expected):
    """Also an emulated bf16, which torch reports for older GPUs, is not used."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or has_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_amp_dtype("auto", CUDA) == expected


def test_precision_name_distinguishes_tf32_from_float32():
    names = {precision: precision_name(precision, CPU) for precision in ("fp32", "tf32", "bf16")}
    assert names == {"fp32": "float32", "tf32": "tf32", "bf16": "bfloat16"}


def test_set_float32_precision_allows_tf32_only_if_requested():
    for precision, is_allowed in (("tf32", True), ("auto", False), ("tf32", True), ("fp32", False), ("bf16", False)):
        set_float32_precision(precision)
        assert torch.backends.cudnn.allow_tf32 == is_allowed
        assert torch.backends.cuda.matmul.allow_tf32 == is_allowed


def test_dtype_name_has_no_module():
    assert dtype_name(torch.bfloat16) == "bfloat16"


def test_device_check_interval_is_one_unless_device_skips_updates_and_reads_cost():
    assert device_check_interval(CPU, 20) == device_check_interval(MPS, 20) == 1
    assert device_check_interval(CUDA, 20) == 20


def test_resolve_amp_dtype_is_float32_on_mps_unless_configured():
    assert resolve_amp_dtype("auto", MPS) == torch.float32
    assert resolve_amp_dtype("bf16", MPS) == torch.bfloat16
    assert resolve_amp_dtype("fp16", MPS) == torch.float16

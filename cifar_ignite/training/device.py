"""Device and precision of a run."""

import torch

from cifar_ignite.errors import InputError


def select_device(name: str) -> torch.device:
    """Return the device that `name` stands for: "cpu", "cuda", "mps", or "auto" for the first of CUDA, MPS and CPU.

    Raises:
        InputError: If a GPU is requested but not available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_available in available.items() if is_available)
    if not available[name]:
        gpu = {"cuda": "CUDA GPU", "mps": "Apple GPU (MPS)"}[name]
        raise InputError(f"device: torch finds no {gpu} here; use device=auto or device=cpu")
    return torch.device(name)


def enable_deterministic_algorithms() -> None:
    """Let cuDNN use deterministic algorithms only, so that a run is reproducible on a GPU."""
    torch.backends.cudnn.deterministic = True


def set_float32_precision(precision: str) -> None:
    """Let convolutions and matrix products of float32 tensors use TF32 on a GPU if `precision` is "tf32", else not.

    By default, torch uses TF32 for convolutions: 10 bits of the significand instead of 23. The newer attributes named
    `fp32_precision` are avoided: reading `allow_tf32`, as torch.compile does, would raise (checked with torch 2.14).
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def resolve_amp_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of convolutions and matrix products under autocast.

    "auto" is bfloat16 if the device has instructions for it, otherwise float16 on a GPU of compute capability 7.0 or
    higher, whose tensor cores have it (V100, T4), otherwise float32. On MPS it is float32, because nobody has measured
    whether autocast saves time there. "tf32" is float32 as well, see `set_float32_precision`. Sums over many values
    (BatchNorm statistics, the loss, the update) stay in float32.
    """
    if precision != "auto":
        names = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        return names[precision]
    if device.type == "mps":
        return torch.float32
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_has_bf16() else torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else torch.float32


def _cpu_has_bf16() -> bool:
    """Return whether the CPU has bfloat16 instructions.

    `torch.cpu.get_capabilities` is public, but torch 2.11 lacks it and has only the private functions (checked with
    2.11 and 2.14).
    """
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_tile"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def dtype_name(dtype: torch.dtype) -> str:
    """Return "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def precision_name(precision: str, device: torch.device) -> str:
    """Return the name of what `precision` stands for on a device: "tf32", or that of a dtype."""
    return "tf32" if precision == "tf32" else dtype_name(resolve_amp_dtype(precision, device))


def skips_updates(device: torch.device) -> bool:
    """Return whether torch's fused optimizers skip an update on the device if their `found_inf` is set.

    On MPS, torch 2.11 ignores it, as all versions before torch's pull request 186360 do.
    """
    return device.type != "mps"


def device_check_interval(device: torch.device, log_every: int) -> int:
    """Return the iterations between reads of a tensor on the device.

    A GPU runs ahead of the host, and a read makes them wait for each other; on a CPU it costs nothing. On MPS, the host
    has to prevent an update with a gradient that is not finite (see `skips_updates`), so it reads in each iteration.
    """
    return log_every if device.type == "cuda" else 1

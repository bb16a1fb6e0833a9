"""Fake MPS tensors: shapes and dtypes on an Apple GPU without one, and errors for what fails there."""

import contextlib
import ctypes
import re
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.training.fake_cuda import FakeCuda, fake_device

aten = torch.ops.aten
MPS = torch.device("mps:0")
# Numbers of c10::DeviceType.
CPU_TYPE, MPS_TYPE = 0, 13
# Keys of native_functions.yaml whose kernels run on MPS: its own, and those that consist of other operators.
MPS_KEYS = {
    "MPS",
    "CompositeImplicitAutograd",
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
}


class FakeMps(FakeCuda):
    """Runs operators on MPS tensors without data; raises where MPS does, or where its results are wrong.

    Attributes:
        names: Names of the operators that ran on the device.
    """

    kind = "mps"

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def check_operator(self, func: Any, tensors: list[Tensor], args: Any) -> None:
        name = func.name().removeprefix("aten::")
        self.names.add(name)
        if func.namespace == "aten" and not has_mps_kernel(name):
            raise NotImplementedError(f"The operator 'aten::{name}' is not currently implemented for the MPS device.")
        # A fake convolution does not keep the memory format, so its input is checked instead of that of BatchNorm.
        if func is aten.convolution.default and not all(tensor.is_contiguous() for tensor in args[:2]):
            raise AssertionError("images in channels_last: the backward pass of BatchNorm may be wrong")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        may_skip = (kwargs or {}).get("found_inf") is not None or (kwargs or {}).get("grad_scale") is not None
        if func.name().startswith("aten::_fused_") and may_skip:
            raise AssertionError(f"{func.name()} that is to skip updates on the device")
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor) and leaf.device.type == "mps" and leaf.dtype == torch.float64:
                raise TypeError(f"{func.name()}: Cannot convert a MPS Tensor to float64 dtype")
        return result


@contextlib.contextmanager
def fake_mps() -> Iterator[FakeMps]:
    """Use fake MPS tensors inside the block."""
    with device_guard(), fake_device(FakeMps()) as mode:
        yield mode


@contextlib.contextmanager
def device_guard() -> Iterator[None]:
    """Give MPS the CPU's guard, which does nothing: without one, torch for Linux refuses to index MPS tensors.

    Guards are registered in an array of c10 that is exported but not documented (checked with torch 2.14).
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (MPS_TYPE + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    previous, guards[MPS_TYPE] = guards[MPS_TYPE], guards[CPU_TYPE]
    try:
        yield
    finally:
        guards[MPS_TYPE] = previous


@lru_cache
def native_functions() -> dict[str, str]:
    """Return the declaration of each operator, by its name.

    native_functions.yaml is not public, but torch's wheels contain it (checked with torch 2.14).
    """
    path = Path(sysconfig.get_paths()["purelib"]) / "torchgen/packaged/ATen/native/native_functions.yaml"
    declarations = re.split(r"^- func: ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {declaration.partition("(")[0]: declaration for declaration in declarations}


@lru_cache
def has_mps_kernel(name: str) -> bool:
    """Return whether torch has a kernel for an operator on MPS.

    Args:
        name: Name with overload, without namespace: "add.Tensor", "relu".
    """
    declaration = native_functions()[name]
    if delegate := re.search(r"structured_delegate: (\S+)", declaration):
        return has_mps_kernel(delegate[1])
    keys = re.findall(r"^    (\w[\w, ]*): ", declaration.partition("\n  dispatch:\n")[2], flags=re.MULTILINE)
    return not keys or bool(MPS_KEYS & {key for names in keys for key in names.split(", ")})

"""Memory for a dataset: refused before it is loaded if it does not fit."""

import ctypes
import os
import sys
from pathlib import Path

import ignite.distributed as idist
import torch

from cifar_ignite.errors import InputError

# Linux: available memory of the machine, and limit and usage of the control group of a container.
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
# The split into training and validation images copies them.
HOST_COPIES = 2


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of Windows."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("total", "available", *(f"other_{index}" for index in range(5)))),
    )


def check_memory(shape: tuple[int, ...], device: torch.device) -> None:
    """Check that uint8 images fit into the memory of the host and of the device that trains on them.

    Args:
        shape: Shape of the images, (N, 3, size, size).
        device: Device that the images are moved to.

    Raises:
        InputError: If they do not fit.
    """
    num_bytes = torch.Size(shape).numel()
    # The first process of a machine, which checks before any other loads, checks for all of them.
    processes = idist.get_nproc_per_node() if idist.get_local_rank() == 0 else 1
    limits = [("memory", available_memory(), HOST_COPIES * processes * num_bytes)]
    if device.type == "cuda":
        limits.append(("GPU memory", torch.cuda.mem_get_info(device)[0], num_bytes))
    for name, available, required in limits:
        if available is not None and required > available:
            raise InputError(
                f"data.image_size: {shape[0]:,} images of {shape[-1]} pixels take {format_bytes(required)} of {name}, "
                f"but {format_bytes(available)} are available; use a smaller data.image_size, or fewer images"
            )


def format_bytes(count: int) -> str:
    """Return "1.5 GB" for 1_500_000_000."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def available_memory() -> int | None:
    """Return the bytes that this process can use without swapping, or None if the system does not report them."""
    if sys.platform == "win32":
        status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
        return status.available if ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else None
    limits = [limit for limit in (_available_on_linux(), _available_in_container()) if limit is not None]
    return min(limits, default=_physical_memory())


def _available_on_linux() -> int | None:
    try:
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="ascii").splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None


def _available_in_container() -> int | None:
    """Return what is left of the limit of the control group; memory that only caches files counts as available."""
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        return limit - used + int(statistics["inactive_file"])
    except (OSError, ValueError, KeyError):  # ValueError: "max", which is no limit
        return None


def _physical_memory() -> int | None:
    """Return the memory of the machine, as macOS reports it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):  # AttributeError: Windows has no sysconf
        return None

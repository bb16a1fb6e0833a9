"""What a result depends on besides its configuration: commit, versions, device, memory."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch


def describe_versions() -> dict[str, str]:
    """Return the commit and the versions of Python and torch."""
    return {"commit": current_commit(), "python": platform.python_version(), "torch": torch.__version__}


def current_commit() -> str:
    """Return the short hash of the checkout, with a + if files differ from it; "unknown" without git or a checkout."""
    words = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        result = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True)
    except OSError:
        return "unknown"
    return result.stdout.decode().strip() or "unknown"


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or the number of CPU cores."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

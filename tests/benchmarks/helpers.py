"""Running benchmarks as users do."""

import subprocess
import sys
from collections.abc import Sequence

from tests.helpers import REPOSITORY


def run_benchmark(name: str, arguments: Sequence[object], overrides: Sequence[str] = ()) -> subprocess.CompletedProcess:
    """Run `python -m benchmarks.NAME` in the repository with arguments and configuration overrides."""
    words = [*arguments, *(f"--set={override}" for override in overrides)]
    command = [sys.executable, "-m", f"benchmarks.{name}", *(str(word) for word in words)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)

"""Calls of make, as from a shell."""

import os
import subprocess
from pathlib import Path

from tests.helpers import REPOSITORY


def make(*arguments: object, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run make; `make test`, around the tests, would pass on its own variables and have directories printed."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=outer | environment, capture_output=True, text=True, check=False)

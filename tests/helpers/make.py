"""Calls of make, as from a shell."""

import os
import subprocess
from pathlib import Path

from tests.helpers import REPOSITORY


def make(*arguments: object, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run make with the program `true` as Python, so that no test can start an installation or a training.

    `make test`, around the tests, would pass on its own variables and have directories printed.
    """
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", *map(str, arguments)]
    environment = outer | {"PYTHON": "true"} | environment
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)

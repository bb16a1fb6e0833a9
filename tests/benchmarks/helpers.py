"""Running benchmarks as users do."""

import contextlib
import io
import runpy
import subprocess
import sys
import warnings
from collections.abc import Sequence

import pytest

from tests.helpers import REPOSITORY


def run_benchmark(name: str, arguments: Sequence[object], overrides: Sequence[str] = ()) -> subprocess.CompletedProcess:
    """Run `python -m benchmarks.NAME` in the repository with arguments and configuration overrides.

    In this process, because importing torch takes seconds, but as `python -m` does: as the module `__main__`.
    """
    words = [str(word) for word in (*arguments, *(f"--set={override}" for override in overrides))]
    out, err, status = io.StringIO(), io.StringIO(), None
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patched,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # that a test has imported the module
        patched.chdir(REPOSITORY)
        patched.setattr(sys, "argv", [name, *words])
        try:
            runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
        except SystemExit as exit_:
            status = exit_.code
    assert isinstance(status, int)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())

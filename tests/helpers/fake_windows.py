"""A program that runs commands without what Windows lacks, and with what it refuses; see tests/test_windows.py.

    python fake_windows.py COMMAND OPTIONS [-- COMMAND OPTIONS ...]

Libraries are imported before, and what the standard library uses elsewhere is left. Reading and writing text in the
encoding of the platform is an error.
"""

import errno
import os
import shutil
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import ignite.handlers  # noqa: F401
import matplotlib.figure  # noqa: F401
import pandas  # noqa: F401
import torchvision.datasets  # noqa: F401

MISSING_OS = ("fork", "geteuid", "getuid", "sysconf", "O_DIRECTORY", "mkfifo", "uname", "killpg")
MISSING_SIGNALS = ("SIGUSR1", "SIGUSR2", "SIGKILL", "SIGHUP", "SIGALRM", "SIGQUIT", "pause", "alarm")
MISSING_MODULES = ("fcntl", "grp", "posix", "pwd", "resource", "termios")
ACCESS_DENIED, SHARING_VIOLATION, PRIVILEGE_NOT_HELD = 5, 32, 1314


def windows_error(number: int, path: Any) -> OSError:
    """Return the error that Windows raises, with its own number of the cause."""
    kind = OSError if number == PRIVILEGE_NOT_HELD else PermissionError
    error = kind(errno.EACCES, "Permission denied", str(path))
    error.winerror = number  # type: ignore[attr-defined]
    return error


def refuse(function: Callable[..., Any], position: int, is_refused: Callable[[str], int]) -> Callable[..., Any]:
    """Return a function that raises if `is_refused` of its path, the argument at `position`, is not 0."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if number := is_refused(os.fspath(args[position])):
            raise windows_error(number, args[position])
        return function(*args, **kwargs)

    return call


def imitate_windows() -> None:
    """Remove what Windows lacks, and refuse what it refuses."""
    for name in MISSING_OS:
        delattr(os, name)
    for name in MISSING_SIGNALS:
        delattr(signal, name)
    for name in MISSING_MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    shutil._use_fd_functions = False  # type: ignore[attr-defined]  # shutil.rmtree opens directories elsewhere
    calls: Counter[tuple[str, str]] = Counter()

    def is_open_at_first(path: str, name: str) -> int:
        """Another program has each file open when it is first replaced or deleted."""
        calls[name, path] += 1
        return SHARING_VIOLATION if os.path.lexists(path) and calls[name, path] == 1 else 0

    os.open = refuse(os.open, 0, lambda path: ACCESS_DENIED * os.path.isdir(path))
    os.symlink = refuse(os.symlink, 1, lambda path: PRIVILEGE_NOT_HELD)
    os.replace = refuse(os.replace, 1, lambda path: is_open_at_first(path, "replace"))
    os.unlink = refuse(os.unlink, 0, lambda path: is_open_at_first(path, "unlink"))


def main() -> int:
    """Run the commands until one fails; return its exit status."""
    imitate_windows()
    warnings.filterwarnings("error", category=EncodingWarning, module="cifar_ignite")
    from cifar_ignite.cli import main as run_command

    words, commands = sys.argv[1:], [[]]  # type: ignore[var-annotated]
    for word in words:
        commands.append([]) if word == "--" else commands[-1].append(word)
    return next((status for command in commands if (status := run_command(command))), 0)


if __name__ == "__main__":
    sys.exit(main())

"""Files and directories: atomic writes, fsync, stale temporary files, unique directories."""

import contextlib
import errno
import itertools
import logging
import os
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from cifar_ignite.errors import InputError

TEMP_SUFFIX = ".tmp"
# What file systems without fsync for directories answer (CIFS, FUSE, WSL), and Windows, which cannot open a directory.
NO_DIRECTORY_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES, errno.EISDIR}

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path` that replaces it at the end and is deleted on an error."""
    temp_path = path.with_name(f".{path.name}.{os.getpid()}{TEMP_SUFFIX}")
    try:
        yield temp_path
        os.replace(temp_path, path)
    finally:
        temp_path.unlink(missing_ok=True)


def fsync_file(path: Path) -> None:
    """Flush a file to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def fsync_directory(directory: Path) -> None:
    """Flush a directory to the disk, so that a rename in it survives a power failure.

    A file system that does not support this is logged once; the files themselves are flushed.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NO_DIRECTORY_FSYNC:
            raise
        _log_missing_fsync(str(directory), error.strerror)


@lru_cache
def _log_missing_fsync(directory: str, reason: str) -> None:
    logger.info("%s: this file system cannot flush a directory (%s); files are flushed", directory, reason)


def remove_stale_temp_files(directory: Path, older_than: float = 0) -> None:
    """Delete temporary files that a killed process left behind.

    Args:
        directory: Directory that `atomic_write` wrote to.
        older_than: Minimum age in seconds.
    """
    for path in directory.glob(f".*{TEMP_SUFFIX}"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime >= older_than:
                path.unlink()


def latest_file(paths: Iterable[Path]) -> Path | None:
    """Return the most recently written file, or None if there are none."""
    return max(paths, key=modification_key, default=None)


def modification_key(path: Path) -> tuple[int, str]:
    """Return a sort key for files by time of modification, then by name."""
    return path.stat().st_mtime_ns, path.name


def create_unique_dir(parent: Path, name: str) -> Path:
    """Create `parent`/`name`, or `name`_2, `name`_3, ... if that exists; concurrent calls never return the same."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        directory = parent / (name if number == 1 else f"{name}_{number}")
        with contextlib.suppress(FileExistsError):
            directory.mkdir()
            break
    return directory


def timestamp() -> str:
    """Return the local time as it appears in the names of directories, for example 2026-01-31_09-30-00."""
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


@contextlib.contextmanager
def translate_write_errors(directory: Path) -> Iterator[None]:
    """Translate a failed write below `output_dir` into an `InputError`.

    Raises:
        InputError: If an OSError was raised inside the block.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"output_dir: cannot write to {directory}: {error.strerror}") from None

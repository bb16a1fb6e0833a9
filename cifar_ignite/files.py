"""Files and directories: atomic writes, fsync, stale temporary files, listings, unique directories."""

import contextlib
import errno
import glob
import itertools
import logging
import os
import stat
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from cifar_ignite.errors import InputError

TEMP_SUFFIX = ".tmp"
# What file systems without fsync for directories answer (CIFS, FUSE, WSL), and Windows, which cannot open a directory.
NO_DIRECTORY_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES, errno.EISDIR}
# A run may rotate all of its checkpoints between listing their names and reading their times.
LISTING_ATTEMPTS = 5

logger = logging.getLogger(__name__)


def stat_path(path: Path) -> os.stat_result | None:
    """Return the status of a path that a user named, or None if nothing is there.

    Raises:
        InputError: If the path cannot be accessed: no permission, a name that is too long, a cycle of links.
    """
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise InputError(f"{path}: cannot access this path: {getattr(error, 'strerror', error)}") from None


def path_exists(path: Path) -> bool:
    """Return whether a file or directory is at a path that a user named; see `stat_path` for errors."""
    return stat_path(path) is not None


def is_directory(path: Path) -> bool:
    """Return whether a directory is at a path that a user named; see `stat_path` for errors."""
    status = stat_path(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


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


def list_files(directory: Path, pattern: str) -> list[Path]:
    """Return the readable files below a directory that match a glob pattern, the latest first.

    A wildcard does not match hidden names: macOS writes `._name` next to `name` on file systems that are not its own.
    """
    found: list[Path] = []
    for _ in range(LISTING_ATTEMPTS):
        names = glob.glob(pattern, root_dir=directory)
        found = latest_first(directory / name for name in names)
        if found or not names:
            break
    return found


def check_listable(directory: Path) -> None:
    """Check that a directory that the user has named can be listed; one that does not exist counts as empty.

    Raises:
        InputError: If it cannot be listed, for example without permission.
    """
    try:
        os.listdir(directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"{directory}: cannot read the directory: {error.strerror}") from None


def latest_first(paths: Iterable[Path]) -> list[Path]:
    """Return the readable files among `paths`, by time of modification, then by name, the latest first.

    Directories and dangling links are skipped, and files that another process deletes meanwhile.
    """
    found = []
    for path in paths:
        with contextlib.suppress(OSError, ValueError):  # ValueError: a null character in a name
            status = path.stat()
            if stat.S_ISREG(status.st_mode) and os.access(path, os.R_OK):
                found.append((status.st_mtime_ns, path.name, path))
    return [path for *_, path in sorted(found, reverse=True)]


def latest_file(paths: Iterable[Path]) -> Path | None:
    """Return the most recently written of the readable files among `paths`, or None if there are none."""
    return next(iter(latest_first(paths)), None)


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
        InputError: If an OSError about `directory`, or about no file in particular (a full disk), was raised.
        OSError: If it is about another file, for example a missing template.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or not _concerns(error, directory):
            raise
        raise InputError(f"output_dir: cannot write to {error.filename or directory}: {error.strerror}") from None


def _concerns(error: OSError, directory: Path) -> bool:
    """Return whether an error is about a file below `directory`, a parent of it, or about no file in particular."""
    if error.filename is None:
        return True
    path, parent = (Path(os.path.abspath(name)) for name in (os.fsdecode(error.filename), directory))
    return path.is_relative_to(parent) or parent.is_relative_to(path)

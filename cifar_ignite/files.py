"""Files and directories: atomic writes, fsync, stale temporary files, listings, unique directories, portable names."""

import contextlib
import errno
import glob
import itertools
import logging
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import lru_cache
from pathlib import Path, PurePath

from cifar_ignite.errors import InputError

with contextlib.suppress(ModuleNotFoundError):  # Windows
    import fcntl

TEMP_SUFFIX = ".tmp"
# What file systems without fsync for directories answer (CIFS, FUSE, WSL).
NO_DIRECTORY_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES, errno.EISDIR}
# Windows refuses to replace or delete a file that another program has open, as virus scanners and viewers do: "access
# denied" and "sharing violation". Seconds between attempts.
WINDOWS_IN_USE = (5, 32)
RETRY_DELAYS = (0.1, 0.2, 0.4, 0.8, 1.6)
# Names that Windows does not accept for a file or directory, whatever follows after a dot.
WINDOWS_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
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
    # The process id alone is not unique: containers that share a directory count from 1.
    temp_path = path.with_name(f".{path.name}.{secrets.token_hex(4)}.{os.getpid()}{TEMP_SUFFIX}")
    try:
        yield temp_path
        replace(temp_path, path)
    finally:
        delete(temp_path)


def replace(source: Path, target: Path) -> None:
    """Rename a file or directory, replacing `target`; on Windows, retry while another program has it open."""
    _retry_while_in_use(lambda: os.replace(source, target))


def delete(path: Path) -> None:
    """Delete a file if it exists; on Windows, one that another program keeps open remains, with a warning."""
    try:
        _retry_while_in_use(lambda: path.unlink(missing_ok=True))
    except PermissionError as error:
        if not _is_in_use(error):
            raise
        logger.warning("%s: not deleted, because another program has it open", path)


def _retry_while_in_use(call: Callable[[], None]) -> None:
    for delay in RETRY_DELAYS:
        try:
            return call()
        except PermissionError as error:
            if not _is_in_use(error):
                raise
            time.sleep(delay)
    return call()


def _is_in_use(error: PermissionError) -> bool:
    return getattr(error, "winerror", None) in WINDOWS_IN_USE


def write_text(path: Path, text: str) -> None:
    r"""Write text as UTF-8 with lines that end in \n, so that a file is the same on all platforms.

    Characters that are not valid, such as those of a file name that is not UTF-8, become "?".
    """
    path.write_text(text, encoding="utf-8", errors="replace", newline="\n")


def fsync_file(path: Path) -> None:
    """Flush a file to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def fsync_directory(directory: Path) -> None:
    """Flush a directory to the disk, so that a rename in it survives a power failure.

    Windows cannot open a directory. A file system that does not support this is logged once. The files themselves are
    flushed in any case.
    """
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
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


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[bool]:
    """Lock a file within the block, or yield false if another process has locked it; create it if it is missing.

    The system removes the lock when the process ends, however it ends. On Windows, and where a file cannot be locked,
    nothing is.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("a", encoding="utf-8"))
            if sys.modules.get("fcntl"):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                stack.callback(fcntl.flock, file, fcntl.LOCK_UN)  # a child process would keep it otherwise
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            logger.info("%s: cannot be locked (%s)", path, error.strerror)
        yield True


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


def check_portable_name(name: str) -> str:
    """Return a name that every platform accepts for a file, so that runs can be moved.

    Raises:
        ValueError: If Windows does not accept it.
    """
    if WINDOWS_DEVICES.fullmatch(name):
        raise ValueError(f"{name} is reserved by Windows, which runs may be moved to; choose another name")
    if re.search(r'[<>:"|?*\x00-\x1f]', name) or name.endswith((".", " ")):
        raise ValueError(f'{name!r} has one of the characters <>:"|?* or ends with a dot or a space; rename it')
    return name


def check_windows_path(path: PurePath) -> None:
    """Check the names in a path, without its drive.

    Raises:
        ValueError: If Windows does not accept one of them; ":" would write to a hidden stream of the file before it.
    """
    for name in path.relative_to(path.anchor).parts:
        if name != "..":
            check_portable_name(name)


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

"""The official files of CIFAR-10: finding them, verifying them, unpacking or downloading the archive."""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, download_and_extract_archive, extract_archive

from cifar_ignite.errors import InputError
from cifar_ignite.files import is_directory, path_exists, replace, stat_path

CIFAR10_DIR = CIFAR10.base_folder
# Official md5 by file name; batches.meta is never read.
TRAIN_MD5S: Mapping[str, str] = dict(CIFAR10.train_list)
TEST_MD5S: Mapping[str, str] = dict(CIFAR10.test_list)
OFFICIAL_MD5S: Mapping[str, str] = {**TRAIN_MD5S, **TEST_MD5S}
# What else people have, by file name; the first match is reported.
OTHER_VERSIONS: Mapping[str, str] = {
    "*_batch*.gz": "gzipped: gunzip it and the other batches",
    "*_batch*.bin": "of the binary version, which cannot be read",
    "*-batches-bin": "the binary version, which cannot be read",
    "*_batch*.mat": "of the Matlab version, which cannot be read",
    "*-batches-mat": "the Matlab version, which cannot be read",
    "trainLabels.csv": "of Kaggle's PNG version, which cannot be read",
    "cifar*10*.*": f"not the official archive {CIFAR10.filename} (md5 {CIFAR10.tgz_md5})",
}
NUM_NAMES = 3
DOWNLOAD_HINT = "to download CIFAR-10, name another directory with DATA_DIR= (--set data.root=)"

logger = logging.getLogger(__name__)


# --- Finding and verifying ----------------------------------------------------------------------------------------


def find_cifar10(root: Path, md5s: Mapping[str, str] = OFFICIAL_MD5S) -> Path | None:
    """Return the directory with the official files: `root`/cifar-10-batches-py, or `root`, or one level down or up.

    Args:
        root: Directory that the user named.
        md5s: Official md5 by name of the files that are needed.

    Returns:
        Directory with all needed files, otherwise one with some official files, otherwise None.

    Raises:
        InputError: If the directory cannot be accessed, or several have the files.
    """
    for directory in (root, root / CIFAR10_DIR):
        stat_path(directory / CIFAR10_DIR)  # raises if the directory cannot be accessed
    for directories in _search_order(root):
        found = {directory.resolve(): directory for directory in directories if not missing_files(directory, md5s)}
        if len(found) > 1:
            copies = ", ".join(map(str, found.values()))
            raise InputError(f"{root}: has several copies of CIFAR-10 ({copies}); name one with DATA_DIR=")
        if found:
            return found.popitem()[1]
    nested = root / CIFAR10_DIR / CIFAR10_DIR
    incomplete = [path for path in (root / CIFAR10_DIR, root, nested) if missing_files(path) != list(OFFICIAL_MD5S)]
    return incomplete[0] if incomplete else None


def _search_order(root: Path) -> Iterator[list[Path]]:
    """Yield groups of directories that may contain the files, the most likely group first."""
    yield [root / CIFAR10_DIR]
    yield [root]
    # Hidden directories are downloads in progress, among others.
    subdirectories = [path for path in _list_visible(root) if os.path.isdir(path)]
    yield [*subdirectories, *(path / CIFAR10_DIR for path in subdirectories)]
    yield [root.parent / CIFAR10_DIR]


def _list_visible(directory: Path) -> list[Path]:
    """Return the sorted entries of a directory that are not hidden; none if it does not exist."""
    try:
        paths = sorted(directory.iterdir()) if is_directory(directory) else []
    except OSError as error:
        raise InputError(f"{directory}: cannot list the directory: {error.strerror}") from None
    return [path for path in paths if not path.name.startswith(".")]


def missing_files(directory: Path, md5s: Mapping[str, str] = OFFICIAL_MD5S) -> list[str]:
    """Return the names of the official files that are missing.

    Args:
        directory: Path of `cifar-10-batches-py`.
        md5s: Official md5 by name of the files to check.
    """
    return [name for name in md5s if not os.path.isfile(directory / name)]


def check_complete(directory: Path, md5s: Mapping[str, str] = OFFICIAL_MD5S) -> None:
    """Check that no official file is missing.

    Args:
        directory: Path of `cifar-10-batches-py`.
        md5s: Official md5 by name of the files to check.

    Raises:
        InputError: If a file is missing.
    """
    if missing := missing_files(directory, md5s):
        raise InputError(
            f"{directory}: no file {', '.join(missing)}; unpack {CIFAR10.url} again and copy what is missing; "
            f"or {DOWNLOAD_HINT}"
        )


def mismatched_files(directory: Path, md5s: Mapping[str, str] = OFFICIAL_MD5S) -> list[str]:
    """Return the names of the files whose contents are not the official ones; all files must exist.

    Args:
        directory: Path of `cifar-10-batches-py`.
        md5s: Official md5 by name of the files to check.

    Raises:
        InputError: If a file cannot be read.
    """

    def md5(name: str) -> str:
        try:
            return hashlib.md5((directory / name).read_bytes(), usedforsecurity=False).hexdigest()
        except OSError as error:
            raise InputError(f"{directory / name}: cannot read the file: {error.strerror}") from None

    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        return [name for name, actual in zip(md5s, pool.map(md5, md5s), strict=True) if actual != md5s[name]]


def describe_contents(root: Path) -> str:
    """Return, in words, what `root` contains instead of the official files."""
    directories = [path for path in (root / CIFAR10_DIR, root) if is_directory(path)]
    for pattern, description in OTHER_VERSIONS.items():
        for directory in directories:
            if found := min(directory.glob(pattern), default=None):
                return f"{found} is {description}"
    if not directories:
        return f"{root} does not exist"
    names = [path.name for path in _list_visible(directories[0])]
    listed = ", ".join(names[:NUM_NAMES]) + (f" and {len(names) - NUM_NAMES} more" if len(names) > NUM_NAMES else "")
    return f"{directories[0]} contains {listed or 'nothing'}"


# --- Unpacking and downloading ------------------------------------------------------------------------------------


def find_archive(root: Path) -> Path | None:
    """Return the official archive to unpack, verified by its md5, or None if it has to be downloaded.

    Raises:
        InputError: If there is no archive and something else is in the place of the download, or an archive cannot be
            read.
    """
    for archive in (root / CIFAR10.filename, root / CIFAR10_DIR / CIFAR10.filename):
        try:
            if check_integrity(archive, CIFAR10.tgz_md5):
                return archive
        except OSError as error:
            raise InputError(f"{archive}: cannot read the archive: {error.strerror}") from None
    for path in (root, root / CIFAR10_DIR):
        if path.is_symlink() and not path_exists(path):
            raise InputError(f"{path}: links to {os.readlink(path)}, which does not exist; {DOWNLOAD_HINT}")
        if path_exists(path) and not is_directory(path):
            raise InputError(f"{path}: is a file, not a directory of CIFAR-10; {DOWNLOAD_HINT}")
    if _list_visible(root / CIFAR10_DIR):
        raise InputError(f"{root / CIFAR10_DIR}: has no official file ({describe_contents(root)}); {DOWNLOAD_HINT}")
    return None


def install_cifar10(root: Path) -> Path:
    """Unpack the official archive if it is in `root`, otherwise download it; return the directory of the files.

    Raises:
        InputError: If something else is in the place of the files, or they cannot be written or downloaded.
    """
    if archive := find_archive(root):
        directory = archive.parent / CIFAR10_DIR
        logger.info("unpacking   %s to %s", archive, directory)
        try:
            _install(directory, lambda staging: extract_archive(archive, staging))
        except OSError as error:
            raise InputError(
                f"{archive}: cannot unpack it in {archive.parent}: {error.strerror}; unpack it elsewhere and name that "
                "directory with DATA_DIR= (--set data.root=)"
            ) from None
        return directory
    download_cifar10(root)
    return root / CIFAR10_DIR


def download_cifar10(root: Path) -> None:
    """Download, md5-verify and extract the official archive; `root`/cifar-10-batches-py appears when it is complete.

    Raises:
        InputError: If the download failed or cannot be written; directories created for it are removed.
    """
    found = describe_contents(root)
    logger.info("download    no CIFAR-10 in %s, one level down or up (%s)", root, found)
    created = [parent for parent in (root, *root.parents) if not path_exists(parent)]

    def download(staging: str) -> None:
        download_and_extract_archive(CIFAR10.url, staging, filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)

    try:
        root.mkdir(parents=True, exist_ok=True)
        _install(root / CIFAR10_DIR, download)
    except (URLError, OSError, RuntimeError, HTTPException) as error:
        for parent in created:
            with suppress(OSError):  # never created, or used by another process
                parent.rmdir()
        raise InputError(
            f"{root}: contains no CIFAR-10, nor does the level below or above ({found}), and the download failed "
            f"({error}): put the official files into {root / CIFAR10_DIR} (from {CIFAR10.url}), or use the synthetic "
            "dataset with DATA=synthetic (--set data.dataset=synthetic)"
        ) from None


def _install(directory: Path, extract: Callable[[str], object]) -> None:
    """Extract into a temporary directory and rename, unless another process has finished first."""
    try:
        with tempfile.TemporaryDirectory(
            dir=directory.parent, prefix=".download-", ignore_cleanup_errors=True
        ) as staging:
            extract(staging)
            with suppress(OSError):  # an empty directory, which Windows does not replace
                directory.rmdir()
            replace(Path(staging) / CIFAR10_DIR, directory)
    except Exception:
        if missing_files(directory) == list(OFFICIAL_MD5S):
            raise

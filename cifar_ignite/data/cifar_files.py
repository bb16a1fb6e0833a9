"""The official files of CIFAR: finding them, verifying them, unpacking or downloading the archive."""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, download_and_extract_archive, extract_archive

from cifar_ignite.errors import InputError
from cifar_ignite.files import is_directory, path_exists, replace, stat_path

NUM_NAMES = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OfficialFiles:
    """The official files of a version of CIFAR.

    Attributes:
        title: Name of the dataset in messages.
        source: Dataset of torchvision with the names, md5s and URL of the files.
        label_key: Key of the labels in a batch.
        load_class_names: Function that returns the names in label order, from the directory of the files.
        meta_md5s: Official md5 by name of the file with the class names; empty if it is not read.
        other_versions: What else people have, by file name; the first match is reported.
    """

    title: str
    source: type[CIFAR10]
    label_key: str
    load_class_names: Callable[[Path], tuple[str, ...]]
    meta_md5s: Mapping[str, str]
    other_versions: Mapping[str, str]

    @property
    def directory(self) -> str:
        """Name of the directory of the files."""
        return self.source.base_folder

    def labeled(self, *, train: bool) -> Mapping[str, str]:
        """Return the official md5 by name of the labeled batches of one split."""
        return dict(self.source.train_list if train else self.source.test_list)

    def required(self, *, train: bool) -> Mapping[str, str]:
        """Return the official md5 by name of the files from which one split is loaded."""
        return {**self.labeled(train=train), **self.meta_md5s}

    @property
    def all(self) -> Mapping[str, str]:
        """Official md5 by name of all files that are ever read."""
        return {**self.required(train=True), **self.required(train=False)}

    @property
    def download_hint(self) -> str:
        return f"to download {self.title}, name another directory with DATA_DIR= (--set data.root=)"


def provide_files(files: OfficialFiles, root: Path, *, train: bool) -> Path:
    """Return the directory of the files of one split; unpack or download the archive if there are none.

    Args:
        files: Version of CIFAR.
        root: Directory that contains the directory of the files, or see `find_files`.
        train: Whether the training set is needed; otherwise the test set.

    Raises:
        InputError: If a file is missing, or the download failed.
    """
    required = files.required(train=train)
    directory = find_files(files, root, required) or install_files(files, root)
    check_complete(files, directory, required)
    if directory != root / files.directory:
        logger.info("data.root   %s is in %s", files.title, directory)
    return directory


# --- Finding and verifying ----------------------------------------------------------------------------------------


def find_files(files: OfficialFiles, root: Path, md5s: Mapping[str, str]) -> Path | None:
    """Return the directory with the official files: `root`/cifar-10-batches-py, or `root`, or one level down or up.

    Args:
        files: Version of CIFAR.
        root: Directory that the user named.
        md5s: Official md5 by name of the files that are needed.

    Returns:
        Directory with all needed files, otherwise one with some official files, otherwise None.

    Raises:
        InputError: If the directory cannot be accessed, or several have the files.
    """
    for directory in (root, root / files.directory):
        stat_path(directory / files.directory)  # raises if the directory cannot be accessed
    for directories in _search_order(root, files.directory):
        found = {directory.resolve(): directory for directory in directories if not missing_files(directory, md5s)}
        if len(found) > 1:
            copies = ", ".join(map(str, found.values()))
            raise InputError(f"{root}: has several copies of {files.title} ({copies}); name one with DATA_DIR=")
        if found:
            return found.popitem()[1]
    usual = root / files.directory
    candidates = (usual, root, usual / files.directory)
    incomplete = [path for path in candidates if missing_files(path, files.all) != list(files.all)]
    return incomplete[0] if incomplete else None


def _search_order(root: Path, name: str) -> Iterator[list[Path]]:
    """Yield groups of directories that may contain the files, the most likely group first."""
    yield [root / name]
    yield [root]
    # Hidden directories are downloads in progress, among others.
    subdirectories = [path for path in _list_visible(root) if os.path.isdir(path)]
    yield [*subdirectories, *(path / name for path in subdirectories)]
    yield [root.parent / name]


def _list_visible(directory: Path) -> list[Path]:
    """Return the sorted entries of a directory that are not hidden; none if it does not exist."""
    try:
        paths = sorted(directory.iterdir()) if is_directory(directory) else []
    except OSError as error:
        raise InputError(f"{directory}: cannot list the directory: {error.strerror}") from None
    return [path for path in paths if not path.name.startswith(".")]


def missing_files(directory: Path, md5s: Mapping[str, str]) -> list[str]:
    """Return the names of the official files that are missing.

    Args:
        directory: Directory of the files.
        md5s: Official md5 by name of the files to check.
    """
    return [name for name in md5s if not os.path.isfile(directory / name)]


def check_complete(files: OfficialFiles, directory: Path, md5s: Mapping[str, str]) -> None:
    """Check that no official file is missing.

    Args:
        files: Version of CIFAR.
        directory: Directory of the files.
        md5s: Official md5 by name of the files to check.

    Raises:
        InputError: If a file is missing.
    """
    if missing := missing_files(directory, md5s):
        raise InputError(
            f"{directory}: no file {', '.join(missing)}; unpack {files.source.url} again and copy what is missing; "
            f"or {files.download_hint}"
        )


def mismatched_files(directory: Path, md5s: Mapping[str, str]) -> list[str]:
    """Return the names of the files whose contents are not the official ones; all files must exist.

    Args:
        directory: Directory of the files.
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


def describe_contents(files: OfficialFiles, root: Path) -> str:
    """Return, in words, what `root` contains instead of the official files."""
    directories = [path for path in (root / files.directory, root) if is_directory(path)]
    for pattern, description in files.other_versions.items():
        for directory in directories:
            if found := min(directory.glob(pattern), default=None):
                return f"{found} is {description}"
    if not directories:
        return f"{root} does not exist"
    names = [path.name for path in _list_visible(directories[0])]
    listed = ", ".join(names[:NUM_NAMES]) + (f" and {len(names) - NUM_NAMES} more" if len(names) > NUM_NAMES else "")
    return f"{directories[0]} contains {listed or 'nothing'}"


# --- Unpacking and downloading ------------------------------------------------------------------------------------


def find_archive(files: OfficialFiles, root: Path) -> Path | None:
    """Return the official archive to unpack, verified by its md5, or None if it has to be downloaded.

    Raises:
        InputError: If there is no archive and something else is in the place of the download, or an archive cannot be
            read.
    """
    source, directory = files.source, root / files.directory
    for archive in (root / source.filename, directory / source.filename):
        try:
            if check_integrity(archive, source.tgz_md5):
                return archive
        except OSError as error:
            raise InputError(f"{archive}: cannot read the archive: {error.strerror}") from None
    for path in (root, directory):
        if path.is_symlink() and not path_exists(path):
            raise InputError(f"{path}: links to {os.readlink(path)}, which does not exist; {files.download_hint}")
        if path_exists(path) and not is_directory(path):
            raise InputError(f"{path}: is a file, not a directory of {files.title}; {files.download_hint}")
    if _list_visible(directory):
        found = describe_contents(files, root)
        raise InputError(f"{directory}: has no official file ({found}); {files.download_hint}")
    return None


def install_files(files: OfficialFiles, root: Path) -> Path:
    """Unpack the official archive if it is in `root`, otherwise download it; return the directory of the files.

    Raises:
        InputError: If something else is in the place of the files, or they cannot be written or downloaded.
    """
    if archive := find_archive(files, root):
        directory = archive.parent / files.directory
        logger.info("unpacking   %s to %s", archive, directory)
        try:
            _install(files, directory, lambda staging: extract_archive(archive, staging))
        except OSError as error:
            raise InputError(
                f"{archive}: cannot unpack it in {archive.parent}: {error.strerror}; unpack it elsewhere and name that "
                "directory with DATA_DIR= (--set data.root=)"
            ) from None
        return directory
    download_files(files, root)
    return root / files.directory


def download_files(files: OfficialFiles, root: Path) -> None:
    """Download, md5-verify and extract the official archive; the directory appears when it is complete.

    Raises:
        InputError: If the download failed or cannot be written; directories created for it are removed.
    """
    source, found = files.source, describe_contents(files, root)
    logger.info("download    no %s in %s, one level down or up (%s)", files.title, root, found)
    created = [parent for parent in (root, *root.parents) if not path_exists(parent)]

    def download(staging: str) -> None:
        download_and_extract_archive(source.url, staging, filename=source.filename, md5=source.tgz_md5)

    try:
        root.mkdir(parents=True, exist_ok=True)
        _install(files, root / files.directory, download)
    except (URLError, OSError, RuntimeError, HTTPException) as error:
        for parent in created:
            with suppress(OSError):  # never created, or used by another process
                parent.rmdir()
        raise InputError(
            f"{root}: contains no {files.title}, nor does the level below or above ({found}), and the download failed "
            f"({error}): put the official files into {root / files.directory} (from {source.url}), or use the "
            "synthetic dataset with DATA=synthetic (--set data.dataset=synthetic)"
        ) from None


def _install(files: OfficialFiles, directory: Path, extract: Callable[[str], object]) -> None:
    """Extract into a temporary directory and rename, unless another process has finished first."""
    try:
        with tempfile.TemporaryDirectory(
            dir=directory.parent, prefix=".download-", ignore_cleanup_errors=True
        ) as staging:
            extract(staging)
            with suppress(OSError):  # an empty directory, which Windows does not replace
                directory.rmdir()
            replace(Path(staging) / files.directory, directory)
    except Exception:
        if missing_files(directory, files.all) == list(files.all):
            raise

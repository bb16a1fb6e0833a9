"""Finding image files below directories, and loading many of them."""

import logging
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import filterfalse, islice
from pathlib import Path

import ignite.distributed as idist
import torch
from PIL import UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from cifar_ignite.data.image_reading import MEMORY_BUDGET, can_allocate, load_image
from cifar_ignite.errors import InputError, first_line

# What operating systems and storage devices put next to images, in lowercase; names that start with a dot as well.
SYSTEM_NAMES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "#recycle", "$recycle.bin"}
MAX_LOGGED_NAMES = 3

logger = logging.getLogger(__name__)


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the given files, and all files below the given directories, sorted; loading them shows which are images.

    Links to directories are followed, except to those above the given one; each directory is read once. Hidden and
    system entries are skipped and counted in one log line; a directory below that cannot be read is logged.

    Raises:
        InputError: If a path does not exist or cannot be read, or a directory contains no file.
    """
    files: list[Path] = []
    for path in paths:
        try:
            is_directory = stat.S_ISDIR(path.stat().st_mode)
        except (OSError, ValueError) as error:  # ValueError: a null byte, or characters that no file name can have
            raise InputError(f"{printable(path)}: {_reason(error)}") from None
        files += _find_below(path) if is_directory else [path]
    return files


def _find_below(directory: Path) -> list[Path]:
    found: list[Path] = []
    skipped: list[str] = []
    errors: list[OSError] = []
    for parent, subdirectories, names in _walk(directory, errors):
        skipped += filter(is_system_name, subdirectories + names)
        subdirectories[:] = filterfalse(is_system_name, subdirectories)
        found += [Path(parent, name) for name in filterfalse(is_system_name, names)]
    if skipped:
        examples = printable(", ".join(sorted(set(skipped))[:MAX_LOGGED_NAMES]))
        logger.info("%s: skipped %d hidden or system entries (%s)", printable(directory), len(skipped), examples)
    reports = [f"{printable(error.filename)}: cannot list this directory ({_reason(error)})" for error in errors]
    if not found:
        raise InputError(reports[0] if reports else f"{printable(directory)}: no images in this directory or below")
    for report in reports:
        logger.warning("%s", report)
    return sorted(found)


def _walk(directory: Path, errors: list[OSError]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield what os.walk does, each directory once and linked ones last; the caller removes those it does not want."""
    visited = {str(above) for above in Path(os.path.realpath(directory)).parents}
    pending = [str(directory)]
    for start in pending:
        for parent, subdirectories, names in os.walk(start, onerror=errors.append):
            if (real := os.path.realpath(parent)) in visited:
                subdirectories.clear()
                continue
            visited.add(real)
            yield parent, subdirectories, names
            children = [os.path.join(parent, name) for name in subdirectories]
            pending += sorted(child for child in children if os.path.islink(child))


def is_system_name(name: str) -> bool:
    """Return whether a file or directory is hidden, or was created by an operating system or a storage device."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def printable(text: object) -> str:
    """Return text, such as a path, for one line of a log: control characters and undecodable bytes become "?"."""
    return re.sub("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "?", str(text))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)


# --- Loading ------------------------------------------------------------------------------------------------------


def load_images(files: Sequence[Path], size: int) -> tuple[Tensor, dict[Path, str]]:
    """Load all readable files in a thread pool (Pillow decodes without the GIL), with a progress bar on a terminal.

    Args:
        files: Image files.
        size: Side in pixels to which the center square of each image is resized.

    Returns:
        The images of the readable files, uint8 (N, 3, size, size), and the reason, in one line, for each other file.
    """
    unreadable: dict[Path, str] = {}
    num_readable = 0
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    is_disabled = None if idist.get_rank() == 0 else True  # None: shown on a terminal only
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # Pillow's, of odd metadata and large images; it refuses too large ones
        results = _map_in_chunks(pool, partial(try_load_image, size=size), files)
        for file, result in tqdm(results, total=len(files), desc="load", disable=is_disabled, dynamic_ncols=True):
            if isinstance(result, str):
                unreadable[file] = result
            else:
                images[num_readable] = result
                num_readable += 1
    return images[:num_readable], unreadable


def _map_in_chunks(
    pool: ThreadPoolExecutor, load: Callable[[Path], Tensor | str], files: Sequence[Path], chunk_size: int = 256
) -> Iterator[tuple[Path, Tensor | str]]:
    """Yield each file with its result; pool.map alone would submit a call for every file at once."""
    remaining = iter(files)
    while chunk := list(islice(remaining, chunk_size)):
        yield from zip(chunk, pool.map(load, chunk), strict=True)


def try_load_image(file: Path, size: int) -> Tensor | str:
    """Return the image as `load_image` does, or the reason, in one line, why it cannot be loaded."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            return "not a regular file"  # opening a named pipe would wait for its writer
        return load_image(file, size)
    except InputError as error:
        return str(error)
    except UnidentifiedImageError:
        return "not an image of a known format or pixel type; convert it to PNG or JPEG"
    except MemoryError:
        return "not enough memory to decode this image"
    except Exception as error:  # damaged files raise almost anything: OSError, SyntaxError, ValueError, struct.error
        is_clear = can_allocate(MEMORY_BUDGET)  # libjpeg, libwebp and OpenJPEG report any failure as damage
        return f"not a readable image{'' if is_clear else ', or not enough memory to decode it'} ({_reason(error)})"

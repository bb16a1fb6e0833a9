"""Pictures in, classes out: files of any size and kind, each shown to a trained network as 32x32 pixels."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from cifar_ignite.checkpoints import create_unique_dir
from cifar_ignite.config import InputError
from cifar_ignite.data import IMAGE_SIZE, Images
from cifar_ignite.engines import create_forward, select_precision
from cifar_ignite.evaluate import average_views, run_evaluator
from cifar_ignite.scores import tabulate
from cifar_ignite.trained import load_trained

SHOWN = 20
# A JPEG is decoded at an eighth, a quarter or half of its size, as long as this much is left to resample from.
DECODED_SIZE = 4 * IMAGE_SIZE
BACKGROUND = "white"

logger = logging.getLogger(__name__)


def predict(
    paths: Sequence[Path],
    checkpoint: Path | None = None,
    model_name: str | None = None,
    overrides: Sequence[str] = (),
    tta: str | None = None,
) -> Path:
    """Say what is in pictures.

    Args:
        paths: files, or folders that are searched for pictures, their folders too.
        checkpoint: any checkpoint of this project; None takes the newest best model.
        model_name: experiment whose newest best model is taken; None takes that of any.
        overrides: `section.key=value`, applied to the checkpoint's configuration.
        tta: "flip" or "shift": predict by the mean over views (`evaluate.average_views`).

    Returns:
        predictions.csv, in a folder of its own: file, predicted, confidence, and the probability of each class.

    Raises:
        InputError: no checkpoint, no such file, or not one readable picture; nothing was written.
    """
    trained = load_trained(checkpoint, model_name, overrides)
    config, device = trained.config, trained.device
    logger.info("%s from %s", config.model.name, trained.path)
    files = find_pictures(paths)
    read, pictures = read_pictures(files)
    if not read:
        raise InputError(f"{paths[0]}: none of {len(files)} files is a readable picture")
    images = Images(pictures, None, [str(file) for file in read], tuple(trained.record.class_names))
    forward = create_forward(trained.model.to(device), device, select_precision(config.precision, device))
    forward = average_views(forward, tta) if tta else forward
    probabilities, _ = run_evaluator(trained.model, forward, images, config, device)
    table = tabulate(images, probabilities, images.class_names).rename(columns={"ID": "file"})

    shown = table[["file", "predicted", "confidence"]].head(SHOWN)
    logger.info("\n%s\n", shown.assign(confidence=shown["confidence"].map("{:.1%}".format)).to_string(index=False))
    if len(table) > SHOWN:
        counts = table["predicted"].value_counts()
        logger.info("%d more; in all: %s", len(table) - SHOWN, ", ".join(f"{n} {name}" for name, n in counts.items()))
    try:
        stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        folder = create_unique_dir(config.output_dir / "predictions", f"{config.experiment}_{stamp}")
        table.to_csv(folder / "predictions.csv", index=False, float_format="%.6f")
    except OSError as error:
        raise InputError(f"output_dir: cannot write into {config.output_dir}: {error.strerror}") from None
    logger.info("predictions  %s (%d of %d files)", folder / "predictions.csv", len(read), len(files))
    return folder / "predictions.csv"


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """Files as they are named; of folders, all files below whose ending Pillow knows, sorted.

    Raises:
        InputError: a path does not exist, or a folder has no such file.
    """
    endings = Image.registered_extensions()
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in endings and file.is_file())
        if not found:
            raise InputError(f"{path}: no pictures there (PNG, JPEG, WebP, GIF, BMP, TIFF, ...)")
        files += found
    return files


def read_pictures(files: Sequence[Path]) -> tuple[list[Path], Tensor]:
    """Read all that can be read, by several threads (Pillow decodes without Python's lock); a line for each other.

    Returns:
        The files that were read, and their pictures, uint8 (N, 3, 32, 32).
    """
    read: list[Path] = []
    pictures: list[Tensor] = []
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # of large pictures (Pillow refuses too large ones) and odd metadata
        results = tqdm(_map_ahead(pool, files), total=len(files), desc="reading", disable=None, dynamic_ncols=True)
        for file, result in results:
            if isinstance(result, str):
                logger.warning("%s: %s", file, result)
            else:
                read.append(file)
                pictures.append(result)
    return read, torch.stack(pictures) if pictures else torch.empty(0, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)


def _map_ahead(
    pool: ThreadPoolExecutor, files: Sequence[Path], chunk: int = 256
) -> Iterator[tuple[Path, Tensor | str]]:
    """pool.map would take up all files at once: a hundred thousand waiting calls."""
    waiting = iter(files)
    while batch := list(islice(waiting, chunk)):
        yield from zip(batch, pool.map(try_to_read, batch), strict=True)


def try_to_read(file: Path) -> Tensor | str:
    """The picture, see `read_picture`, or in one line why it cannot be read."""
    try:
        return read_picture(file)
    except UnidentifiedImageError:
        return "not a picture of a known format"
    except Exception as error:  # damaged files raise nearly anything: OSError, SyntaxError, ValueError, struct.error
        return f"not a readable picture ({' '.join(str(error).split()) or type(error).__name__})"


def read_picture(file: Path) -> Tensor:
    """A picture of any size as the network wants it: its middle square at 32x32 pixels.

    Turned as its EXIF data says, transparency on white, greyscale and palettes as RGB, 16 bits as 8; of an animation
    the first frame. A picture of 32x32 pixels keeps its values.

    Returns:
        uint8 (3, 32, 32).

    Raises:
        Exception: of nearly any kind, if the file is damaged or no picture.
    """
    with Image.open(file) as opened:
        opened.draft("RGB", (DECODED_SIZE, DECODED_SIZE))
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
        small = ImageOps.fit(image.convert("RGB"), (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()

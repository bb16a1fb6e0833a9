"""A trained network for use elsewhere: as a torch.export program, and as ONNX."""

import importlib.util
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cifar_ignite.checkpoints import replacing
from cifar_ignite.config import InputError, RunFailedError, SyntheticConfig
from cifar_ignite.data import draw_synthetic
from cifar_ignite.trained import load_trained

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18
TOLERANCE = 1e-4
CHECKED_BATCHES = (1, 256)

# Writes a program to a path, and returns what somebody who loads the file can call.
Write = Callable[[ExportedProgram, Path], Callable[[Tensor], Tensor]]

logger = logging.getLogger(__name__)


class Deployed(nn.Module):
    """A network with its normalisation: images (N, 3, 32, 32), uint8, or float32 in [0, 1], to logits (N, 10)."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return self.model((images - self.mean) / self.std)


def export(checkpoint: Path | None = None, model_name: str | None = None, overrides: Sequence[str] = ()) -> list[Path]:
    """Write a trained network as programs that need nothing of this project, and check each against the network.

    A program takes one type of images: so there are two of each kind, `{experiment}_uint8` and `{experiment}_float32`.
    Both compute in float32, for any number of images.

    Args:
        checkpoint: any checkpoint of this project; None takes the newest best model.
        model_name: experiment whose newest best model is taken; None takes that of any.
        overrides: `section.key=value`, applied to the checkpoint's configuration.

    Returns:
        The files, in `output_dir`/exports: .pt2 for torch.export.load, .onnx if the packages for it are installed.

    Raises:
        InputError: the checkpoint is missing or does not fit.
        RunFailedError: a program and the network differ by more than `TOLERANCE` in a logit; its file is not written.
    """
    trained = load_trained(checkpoint, model_name, overrides)
    config, folder = trained.config, trained.config.output_dir / "exports"
    model = trained.model.to(memory_format=torch.contiguous_format).eval()
    network = Deployed(model, config.augment.mean, config.augment.std).eval()
    logger.info("%s from %s, epoch %d", config.model.name, trained.path, trained.record.epoch)
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    kinds: dict[str, Write] = {".pt2": write_torch} if missing else {".pt2": write_torch, ".onnx": write_onnx}
    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for dtype in (torch.uint8, torch.float32):
            images = example_images(max(CHECKED_BATCHES), dtype)
            program = capture(network, images)
            for ending, write in kinds.items():
                name = f"{config.experiment}_{str(dtype).removeprefix('torch.')}{ending}"
                write_checked(write, program, network, images, folder / name)
                files.append(folder / name)
    except OSError as error:
        raise InputError(f"output_dir: cannot write into {folder}: {error.strerror}") from None
    if missing:
        logger.info("no ONNX: %s not installed; pip install -e '.[onnx]'", ", ".join(missing))
    logger.info("input: images (N, 3, 32, 32), uint8, or float32 in [0, 1]; output: logits (N, 10)")
    logger.info("classes in order: %s", ", ".join(trained.record.class_names))
    return files


def write_checked(write: Write, program: ExportedProgram, network: nn.Module, images: Tensor, path: Path) -> None:
    """Write a program, read it back, and tell how far its logits are from the network's; too far, and it is gone."""
    with replacing(path) as temporary:
        differences = compare_logits(network, write(program, temporary), images)
        if not max(differences) <= TOLERANCE:
            raise RunFailedError(f"{path.name}: its logits differ by {max(differences):.2g} from the model's")
    told = ", ".join(f"{value:.1e} (N={size})" for value, size in zip(differences, CHECKED_BATCHES, strict=True))
    logger.info("%s  %.1f MB  greatest difference to the model %s", path, path.stat().st_size / 1e6, told)


def example_images(count: int, dtype: torch.dtype) -> Tensor:
    """Images of the embedded dataset: (count, 3, 32, 32), uint8, or float32 in [0, 1]."""
    images = draw_synthetic(SyntheticConfig(test_size=count), train=False).images
    return images if dtype == torch.uint8 else images.float() / 255


def capture(network: nn.Module, images: Tensor) -> ExportedProgram:
    """torch.export for batches of any size."""
    return torch.export.export(network, (images[:2],), dynamic_shapes=({0: Dim("batch", min=1)},))


def write_torch(program: ExportedProgram, path: Path) -> Callable[[Tensor], Tensor]:
    """A .pt2, of torch.export."""
    with path.open("wb") as file:
        torch.export.save(program, file)  # type: ignore[arg-type]
    with path.open("rb") as file:
        return torch.export.load(file).module()  # type: ignore[arg-type]


def write_onnx(program: ExportedProgram, path: Path) -> Callable[[Tensor], Tensor]:
    """An .onnx, with input "images" and output "logits"."""
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within the exporter, which are not ours to mend
        converted = torch.onnx.export(
            program, input_names=["images"], output_names=["logits"], opset_version=OPSET, dynamo=True, verbose=False
        )
    assert converted is not None, "the dynamo exporter returns a program"
    converted.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@torch.inference_mode()
def compare_logits(network: nn.Module, program: Callable[[Tensor], Tensor], images: Tensor) -> list[float]:
    """Greatest absolute difference between logits, for batches of each of the sizes in `CHECKED_BATCHES`."""
    return [
        max((network(batch) - program(batch)).abs().max().item() for batch in images[: 16 * size].split(size))
        for size in CHECKED_BATCHES
    ]

"""The export command: a trained model as torch.export and ONNX programs that need nothing of this project."""

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cifar_ignite.config import SyntheticConfig
from cifar_ignite.data.synthetic import make_synthetic
from cifar_ignite.errors import TrainingError
from cifar_ignite.evaluation.arguments import check_arguments
from cifar_ignite.evaluation.trained_model import NormalizedModel, load_trained_model, log_temperature
from cifar_ignite.files import atomic_write, translate_write_errors
from cifar_ignite.training.device import dtype_name

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET_VERSION = 18
LOGIT_TOLERANCE = 1e-4
# Name of the temperature in the metadata of a program.
TEMPERATURE_KEY = "temperature"
# Pixels of the images that programs are verified with: 256 images of CIFAR-10. The memory for them grows with it.
VERIFIED_PIXELS = 256 * 32**2

# Saves a program to a path; returns the saved program, loaded again, as a function from images to logits.
SaveProgram = Callable[[ExportedProgram, Path], Callable[[Tensor], Tensor]]

logger = logging.getLogger(__name__)


def export(
    checkpoint: str | Path | None = None, model_name: str | None = None, overrides: Sequence[str] = ()
) -> list[Path]:
    """Export a trained model and verify each exported program against the model.

    A program accepts a single dtype of images, so there are two of each format, `{experiment}_uint8` and
    `{experiment}_float32`. Both compute in float32 and accept any batch size.

    Args:
        checkpoint: Any checkpoint of this project; None loads the latest best model.
        model_name: Experiment whose latest best model is loaded; None allows all experiments.
        overrides: Strings `section.key=value`, applied to the checkpoint's configuration.

    Returns:
        Files in `output_dir`/exports: .pt2 for torch.export.load, and .onnx if the packages for it are installed.

    Raises:
        InputError: If an argument is invalid, the checkpoint is missing or does not match its configuration, or a file
            cannot be written.
        TrainingError: If a logit of a program differs by more than `LOGIT_TOLERANCE`; its file is not written.
    """
    check_arguments(checkpoint, model_name)
    trained = load_trained_model(checkpoint, model_name, overrides)
    config, directory = trained.config, trained.config.output_dir / "exports"
    model = NormalizedModel.from_trained(trained).to(memory_format=torch.contiguous_format)
    metadata = {} if model.temperature is None else {TEMPERATURE_KEY: repr(model.temperature)}
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    savers: dict[str, Callable] = {".pt2": save_pt2} if missing else {".pt2": save_pt2, ".onnx": save_onnx}
    formats: dict[str, SaveProgram] = {name: partial(save, metadata=metadata) for name, save in savers.items()}
    with translate_write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        files = [
            file
            for dtype in (torch.uint8, torch.float32)
            for file in export_dtype(
                model, example_images(config.data.image_size, dtype), directory / config.experiment, formats
            )
        ]
    if missing:
        logger.info("no ONNX: %s not installed; pip install %s", ", ".join(missing), " ".join(missing))
    class_names = trained.record.class_names
    size = config.data.image_size
    logger.info(
        "input: images (N, 3, %d, %d), uint8, or float32 in [0, 1]; output: logits (N, %d)",
        *(size, size, len(class_names)),
    )
    logger.info("class names: %s", ", ".join(class_names))
    log_temperature(trained, None)
    return files


def export_dtype(model: NormalizedModel, images: Tensor, prefix: Path, formats: dict[str, SaveProgram]) -> list[Path]:
    """Export a model for images of one dtype, in several formats.

    Args:
        model: Model in eval mode, on the CPU.
        images: Images that the programs are verified with, one by one and all in a batch; see `example_images`.
        prefix: Path of the files without "_{dtype}{extension}".
        formats: Function that saves a program, by file extension.
    """
    program = export_program(model, images)
    files = []
    for extension, save in formats.items():
        files.append(prefix.with_name(f"{prefix.name}_{dtype_name(images.dtype)}{extension}"))
        export_and_verify(save, program, model, images, files[-1])
    return files


def export_and_verify(
    save: SaveProgram, program: ExportedProgram, model: nn.Module, images: Tensor, path: Path
) -> None:
    """Save a program, load it again, and compare its logits with those of the model.

    Raises:
        TrainingError: If they differ by more than `LOGIT_TOLERANCE`; `path` is not written.
    """
    with atomic_write(path) as temp_path:
        loaded = save(program, temp_path)
        batch_sizes = (1, len(images))
        diffs = [max_logit_diff(model, loaded, images, batch_size) for batch_size in batch_sizes]
        if not max(diffs) <= LOGIT_TOLERANCE:
            raise TrainingError(f"{path.name}: logits differ by {max(diffs):.2g} from the model's")
    by_batch_size = ", ".join(
        f"{diff:.1e} (N={batch_size})" for diff, batch_size in zip(diffs, batch_sizes, strict=True)
    )
    logger.info("%s  %.1f MB  largest logit difference %s", path, path.stat().st_size / 1e6, by_batch_size)


@torch.inference_mode()
def max_logit_diff(model: nn.Module, program: Callable[[Tensor], Tensor], images: Tensor, batch_size: int) -> float:
    """Return the largest absolute difference of a logit over up to 16 batches of one size."""
    batches = images[: 16 * batch_size].split(batch_size)
    return max((model(batch) - program(batch)).abs().max().item() for batch in batches)


def example_images(size: int, dtype: torch.dtype) -> Tensor:
    """Return images of the synthetic dataset: (N, 3, size, size), uint8, or float32 in [0, 1].

    Of large images there are fewer, with `VERIFIED_PIXELS` in all, but at least two.
    """
    count = max(2, VERIFIED_PIXELS // size**2)
    images = make_synthetic(SyntheticConfig(test_size=count), train=False, size=size).images
    return images if dtype == torch.uint8 else images.float() / 255


def export_program(model: nn.Module, images: Tensor) -> ExportedProgram:
    """Export a model with torch.export for batches of any size."""
    return torch.export.export(model, (images[:2],), dynamic_shapes=({0: Dim("batch", min=1)},))


def save_pt2(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> Callable[[Tensor], Tensor]:
    """Save a program as .pt2, with `metadata` as extra files, and load it again."""
    # If a write to its file fails, the writer of torch.export.save ends the process.
    content = io.BytesIO()
    torch.export.save(program, content, extra_files=dict(metadata))
    path.write_bytes(content.getvalue())
    with path.open("rb") as file:
        return torch.export.load(file).module()  # type: ignore[arg-type]


def save_onnx(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> Callable[[Tensor], Tensor]:
    """Save a program as .onnx, with input "images", output "logits" and metadata, and load it with onnxruntime."""
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        onnx_program = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=["logits"],
            opset_version=OPSET_VERSION,
            dynamo=True,
            verbose=False,
        )
    assert onnx_program is not None, "the dynamo exporter returns a program"
    onnx_program.model.metadata_props.update(metadata)
    onnx_program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

"""Checkpoint in, evaluation folder out: accuracy where labels exist, predictions to hand in, statistics."""

import json
import logging
import math
import os
import shutil
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from ignite.engine import Events
from ignite.handlers import EpochOutputStore, ProgressBar
from ignite.metrics import ConfusionMatrix
from torch import Tensor, nn

from cifar_ignite.checkpoints import create_unique_dir
from cifar_ignite.config import Config, InputError
from cifar_ignite.data import NUM_CLASSES, Images, load_images, read_test_file
from cifar_ignite.engines import Forward, create_evaluator, create_forward, select_precision
from cifar_ignite.figures import draw_confusion_matrix
from cifar_ignite.handlers import attach_metrics
from cifar_ignite.loader import EvalLoader
from cifar_ignite.trained import load_trained

SAMPLES = 10

logger = logging.getLogger(__name__)


def evaluate(
    checkpoint: Path | None = None,
    model_name: str | None = None,
    test_file: Path | None = None,
    overrides: Sequence[str] = (),
    tta: str | None = None,
) -> Path:
    """Predict the test set with a trained model.

    Args:
        checkpoint: any checkpoint of this project; None takes the newest best model.
        model_name: experiment whose newest best model is taken; None takes that of any.
        test_file: the competition's unlabelled pickle; None takes the test set of the checkpoint's data.
        overrides: `section.key=value`, applied to the checkpoint's configuration.
        tta: test-time augmentation that is evaluated too, beside the plain model: "flip" or "shift" (`average_views`).

    Returns:
        The evaluation folder.

    Raises:
        InputError: checkpoint or data are missing or do not fit; nothing was written.
    """
    trained = load_trained(checkpoint, model_name, overrides)
    path, record, config, device, model = trained.path, trained.record, trained.config, trained.device, trained.model
    images = read_test_file(test_file) if test_file else load_images(config.data, train=False)
    logger.info(
        "%s from %s, epoch %d, on %d images of %s",
        config.model.name,
        path,
        record.epoch,
        len(images.images),
        test_file or config.data.source,
    )
    forward = create_forward(model, device, select_precision(config.precision, device))
    probabilities, metrics = run_evaluator(model, forward, images, config, device)
    summary: dict[str, Any] = {"images": len(images.images)} | summarize(metrics)
    if tta:
        tta_probabilities, tta_metrics = run_evaluator(model, average_views(forward, tta), images, config, device)
        summary |= {"tta": {"name": tta} | summarize(tta_metrics)}

    val_acc = "none" if record.val_acc is None else f"{100 * record.val_acc:.2f}"
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    try:
        folder = create_unique_dir(config.output_dir / "evaluations", f"{config.experiment}_val_acc_{val_acc}_{stamp}")
        write_predictions(images, probabilities, folder / "predictions.csv")
        if tta:
            write_predictions(images, tta_probabilities, folder / f"predictions_tta_{tta}.csv")
        (folder / "metrics.json").write_text(json.dumps(summary, indent=2) + "\n")
        link_checkpoint(path, folder / "model.pth")
        if "confusion" in metrics:
            matrix = metrics["confusion"].numpy()
            draw_confusion_matrix(matrix, record.class_names, folder / "confusion_matrix.png")
    except OSError as error:
        raise InputError(f"output_dir: cannot write into {config.output_dir}: {error.strerror}") from None
    log_samples(images, probabilities, record.class_names)
    log_statistics(images, probabilities, record.class_names)
    if "accuracy" in metrics:
        logger.info("test accuracy %.2f%%, test loss %.4f", 100 * metrics["accuracy"], metrics["loss"])
        if tta:
            shown = (tta, 100 * tta_metrics["accuracy"], tta_metrics["loss"])
            logger.info("with test-time augmentation (%s): accuracy %.2f%%, loss %.4f", *shown)
    logger.info("evaluation  %s (%s)", folder, ", ".join(sorted(item.name for item in folder.iterdir())))
    return folder


def average_views(forward: Forward, tta: str) -> Forward:
    """Test-time augmentation: the mean of the logits of several views of each image.

    flip: the image and its mirror image.
    shift: these two with half of the weight; the other half is shared by both of them moved one pixel up and left, and
        one pixel down and right, the rim reflected (as in Jordan, 2024, arXiv:2404.00498).
    """

    def mirrored(images: Tensor) -> Tensor:
        return (forward(images) + forward(images.flip(-1))) / 2

    def shifted(images: Tensor) -> Tensor:
        padded = F.pad(images, [1] * 4, mode="reflect")
        height, width = images.shape[-2:]
        up_left, down_right = padded[..., 2:, 2:], padded[..., :height, :width]
        return mirrored(images) / 2 + (mirrored(up_left) + mirrored(down_right)) / 4

    return {"flip": mirrored, "shift": shifted}[tta]


def summarize(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Those of the metrics that are numbers."""
    return {name: float(metrics[name]) for name in ("accuracy", "loss") if name in metrics}


def run_evaluator(
    model: nn.Module, forward: Forward, images: Images, config: Config, device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    """Predict all images by `forward`, which goes through `model`.

    Returns:
        Probabilities, float (N, 10) on the CPU, and, where labels exist, "loss", "accuracy" and "confusion", counts
        (10, 10) by true and predicted class.
    """
    evaluator = create_evaluator(model, forward)
    outputs = EpochOutputStore(output_transform=lambda output: output[0])
    outputs.attach(evaluator, "logits")
    ProgressBar(disable=None, dynamic_ncols=True).attach(evaluator, event_name=Events.ITERATION_COMPLETED)
    labels = None
    if images.labels is not None:
        labels = images.labels.to(device)
        attach_metrics(evaluator, F.cross_entropy, device)
        ConfusionMatrix(NUM_CLASSES, device=device).attach(evaluator, "confusion")
    mean, std = config.augment.mean, config.augment.std
    loader = EvalLoader(images.images.to(device), labels, batch_size=config.data.batch_size, mean=mean, std=std)
    state = evaluator.run(loader)
    return torch.cat(state.logits).float().softmax(1).cpu(), state.metrics  # type: ignore[attr-defined]


def write_predictions(images: Images, probabilities: Tensor, path: Path) -> None:
    """predictions.csv: ID and Labels (the predicted class, 0 to 9), a row an image in the order of the test set."""
    pd.DataFrame({"ID": images.ids, "Labels": probabilities.argmax(1).numpy()}).to_csv(path, index=False)


def link_checkpoint(checkpoint: Path, link: Path) -> None:
    """A relative link, so that `outputs` can be moved; a copy where the file system has no links."""
    try:
        link.symlink_to(os.path.relpath(checkpoint.resolve(), link.parent.resolve()))
    except OSError:
        shutil.copyfile(checkpoint, link)


def log_samples(images: Images, probabilities: Tensor, class_names: Sequence[str]) -> None:
    """The first few predictions with their confidence."""
    confidence, predicted = probabilities[:SAMPLES].max(1)
    table = pd.DataFrame(
        {
            "ID": images.ids[:SAMPLES],
            "predicted": [class_names[label] for label in predicted],
            "confidence": [f"{value:.1%}" for value in confidence.tolist()],
        }
    )
    if images.labels is not None:
        table["true"] = [class_names[label] for label in images.labels[:SAMPLES]]
        table[""] = ["" if right else "wrong" for right in table["predicted"] == table["true"]]
    logger.info("\nsample predictions\n%s\n", table.to_string(index=False))


def log_statistics(images: Images, probabilities: Tensor, class_names: Sequence[str]) -> None:
    """By class: how often it was predicted, how confidently, and, where labels exist, how many of it were found."""
    confidence, predicted = probabilities.max(1)
    table = pd.DataFrame({"predicted": predicted, "confidence": confidence})
    statistics = table.groupby("predicted")["confidence"].agg(["size", "mean"]).reindex(range(NUM_CLASSES))
    shown = pd.DataFrame(
        {
            "class": class_names,
            "predicted": statistics["size"].fillna(0).astype(int),
            "share": (statistics["size"].fillna(0) / len(table)).map("{:.1%}".format),
            "mean confidence": statistics["mean"].map(_percent),
        }
    )
    if images.labels is not None:
        right = pd.Series((predicted == images.labels).numpy()).groupby(images.labels.numpy()).mean()
        shown["accuracy"] = right.reindex(range(NUM_CLASSES)).map(_percent)
    logger.info("by class\n%s\n", shown.to_string(index=False))
    low, middle = confidence.min().item(), confidence.median().item()
    logger.info(
        "confidence: mean %.1f%%, median %.1f%%, lowest %.1f%%; %.1f%% of the images below 50%%",
        100 * confidence.mean().item(),
        100 * middle,
        100 * low,
        100 * (confidence < 0.5).float().mean().item(),
    )


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"

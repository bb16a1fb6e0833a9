"""Checkpoint in, evaluation folder out: accuracy where labels exist, predictions to hand in, statistics."""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pandas as pd
import torch
import torch.nn.functional as F
from ignite.engine import Events
from ignite.handlers import EpochOutputStore, ProgressBar
from ignite.metrics import ConfusionMatrix, TopKCategoricalAccuracy
from ignite.metrics.confusion_matrix import cmPrecision, cmRecall
from torch import Tensor, nn

from cifar_ignite import processes
from cifar_ignite.checkpoints import create_unique_dir
from cifar_ignite.config import Config, InputError
from cifar_ignite.data import NUM_CLASSES, Images, load_images, read_test_file
from cifar_ignite.engines import Forward, create_evaluator, create_forward, select_precision
from cifar_ignite.handlers import attach_metrics
from cifar_ignite.loader import EvalLoader
from cifar_ignite.report import write_report
from cifar_ignite.scores import Scores, format_classes, score
from cifar_ignite.trained import Trained, load_trained

SAMPLES = 10

logger = logging.getLogger(__name__)


def evaluate(
    checkpoint: Path | None = None,
    model_name: str | None = None,
    test_file: Path | None = None,
    overrides: Sequence[str] = (),
    tta: str | None = None,
) -> Path:
    """Predict the test set with a trained model; under torchrun or SLURM, together with the job's other processes.

    Args:
        checkpoint: any checkpoint of this project; None takes the newest best model.
        model_name: experiment whose newest best model is taken; None takes that of any.
        test_file: the competition's unlabelled pickle; None takes the test set of the checkpoint's data.
        overrides: `section.key=value`, applied to the checkpoint's configuration.
        tta: test-time augmentation that is evaluated too, beside the plain model: "flip" or "shift" (`average_views`).

    Returns:
        The evaluation folder; where several processes evaluate, the first one makes it, and others return its parent.

    Raises:
        InputError: checkpoint or data are missing or do not fit; nothing was written.
    """
    trained = load_trained(checkpoint, model_name, overrides)
    with processes.joined(trained.device):
        return evaluate_trained(trained, test_file, tta)


def evaluate_trained(trained: Trained, test_file: Path | None, tta: str | None) -> Path:
    """What `evaluate` does once the network is there."""
    config, device, model = trained.config, trained.device, trained.model.to(trained.device)
    (images,) = processes.load_once(
        lambda: [read_test_file(test_file) if test_file else load_images(config.data, train=False)]
    )
    data = test_file.name if test_file else f"the test set of {config.data.source}"
    logger.info(
        "%s from %s, epoch %d, on %d images of %s",
        config.model.name,
        trained.path,
        trained.record.epoch,
        len(images.images),
        test_file or config.data.source,
    )
    forward = create_forward(model, device, select_precision(config.precision, device))
    scores = score_by(forward, trained, images)
    averaged = score_by(average_views(forward, tta), trained, images) if tta else None
    summary = {"run": trained.record.run, "epoch": trained.record.epoch, "data": data} | scores.summary
    if tta and averaged:
        summary["tta"] = {"name": tta} | averaged.summary
    if idist.get_rank():
        return config.output_dir / "evaluations"

    try:
        folder = create_folder(trained)
        write_predictions(scores, folder / "predictions.csv")
        if averaged:
            write_predictions(averaged, folder / f"predictions_tta_{tta}.csv")
        scores.details.to_csv(folder / "details.csv", index=False, float_format="%.6f")
        (folder / "metrics.json").write_text(json.dumps(summary, indent=2) + "\n")
        link_checkpoint(trained.path, folder / "model.pth")
        write_report(folder, trained, scores, summary, images, ["--tta", tta] if tta else [])
    except OSError as error:
        raise InputError(f"output_dir: cannot write into {config.output_dir}: {error.strerror}") from None
    log_scores(scores)
    if tta and averaged and images.labels is not None:
        shown = (tta, 100 * averaged.summary["accuracy"], averaged.summary["loss"])
        logger.info("with test-time augmentation (%s): accuracy %.2f%%, loss %.4f", *shown)
    logger.info("evaluation  %s (%s)", folder, ", ".join(sorted(item.name for item in folder.iterdir())))
    return folder


def create_folder(trained: Trained) -> Path:
    """A new evaluation folder, named by experiment, validation accuracy in percent, and time."""
    val_acc = "none" if trained.record.val_acc is None else f"{100 * trained.record.val_acc:.2f}"
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    name = f"{trained.config.experiment}_val_acc_{val_acc}_{stamp}"
    return create_unique_dir(trained.config.output_dir / "evaluations", name)


# --- Predicting ---------------------------------------------------------------------------------------------------


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


def score_by(forward: Forward, trained: Trained, images: Images) -> Scores:
    """The predictions of `forward`, which goes through the trained model, and what they are worth."""
    probabilities, metrics = run_evaluator(trained.model, forward, images, trained.config, trained.device)
    return score(images, probabilities, metrics, trained.record.class_names)


def run_evaluator(
    model: nn.Module, forward: Forward, images: Images, config: Config, device: torch.device
) -> tuple[Tensor, dict[str, Any]]:
    """Predict all images by `forward`, which goes through `model`.

    Returns:
        Probabilities, float (N, 10) on the CPU, and, where labels exist, the metrics that `scores.score` wants.
    """
    evaluator = create_evaluator(model, forward)
    outputs = EpochOutputStore(output_transform=lambda output: output[0])
    outputs.attach(evaluator, "logits")
    hidden = None if idist.get_rank() == 0 else True
    ProgressBar(disable=hidden, dynamic_ncols=True).attach(evaluator, event_name=Events.ITERATION_COMPLETED)
    labels = None
    if images.labels is not None:
        labels = images.labels.to(device)
        attach_metrics(evaluator, F.cross_entropy, device)
        # Ignite's own Precision and Recall fail on the empty batches that one of several processes may have.
        confusion = ConfusionMatrix(NUM_CLASSES, device=device)
        precision, recall = cmPrecision(confusion, average=False), cmRecall(confusion, average=False)
        for name, metric in {
            "top2_accuracy": TopKCategoricalAccuracy(2, device=device),
            "confusion": confusion,
            "precision": precision,
            "recall": recall,
            "f1": precision * recall * 2 / (precision + recall + 1e-15),
        }.items():
            metric.attach(evaluator, name)
    mean, std = config.augment.mean, config.augment.std
    loader = EvalLoader(
        images.images.to(device),
        labels,
        batch_size=config.data.batch_size,
        mean=mean,
        std=std,
        rank=idist.get_rank(),
        processes=idist.get_world_size(),
    )
    state = evaluator.run(loader)
    logits = processes.collect(state.logits, loader.rows(), len(images.images))  # type: ignore[attr-defined]
    return logits.float().softmax(1).cpu(), state.metrics


# --- Writing and telling ------------------------------------------------------------------------------------------


def write_predictions(scores: Scores, path: Path) -> None:
    """predictions.csv: ID and Labels (the predicted class, 0 to 9), a row an image in the order of the test set."""
    numbers = {name: number for number, name in enumerate(scores.classes.index)}
    labels = scores.details["predicted"].map(numbers)
    pd.DataFrame({"ID": scores.details["ID"], "Labels": labels}).to_csv(path, index=False)


def link_checkpoint(checkpoint: Path, link: Path) -> None:
    """A relative link, so that `outputs` can be moved; a copy where the file system has no links."""
    try:
        link.symlink_to(os.path.relpath(checkpoint.resolve(), link.parent.resolve()))
    except OSError:
        shutil.copyfile(checkpoint, link)


def log_scores(scores: Scores) -> None:
    """The first few predictions, the table by class, confidence, and accuracy where labels are known."""
    columns = [name for name in ("ID", "predicted", "confidence", "true") if name in scores.details]
    samples = scores.details[columns].head(SAMPLES).copy()
    samples["confidence"] = samples["confidence"].map("{:.1%}".format)
    if "true" in samples:
        samples[""] = ["" if right else "wrong" for right in samples["predicted"] == samples["true"]]
    logger.info("\nsample predictions\n%s\n", samples.to_string(index=False))
    logger.info("by class\n%s\n", format_classes(scores.classes).to_string())
    confidence = scores.details["confidence"]
    logger.info(
        "confidence: mean %.1f%%, median %.1f%%, lowest %.1f%%; %.1f%% of the images below 50%%",
        *(
            100 * value
            for value in (confidence.mean(), confidence.median(), confidence.min(), (confidence < 0.5).mean())
        ),
    )
    if "accuracy" in scores.summary:
        names = ("top2_accuracy", "expected_calibration_error", "accuracy")
        top2, error, accuracy = (100 * scores.summary[name] for name in names)
        logger.info("top-2 accuracy %.2f%%, expected calibration error %.2f%%", top2, error)
        logger.info("test accuracy %.2f%%, test loss %.4f", accuracy, scores.summary["loss"])

"""The evaluate command: predictions and metrics of a trained model on the test set."""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from cifar_ignite.data.cifar10 import CIFAR10_CLASSES
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.data.registry import load_dataset_on_ranks
from cifar_ignite.data.unlabeled import load_unlabeled_test_set
from cifar_ignite.distributed.env import dist_env_from_environ
from cifar_ignite.distributed.process_group import distributed_context
from cifar_ignite.errors import check_named
from cifar_ignite.evaluation.arguments import check_arguments
from cifar_ignite.evaluation.inference import create_inference_forward, run_inference
from cifar_ignite.evaluation.metrics import (
    EvaluationResult,
    compute_metrics,
    format_calibration,
    format_per_class_table,
    format_sure,
)
from cifar_ignite.evaluation.report import Evaluation, write_report
from cifar_ignite.evaluation.trained_model import TrainedModel, check_fits, load_trained_model, log_temperature
from cifar_ignite.files import create_unique_dir, timestamp, translate_write_errors, write_text
from cifar_ignite.training.environment import describe_environment
from cifar_ignite.training.forward import Forward, create_tta_forward

NUM_SAMPLES = 10

logger = logging.getLogger(__name__)


def evaluate(
    checkpoint: str | Path | None = None,
    model_name: str | None = None,
    test_file: str | Path | None = None,
    overrides: Sequence[str] = (),
    tta: str | None = None,
) -> Evaluation:
    """Predict the test set with a trained model; distributed under torchrun or SLURM.

    Args:
        checkpoint: Any checkpoint of this project; None loads the latest best model that fits the data.
        model_name: Experiment whose latest best model is loaded; None allows all experiments.
        test_file: Unlabeled test pickle of the competition; None loads the test set of the checkpoint's dataset.
        overrides: Strings `section.key=value`, applied to the checkpoint's configuration.
        tta: Test-time augmentation to evaluate besides the plain model, "flip" or "shift" (see `create_tta_forward`).

    Returns:
        Predictions, metrics, and the directory that rank 0 has written them into.

    Raises:
        InputError: If an argument, the checkpoint or the dataset is missing or invalid, or their classes differ;
            nothing was written.
    """
    check_arguments(checkpoint, model_name, tta)
    check_named(test_file=test_file)
    test_file = Path(test_file) if test_file else None
    trained = load_trained_model(checkpoint, model_name, overrides, CIFAR10_CLASSES if test_file else None)
    with distributed_context(trained.device, dist_env_from_environ()) as context:
        dataset = load_test_set(trained, test_file)
        dataset_name = test_file.name if test_file else f"{trained.config.data.dataset} test set"
        check_fits(trained, dataset, dataset_name)
        logger.info("test set    %s (%s images)", test_file or trained.config.data.dataset, f"{len(dataset):,}")
        evaluation = replace(evaluate_model(trained, dataset, dataset_name, tta), test_file=test_file)
        if not context.env.is_primary:
            return evaluation
        directory = write_evaluation(evaluation)
    log_evaluation(evaluation)
    logger.info("evaluation  %s (%s)", directory, ", ".join(sorted(path.name for path in directory.iterdir())))
    return replace(evaluation, directory=directory)


def load_test_set(trained: TrainedModel, test_file: Path | None) -> ImageDataset:
    """Load an unlabeled test file, or the test set that the configuration of the model names."""
    if test_file:
        return load_unlabeled_test_set(test_file)
    return load_dataset_on_ranks(trained.config.data, train=False, device=trained.device)


def evaluate_model(trained: TrainedModel, dataset: ImageDataset, dataset_name: str, tta: str | None) -> Evaluation:
    """Evaluate a trained model on a dataset, and with test-time augmentation if `tta` names one."""
    forward = create_inference_forward(trained)
    result = _evaluate_with(trained, forward, dataset, None)
    tta_result = _evaluate_with(trained, forward, dataset, tta) if tta else None
    environment = describe_environment(trained.device, trained.config.precision)
    return Evaluation(trained, dataset, dataset_name, environment, result, tta, tta_result)


def _evaluate_with(trained: TrainedModel, forward: Forward, dataset: ImageDataset, tta: str | None) -> EvaluationResult:
    logits, metrics = run_inference(trained, create_tta_forward(forward, tta) if tta else forward, dataset)
    log_temperature(trained, tta)
    return compute_metrics(dataset, logits, metrics, trained.record.class_names, trained.temperature(tta))


# --- Writing ------------------------------------------------------------------------------------------------------


def write_evaluation(evaluation: Evaluation) -> Path:
    """Write all files of an evaluation into a new directory, or none if one fails, and return the directory.

    Raises:
        InputError: If a file cannot be written.
    """
    trained = evaluation.trained
    with translate_write_errors(trained.config.output_dir):
        directory = create_unique_dir(trained.config.output_dir / "evaluations", _directory_name(trained))
        try:
            _write_files(evaluation, directory)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
    return directory


def _write_files(evaluation: Evaluation, directory: Path) -> None:
    result = evaluation.result
    write_predictions(result, directory / "predictions.csv")
    if evaluation.tta_result:
        write_predictions(evaluation.tta_result, directory / f"predictions_tta_{evaluation.tta}.csv")
    result.predictions.to_csv(directory / "details.csv", index=False, float_format="%.6f", lineterminator="\n")
    write_text(directory / "metrics.json", json.dumps(evaluation.summary, indent=2) + "\n")
    link_checkpoint(evaluation.trained.path, directory / "model.pth")
    write_report(evaluation, directory)


def _directory_name(trained: TrainedModel) -> str:
    """Return {experiment}_val_acc_{validation accuracy in percent}_{timestamp}."""
    val_acc = "none" if trained.record.val_acc is None else f"{100 * trained.record.val_acc:.2f}"
    return f"{trained.config.experiment}_val_acc_{val_acc}_{timestamp()}"


def write_predictions(result: EvaluationResult, path: Path) -> None:
    """Write predictions.csv: ID and Labels (index of the predicted class), one row per image in dataset order."""
    indices = {name: index for index, name in enumerate(result.per_class.index)}
    labels = result.predictions["predicted"].map(indices)
    table = pd.DataFrame({"ID": result.predictions["ID"], "Labels": labels})
    table.to_csv(path, index=False, lineterminator="\n")


def link_checkpoint(checkpoint: Path, link: Path) -> None:
    """Create a relative symbolic link, so that `outputs` can be moved; otherwise a hard link, otherwise a copy.

    Windows requires a privilege for symbolic links; a path relative to another drive (ValueError), and hard links
    between drives, do not exist. The target of a hard link stays valid: checkpoints are replaced, never changed.
    """
    source = checkpoint.resolve()
    try:
        link.symlink_to(os.path.relpath(source, link.parent.resolve()))
    except (OSError, ValueError):
        try:
            link.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, link)


# --- Logging ------------------------------------------------------------------------------------------------------


def log_evaluation(evaluation: Evaluation) -> None:
    """Log sample predictions, metrics per class, confidences, and with labels the accuracies and losses."""
    result, tta_result = evaluation.result, evaluation.tta_result
    logger.info("\nsample predictions\n%s\n", _format_samples(result.predictions).to_string(index=False))
    logger.info("per-class metrics\n%s\n", format_per_class_table(result.per_class).to_string())
    _log_confidence(result.predictions["confidence"])
    if "accuracy" not in result.summary:
        return
    logger.info(format_calibration(result.summary))
    logger.info(format_sure(evaluation.summary["sure"]))
    accuracies = (100 * result.summary[name] for name in ("top2_accuracy", "accuracy"))
    logger.info("top-2 accuracy %.2f%%\ntest accuracy %.2f%%, test loss %.4f", *accuracies, result.summary["loss"])
    if tta_result:
        accuracy, loss = 100 * tta_result.summary["accuracy"], tta_result.summary["loss"]
        logger.info("with test-time augmentation (%s): accuracy %.2f%%, loss %.4f", evaluation.tta, accuracy, loss)


def _format_samples(predictions: pd.DataFrame) -> pd.DataFrame:
    columns = [name for name in ("ID", "predicted", "confidence", "true") if name in predictions]
    samples = predictions[columns].head(NUM_SAMPLES).copy()
    samples["confidence"] = samples["confidence"].map("{:.1%}".format)
    if "true" in samples:
        samples[""] = ["" if is_correct else "wrong" for is_correct in samples["predicted"] == samples["true"]]
    return samples


def _log_confidence(confidence: pd.Series) -> None:
    fractions = (confidence.mean(), confidence.median(), confidence.min(), (confidence < 0.5).mean())
    logger.info(
        "confidence: mean %.1f%%, median %.1f%%, minimum %.1f%%; below 50%%: %.1f%% of images",
        *(100 * fraction for fraction in fractions),
    )

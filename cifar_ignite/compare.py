"""All runs of an output folder side by side."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from cifar_ignite.config import InputError, load_config, parse_config
from cifar_ignite.data import NUM_CLASSES
from cifar_ignite.figures import draw_comparison
from cifar_ignite.models import create_model

logger = logging.getLogger(__name__)


def compare(overrides: Sequence[str] = ()) -> Path:
    """Show a table of all runs, oldest first, and write it as comparison.csv and comparison.png.

    Args:
        overrides: `output_dir=folder`, if it is not "outputs".

    Returns:
        comparison.csv, in the output folder: run, experiment, model, parameters, epochs (done), planned, best_val_acc
        and test_acc and test_acc_tta (in [0, 1]; of the newest evaluation; empty where there is none), and
        images_per_second (median of the epochs).

    Raises:
        InputError: there is no run.
    """
    output_dir = parse_config({}, "--set", overrides).output_dir
    histories: dict[str, pd.DataFrame] = {}
    rows = []
    evaluated = newest_evaluations(output_dir / "evaluations")
    for run_dir in sorted((output_dir / "training_runs").glob("*/")):
        try:
            history = read_history(run_dir)
            rows.append(describe_run(run_dir, history, evaluated.get(run_dir.name, {})))
            histories[run_dir.name] = history
        except InputError as error:
            logger.warning("left out: %s", error)
    if not rows:
        raise InputError(f"{output_dir / 'training_runs'}: no runs to compare; train one first: make train MODEL=se")
    table = pd.DataFrame(rows)
    logger.info("%s\n", format_runs(table).to_string(index=False))
    try:
        table.to_csv(output_dir / "comparison.csv", index=False)
        draw_comparison(table, histories, output_dir / "comparison.png")
    except OSError as error:
        raise InputError(f"output_dir: cannot write into {output_dir}: {error.strerror}") from None
    logger.info("comparison  %s, %s", output_dir / "comparison.csv", output_dir / "comparison.png")
    return output_dir / "comparison.csv"


def read_history(run_dir: Path) -> pd.DataFrame:
    """metrics.csv of a run.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = run_dir / "logs" / "metrics.csv"
    try:
        history = pd.read_csv(path)
        return history.astype({"epoch": int, "val_acc": float, "train_acc": float, "images_per_second": float})
    except OSError:
        raise InputError(f"{run_dir.name}: no epoch is complete (no logs/metrics.csv)") from None
    except (ValueError, KeyError):
        raise InputError(f"{path}: not the metrics of a run") from None


def describe_run(run_dir: Path, history: pd.DataFrame, evaluation: dict[str, Any]) -> dict[str, Any]:
    """A row of comparison.csv."""
    config = load_config(run_dir / "config.json")
    with torch.device("meta"):  # shapes only: nothing is allocated
        model = create_model(num_classes=NUM_CLASSES, **config.model.model_dump())
    return {
        "run": run_dir.name,
        "experiment": config.experiment,
        "model": config.model.name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "epochs": int(history["epoch"].max()),
        "planned": config.train.epochs,
        "best_val_acc": history["val_acc"].max(),
        "test_acc": evaluation.get("accuracy", float("nan")),
        "test_acc_tta": evaluation.get("tta", {}).get("accuracy", float("nan")),
        "images_per_second": history["images_per_second"].median(),
    }


def newest_evaluations(folder: Path) -> dict[str, dict[str, Any]]:
    """By the name of the run: metrics.json of the newest evaluation of it in which labels were known."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*/metrics.json"), key=lambda path: path.stat().st_mtime_ns):
        try:
            metrics = json.loads(path.read_text())
            if "accuracy" in metrics:
                found[metrics["run"]] = metrics
        except (ValueError, KeyError, TypeError):
            logger.warning("left out: %s: not the metrics of an evaluation", path)
    return found


def format_runs(table: pd.DataFrame) -> pd.DataFrame:
    """comparison.csv as people read it."""
    columns = {"best_val_acc": "best validation", "test_acc": "test", "test_acc_tta": "with TTA"}
    shown = table[["run", "experiment", "model"]].copy()
    shown["parameters"] = table["parameters"].map("{:,}".format)
    shown["epochs"] = [f"{done}/{planned}" for done, planned in zip(table["epochs"], table["planned"], strict=True)]
    for name, heading in columns.items():
        shown[heading] = ["–" if pd.isna(value) else f"{value:.2%}" for value in table[name]]
    shown["images/s"] = table["images_per_second"].map("{:,.0f}".format)
    return shown

"""The compare command: all runs below an output directory, side by side."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from cifar_ignite.config import Config
from cifar_ignite.config_io import flatten_dict, load_config, parse_config
from cifar_ignite.errors import InputError
from cifar_ignite.files import atomic_write, check_listable, list_files, translate_write_errors
from cifar_ignite.models import create_model
from cifar_ignite.plots import plot_comparison

logger = logging.getLogger(__name__)


def compare(overrides: Sequence[str] = ()) -> Path:
    """Log all runs, in order of their names, and in what they differ; write comparison.csv and comparison.png.

    Args:
        overrides: Strings `section.key=value`; `output_dir` is used.

    Returns:
        comparison.csv in the output directory, with the columns run, experiment, data, model, parameters, epochs
        (completed), planned, best_val_acc, test_acc, test_acc_tta and calibration_error (in [0, 1], of the latest
        evaluation; empty if there is none), and images_per_second (median over the epochs). Next to it,
        comparison_differences.csv has one row for each key of the configuration and of the environment that differs
        between the runs, and one column per run.

    Raises:
        InputError: If there is no run, the runs cannot be listed, or a file cannot be written.
    """
    output_dir = parse_config({}, "--set", overrides).output_dir
    table, histories = load_runs(output_dir)
    if table.empty:
        raise InputError(
            f"{output_dir / 'training_runs'}: no runs to compare; "
            "train one first: python -m cifar_ignite train --config se"
        )
    differences = diff_settings({run: load_settings(output_dir / "training_runs" / run) for run in table["run"]})
    logger.info("%s\n", format_comparison(table).to_string(index=False))
    log_differences(differences)
    with translate_write_errors(output_dir):
        with atomic_write(output_dir / "comparison.csv") as temp_path:
            table.to_csv(temp_path, index=False, lineterminator="\n")
        with atomic_write(output_dir / "comparison_differences.csv") as temp_path:
            differences.to_csv(temp_path, index_label="key", lineterminator="\n")
        with atomic_write(output_dir / "comparison.png") as temp_path:
            plot_comparison(table, histories, temp_path)
    names = ("comparison.csv", "comparison.png", "comparison_differences.csv")
    logger.info("comparison  %s", ", ".join(str(output_dir / name) for name in names))
    return output_dir / "comparison.csv"


def load_runs(output_dir: Path) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Return the rows of comparison.csv, and metrics.csv by name of the run; log a warning for each run skipped."""
    histories: dict[str, pd.DataFrame] = {}
    rows = []
    evaluations = load_latest_evaluations(output_dir / "evaluations")
    check_listable(output_dir / "training_runs")
    configs = list_files(output_dir / "training_runs", "*/config.json")
    for run_dir in sorted(config.parent for config in configs):
        try:
            history = load_history(run_dir)
            rows.append(summarize_run(run_dir, history, evaluations.get(run_dir.name, {})))
            histories[run_dir.name] = history
        except InputError as error:
            logger.warning("skipped: %s", error)
    return pd.DataFrame(rows).astype({"parameters": "Int64"} if rows else {}), histories


def load_history(run_dir: Path) -> pd.DataFrame:
    """Load metrics.csv of a run.

    Raises:
        InputError: If it is missing, damaged or empty.
    """
    path = run_dir / "logs" / "metrics.csv"
    try:
        history = pd.read_csv(path)
        history = history.astype({"epoch": int, "val_acc": float, "train_acc": float, "images_per_second": float})
    except FileNotFoundError:
        raise InputError(f"{run_dir.name}: no completed epoch (no logs/metrics.csv)") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read the metrics: {error.strerror}") from None
    except (ValueError, KeyError):
        raise InputError(f"{path}: not the metrics of a run") from None
    if history.empty:
        raise InputError(f"{run_dir.name}: no completed epoch (logs/metrics.csv is empty)")
    return history


def summarize_run(run_dir: Path, history: pd.DataFrame, evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the row of comparison.csv for a run.

    Args:
        run_dir: Directory of the run.
        history: Its metrics.csv.
        evaluation: metrics.json of its latest evaluation; empty if there is none.
    """
    config = load_config(run_dir / "config.json")
    return {
        "run": run_dir.name,
        "experiment": config.experiment,
        "data": config.data.dataset,
        "model": config.model.name,
        "parameters": count_parameters(config, run_dir / "classes.json"),
        "epochs": int(history["epoch"].max()),
        "planned": config.train.epochs,
        "best_val_acc": history["val_acc"].max(),
        "test_acc": evaluation.get("accuracy", float("nan")),
        "test_acc_tta": evaluation.get("tta", {}).get("accuracy", float("nan")),
        "calibration_error": evaluation.get("expected_calibration_error", float("nan")),
        "images_per_second": history["images_per_second"].median(),
    }


def count_parameters(config: Config, classes_path: Path) -> int | None:
    """Return the number of parameters of a run's model, or None if the run has not recorded its classes.

    Args:
        config: Configuration of the run.
        classes_path: classes.json of the run.

    Raises:
        InputError: If the model is not registered, or lacks an option.
    """
    try:
        num_classes = len(json.loads(classes_path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    try:
        with torch.device("meta"):  # shapes only, without memory
            model = create_model(num_classes=num_classes, **config.model.model_dump())
    except InputError as error:
        raise InputError(f"{classes_path.parent.name}: {error}") from None
    return sum(parameter.numel() for parameter in model.parameters())


def load_latest_evaluations(directory: Path) -> dict[str, dict[str, Any]]:
    """Return metrics.json of each run's latest evaluation with labels, by name of the run."""
    latest: dict[str, dict[str, Any]] = {}
    for path in reversed(list_files(directory, "*/metrics.json")):
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
            if "accuracy" in metrics:
                check_numbers(metrics)
                latest[metrics["run"]] = metrics
        except FileNotFoundError:  # deleted meanwhile
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            logger.warning("skipped: %s: not the metrics of an evaluation", path)
    return latest


def check_numbers(metrics: dict[str, Any]) -> None:
    """Raise a KeyError, TypeError or AttributeError if a number of metrics.json is missing or is something else.

    Evaluations without test-time augmentation have no accuracy with it.
    """
    accuracies = [metrics["accuracy"], metrics.get("tta", metrics)["accuracy"]]
    for value in [*accuracies, metrics.get("expected_calibration_error", 0.0)]:
        if not isinstance(value, float):
            raise TypeError(f"expected a number, got {value!r}")


def format_comparison(table: pd.DataFrame) -> pd.DataFrame:
    """Return comparison.csv as text: headings in words, percentages, "–" for missing values."""
    formatted = table[["run", "experiment", "data", "model"]].copy()
    formatted["parameters"] = ["–" if pd.isna(count) else f"{count:,.0f}" for count in table["parameters"]]
    formatted["epochs"] = [f"{done}/{planned}" for done, planned in zip(table["epochs"], table["planned"], strict=True)]
    headings = {
        "best_val_acc": "best validation",
        "test_acc": "test",
        "test_acc_tta": "test, TTA",
        "calibration_error": "calibration error",
    }
    for name, heading in headings.items():
        formatted[heading] = ["–" if pd.isna(value) else f"{value:.2%}" for value in table[name]]
    formatted["images/s"] = table["images_per_second"].map("{:,.0f}".format)
    return formatted


# --- What differs -------------------------------------------------------------------------------------------------


def load_settings(run_dir: Path) -> dict[str, str]:
    """Return configuration and environment of a run as text, by "section.key" and "environment.key".

    Where a run has continued in another environment, the values are joined by " → ".
    """
    tree = load_config(run_dir / "config.json").model_dump(mode="json")
    settings = {key: json.dumps(value) for key, value in flatten_dict(tree).items()}
    environments = load_environments(run_dir)
    for key in dict.fromkeys(key for environment in environments for key in environment if key != "from_iteration"):
        values = dict.fromkeys(str(environment.get(key)) for environment in environments)
        settings[f"environment.{key}"] = " → ".join(values)
    return settings


def load_environments(run_dir: Path) -> list[dict[str, Any]]:
    """Return environment.json of a run; empty, with a warning if it is damaged, for a run without it."""
    path = run_dir / "environment.json"
    try:
        return [dict(environment) for environment in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError):
        logger.warning("%s: not the environments of a run", path)
        return []


def diff_settings(settings: Mapping[str, Mapping[str, str]]) -> pd.DataFrame:
    """Return the keys (rows) whose values are not the same in all runs (columns), "–" for missing values."""
    table = pd.DataFrame(settings).fillna("–")
    return table[table.nunique(axis=1) > 1]


def log_differences(differences: pd.DataFrame) -> None:
    """Log the table of `diff_settings`, without the commands, which are long and follow from the other rows."""
    if len(differences.columns) > 1:
        shown = differences.drop(index="environment.command", errors="ignore")
        text = shown.to_string() if len(shown) else "none in configuration and environment"
        logger.info("differences between the runs\n%s\n", text)

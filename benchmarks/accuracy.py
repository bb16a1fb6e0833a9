"""Test accuracy of a recipe over several seeds, and its training time.

    python -m benchmarks.accuracy --config se_fast --seeds 5

Each seed trains on all 50,000 images without any selection, and its last weights (the EMA, if the recipe has one) are
evaluated on the test set once, plain and with test-time augmentation. The time to reach an accuracy is measured in one
more run, with validation images held out. Times are those of training iterations: start-up, evaluation and saving are
excluded, compilation is reported separately. With `--jobs`, seeds are trained at once, and their times are not those of
a run alone. The runs stay in the output directory; FILE.json is rewritten after each.
"""

import argparse
import logging
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.concurrent_runs import map_runs
from benchmarks.options import check_counts, create_out, create_parser, exit_on_error, write_json
from cifar_ignite.config import Config, DataConfig
from cifar_ignite.config_io import load_config
from cifar_ignite.data.registry import load_dataset
from cifar_ignite.errors import InputError
from cifar_ignite.evaluate import evaluate
from cifar_ignite.train import train
from cifar_ignite.training.device import precision_name, select_device
from cifar_ignite.training.environment import describe_environment, device_name, format_commit

TTA = "flip"
MILESTONES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96)
# Validation images of the run that measures the time to an accuracy, if the recipe has none.
CURVE_VAL_SIZE = 5000


# --- Runs ---------------------------------------------------------------------------------------------------------


def evaluate_seed(config: Config) -> dict[str, float]:
    """Train one seed and evaluate it: test accuracies in [0, 1], training seconds, images per second."""
    history, compile_seconds = train_once(config)
    metrics = evaluate(model_name=config.experiment, overrides=[f"output_dir={config.output_dir}"], tta=TTA).summary
    return {
        "seed": config.seed,
        "accuracy": metrics["accuracy"],
        f"accuracy_tta_{TTA}": metrics["tta"]["accuracy"],
        "loss": metrics["loss"],
        "seconds": history["seconds"].sum(),
        "compile_seconds": compile_seconds,
        "images_per_second": history["images_per_second"].median(),
    }


def train_once(config: Config) -> tuple[pd.DataFrame, float]:
    """Train, and return metrics.csv and the seconds of compilation."""
    result = train(config)
    found = re.search(r"compiled in (\d+) s", (result.run_dir / "logs" / "training.log").read_text(encoding="utf-8"))
    return result.history, float(found[1]) if found else 0.0


def configure_run(recipe: Config, seed: int, val_size: int | None) -> Config:
    """Return the recipe with a seed and a number of validation images, as an experiment of its own."""
    name = f"{recipe.experiment}_seed{seed}" + ("" if val_size == 0 else "_curve")
    data = recipe.data.model_copy(update={"val_size": val_size})
    return recipe.model_copy(update={"seed": seed, "experiment": name, "data": data})


def measure(recipe: Config, num_seeds: int, with_curve: bool, out: Path, jobs: int = 1) -> dict[str, Any]:
    """Run all seeds, then the run with validation; write the result to {out}.json after each, and return it.

    Args:
        recipe: Configuration of the first seed.
        num_seeds: Number of seeds.
        with_curve: Whether there is a run with validation.
        out: Path of the output files, without suffix.
        jobs: Number of seeds that are trained at once.

    Raises:
        InputError: If the configuration or the dataset is invalid, or there is no labeled test set.
        TrainingError: If a run fails.
    """
    check_test_set(recipe.data)
    device = select_device(recipe.device)
    precision = precision_name(recipe.precision, device)
    seeds: list[dict[str, float]] = []
    result: dict[str, Any] = {
        "title": f"{recipe.experiment}, {recipe.train.epochs} epochs, {precision}, {device_name(device)}",
        "environment": describe_environment(device, recipe.precision),
        "config": recipe.model_dump(mode="json"),
        "jobs": jobs,
        "seeds": seeds,
    }
    configs = [configure_run(recipe, seed, val_size=0) for seed in range(recipe.seed, recipe.seed + num_seeds)]
    for figures in map(evaluate_seed, configs) if jobs == 1 else map_runs(evaluate_seed, configs, jobs):
        seeds.append(figures)
        result["summary"] = summarize(seeds)
        write_json(out, result)
    if with_curve:
        history, _ = train_once(configure_run(recipe, recipe.seed, curve_val_size(recipe)))
        result["time_to_accuracy"] = time_to_accuracy(history)
        write_json(out, result)
    return result


def check_test_set(config: DataConfig) -> None:
    """Load the test set, which is first needed after hours of training.

    Raises:
        InputError: If it is missing, invalid or unlabeled.
    """
    if load_dataset(config, train=False).labels is None:
        raise InputError(
            f"data.dataset: the test set of {config.dataset} is unlabeled, so its accuracy is not known; measure "
            "validation accuracies with benchmarks.ablations"
        )


def curve_val_size(recipe: Config) -> int | None:
    """Return the number of validation images of the run that measures the time to an accuracy; None is a tenth."""
    return CURVE_VAL_SIZE if recipe.data.val_size == 0 else recipe.data.val_size


# --- Figures ------------------------------------------------------------------------------------------------------


def time_to_accuracy(history: pd.DataFrame) -> list[dict[str, float]]:
    """Return for each milestone reached by the validation accuracy the first such epoch and the seconds until then."""
    seconds = history["seconds"].cumsum()
    rows = []
    for milestone in MILESTONES:
        reached = history.index[history["val_acc"] >= milestone]
        if len(reached):
            first = reached[0]
            rows.append({"val_acc": milestone, "epoch": int(history["epoch"][first]), "seconds": seconds[first]})
    return rows


def summarize(seeds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the mean and the sample standard deviation (0 for one seed) of each figure over the seeds."""
    table = pd.DataFrame(seeds).drop(columns="seed")
    return {
        name: {"mean": column.mean(), "sd": statistics.stdev(column) if len(column) > 1 else 0.0}
        for name, column in table.items()
    }


def format_result(result: dict[str, Any], val_size: int | None) -> str:
    """Return the result as text: a table of the seeds, the times to an accuracy, and a row for the results page."""
    lines = [f"{result['title']}: all training images, last weights, the test set evaluated once per seed"]
    if result["jobs"] > 1:
        lines.append(f"up to {result['jobs']} seeds at once: the times are not those of a run alone")
    lines.append(pd.DataFrame(result["seeds"]).to_string(index=False, float_format="{:.4f}".format))
    if "time_to_accuracy" in result:
        held_out = "a tenth of the images" if val_size is None else f"{val_size} images"
        lines += ["", f"time to validation accuracy ({held_out} held out in another run, evaluation excluded)"]
        table = pd.DataFrame(result["time_to_accuracy"]).to_string(index=False, float_format="{:.2f}".format)
        lines.append(table if result["time_to_accuracy"] else f"below {MILESTONES[0]:.0%} in all epochs")
    lines += [
        "",
        "| recipe | commit | seeds | test | with flip | training + compilation | images/s |",
        7 * "|---" + "|",
    ]
    lines.append(
        markdown_row(result["title"], format_commit(result["environment"]), result["summary"], len(result["seeds"]))
    )
    return "\n".join(lines)


def markdown_row(title: str, commit: str, summary: dict[str, dict[str, float]], num_seeds: int) -> str:
    """Return the row of a recipe for the results page."""

    def percent(name: str) -> str:
        spread = f" ± {100 * summary[name]['sd']:.2f}" if num_seeds > 1 else ""
        return f"{100 * summary[name]['mean']:.2f}%{spread}"

    names = ("seconds", "compile_seconds", "images_per_second")
    seconds, compile_seconds, rate = (summary[name]["mean"] for name in names)
    return (
        f"| {title} | {commit} | {num_seeds} | {percent('accuracy')} | {percent(f'accuracy_tta_{TTA}')} "
        f"| {seconds:.0f} s + {compile_seconds:.0f} s | {rate:,.0f} |"
    )


def parse_options() -> argparse.Namespace:
    parser = create_parser("accuracy", __doc__, "se_fast")
    parser.add_argument(
        "--seeds", type=int, default=5, help="number of seeds, from the recipe's (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="concurrent runs of seeds (default: %(default)s)")
    parser.add_argument("--no-curve", action="store_true", help="skip the run that measures the time to an accuracy")
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("ignite").setLevel(logging.ERROR)
    with exit_on_error("accuracy"):
        check_counts(seeds=options.seeds, jobs=options.jobs)
        recipe = load_config(options.config, options.overrides)
        out = create_out(options.out, "accuracy")
        result = measure(recipe, options.seeds, not options.no_curve, out, options.jobs)
    print(f"\n{format_result(result, curve_val_size(recipe))}\n\nwritten: {out.with_name(f'{out.name}.json')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

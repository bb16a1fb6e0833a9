"""Test accuracy of a recipe over several seeds, and the time that it takes.

    python -m benchmarks.accuracy --config configs/se_fast.json --seeds 5

Each seed trains on all 50,000 images, nothing is selected, and the last weights (averaged, if the recipe averages) are
scored on the test set once, plain and with test-time augmentation. How long it takes to reach an accuracy is seen in
one more run, with the recipe's validation images held out. Time counts from the first iteration: evaluation, saving and
start-up are excluded, compiling is given apart. Runs are kept in the output folder; FILE.json is rewritten after each.
"""

import argparse
import json
import logging
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from cifar_ignite.config import Config, InputError, RunFailedError, load_config
from cifar_ignite.engines import select_device, select_precision
from cifar_ignite.evaluate import evaluate
from cifar_ignite.train import train

TTA = "flip"
MILESTONES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96)


def score_seed(config: Config) -> dict[str, float]:
    """Train one seed and score it: test accuracies in [0, 1], training seconds, images a second."""
    history, compiling = train_once(config)
    folder = evaluate(model_name=config.experiment, overrides=[f"output_dir={config.output_dir}"], tta=TTA)
    metrics = json.loads((folder / "metrics.json").read_text())
    return {
        "seed": config.seed,
        "accuracy": metrics["accuracy"],
        f"accuracy_tta_{TTA}": metrics["tta"]["accuracy"],
        "loss": metrics["loss"],
        "seconds": history["seconds"].sum(),
        "compile_seconds": compiling,
        "images_per_second": history["images_per_second"].median(),
    }


def train_once(config: Config) -> tuple[pd.DataFrame, float]:
    """metrics.csv of a new run, and the seconds that compiling took."""
    logs = train(config) / "logs"
    found = re.search(r"compiled in (\d+) s", (logs / "training.log").read_text())
    return pd.read_csv(logs / "metrics.csv"), float(found[1]) if found else 0.0


def time_to_accuracy(history: pd.DataFrame) -> list[dict[str, float]]:
    """For each milestone that validation accuracy reached: the first epoch at it, and the training seconds so far."""
    seconds = history["seconds"].cumsum()
    rows = []
    for milestone in MILESTONES:
        reached = history.index[history["val_acc"] >= milestone]
        if len(reached):
            first = reached[0]
            rows.append({"val_acc": milestone, "epoch": int(history["epoch"][first]), "seconds": seconds[first]})
    return rows


def summarize(seeds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (of the sample; 0 for one seed) of each figure over the seeds."""
    table = pd.DataFrame(seeds).drop(columns="seed")
    return {
        name: {"mean": column.mean(), "sd": statistics.stdev(column) if len(column) > 1 else 0.0}
        for name, column in table.items()
    }


def results_row(title: str, commit: str, summary: dict[str, dict[str, float]], count: int) -> str:
    """A row for benchmarks/RESULTS.md."""

    def percent(name: str) -> str:
        spread = f" ± {100 * summary[name]['sd']:.2f}" if count > 1 else ""
        return f"{100 * summary[name]['mean']:.2f}%{spread}"

    seconds, compiling, rate = (summary[name]["mean"] for name in ("seconds", "compile_seconds", "images_per_second"))
    return (
        f"| {title} | {commit} | {count} | {percent('accuracy')} | {percent(f'accuracy_tta_{TTA}')} "
        f"| {seconds:.0f} s + {compiling:.0f} s | {rate:,.0f} |"
    )


def current_commit() -> str:
    """Short hash of the checkout, with a + if files differ from it; "unknown" outside of one, or without git."""
    words = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        described = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True)
    except OSError:
        return "unknown"
    return described.stdout.decode().strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.accuracy", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--config", type=Path, default=Path("configs/se_fast.json"), help="recipe (default: %(default)s)"
    )
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    parser.add_argument(
        "--seeds", type=int, default=5, help="how many, from the recipe's seed on (default: %(default)s)"
    )
    parser.add_argument(
        "--no-curve", action="store_true", help="leave out the run that shows the time to each accuracy"
    )
    parser.add_argument("--out", type=Path, help="names FILE.json (default: in a temporary folder)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("ignite").setLevel(logging.ERROR)
    try:
        if options.seeds < 1:
            raise InputError(f"--seeds {options.seeds}: at least one")
        recipe = load_config(options.config, options.overrides)
        out = options.out or Path(tempfile.mkdtemp()) / "accuracy"
        measure(recipe, options.seeds, not options.no_curve, out.with_name(f"{out.name}.json"))
    except (InputError, RunFailedError) as error:
        parser.exit(getattr(error, "status", 2), f"accuracy: {error}\n")
    return 0


def measure(recipe: Config, count: int, with_curve: bool, path: Path) -> None:
    """Run the seeds, then the run with validation; print the tables and write the file after each."""
    device = select_device(recipe.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    precision = str(select_precision(recipe.precision, device)).removeprefix("torch.")
    title = f"{recipe.experiment}, {recipe.train.epochs} epochs, {precision}, {where}"
    path.parent.mkdir(parents=True, exist_ok=True)
    seeds: list[dict[str, float]] = []
    result: dict[str, Any] = {
        "title": title,
        "commit": current_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "config": recipe.model_dump(mode="json"),
        "seeds": seeds,
    }
    for seed in range(recipe.seed, recipe.seed + count):
        seeds.append(score_seed(vary(recipe, seed, validation=0)))
        result["summary"] = summarize(seeds)
        path.write_text(json.dumps(result, indent=2) + "\n")
    if with_curve:
        history, _ = train_once(vary(recipe, recipe.seed, validation=recipe.data.validation or 5000))
        result["time_to_accuracy"] = time_to_accuracy(history)
        path.write_text(json.dumps(result, indent=2) + "\n")

    print(f"\n{title}, all training images, last weights, the test set scored once a seed")
    print(pd.DataFrame(seeds).to_string(index=False, float_format="{:.4f}".format))
    if with_curve:
        print(
            f"\nfirst reached on {recipe.data.validation or 5000} images held out of another run, evaluation excluded"
        )
        print(pd.DataFrame(result["time_to_accuracy"]).to_string(index=False, float_format="{:.2f}".format))
    print("\n| recipe | commit | seeds | test | with flip | training + compiling | images/s |\n" + 7 * "|---" + "|")
    print(results_row(title, result["commit"], result["summary"], count))
    print(f"\nwritten: {path}")


def vary(recipe: Config, seed: int, validation: int) -> Config:
    """The recipe with another seed and hold-out, as an experiment of its own."""
    name = f"{recipe.experiment}_seed{seed}" + ("_curve" if validation else "")
    data = recipe.data.model_copy(update={"validation": validation})
    return recipe.model_copy(update={"seed": seed, "experiment": name, "data": data})


if __name__ == "__main__":
    sys.exit(main())

"""Effect of single settings: the recipe as it is and with each change, over several seeds, on validation images.

    python -m benchmarks.ablations --config se_fast --seeds 2 --set train.epochs=5 --set model.width=16 \
        --change optimizer.nesterov=false --change train.ema_decay=null --change "optimizer.lr=0.3 data.batch_size=256"

The test set is never read. The figure is the validation accuracy after the last epoch, and 0 if training diverged.
Seeds are the outer loop, so that an interrupted benchmark has compared all changes on fewer seeds. FILE.json is
rewritten after each run. `--jobs` runs several at once: one per core of a CPU, or about ten on a GPU with as many
cores.
"""

import argparse
import statistics
import sys
from pathlib import Path

import pandas as pd

from benchmarks.concurrent_runs import map_runs
from benchmarks.options import check_counts, create_out, create_parser, exit_on_error, write_json
from cifar_ignite.config import Config
from cifar_ignite.config_io import load_config
from cifar_ignite.errors import InputError, NonFiniteError
from cifar_ignite.train import train
from cifar_ignite.training.device import select_device
from cifar_ignite.training.environment import describe_environment

UNCHANGED = "none"
DIVERGED_ACCURACY = 0.0


def last_val_acc(config: Config) -> float:
    """Train, and return the last epoch's validation accuracy in [0, 1]; 0 if training diverges."""
    try:
        result = train(config)
    except NonFiniteError as error:
        print(f"diverged, which counts as an accuracy of 0: {error}")
        return DIVERGED_ACCURACY
    return float(result.history["val_acc"].iloc[-1])


def load_configs(options: argparse.Namespace) -> dict[tuple[int, str], Config]:
    """Return the configuration of each run, by seed and change, in the order of execution.

    Raises:
        InputError: If one is invalid, or has no validation images.
    """
    changes = {UNCHANGED: [], **{change: change.split() for change in options.change}}
    configs = {
        (seed, change): load_config(
            options.config, [*options.overrides, f"seed={seed}", "experiment=ablation", *overrides]
        )
        for seed in range(options.seeds)
        for change, overrides in changes.items()
    }
    if any(config.data.val_size == 0 for config in configs.values()):
        raise InputError("data.val_size: 0 leaves no validation images, which are what ablations measure; use null")
    return configs


def measure(options: argparse.Namespace, out: Path) -> dict[str, list[float]]:
    """Make all runs, write {out}.json after each, and return the validation accuracies by change.

    Raises:
        InputError: If the configuration or the dataset is invalid.
        TrainingError: If a run fails for another reason than divergence.
    """
    configs = load_configs(options)
    accuracies: dict[str, list[float]] = {change: [] for _, change in configs}
    unchanged = next(iter(configs.values()))
    result = {
        "environment": describe_environment(select_device(unchanged.device), unchanged.precision),
        "jobs": options.jobs,
        "config": unchanged.model_dump(mode="json"),
        "overrides": options.overrides,
        "validation_accuracy": accuracies,
    }
    results = map_runs(last_val_acc, list(configs.values()), options.jobs)
    for (seed, change), accuracy in zip(configs, results, strict=True):
        accuracies[change].append(accuracy)
        print(f"seed {seed}: {100 * accuracy:.2f}%  {change}", flush=True)
        write_json(out, result)
    return accuracies


def change_table(accuracies: dict[str, list[float]]) -> pd.DataFrame:
    """Return mean, sample standard deviation and mean difference to the first row, seed by seed, in percent."""
    unchanged = next(iter(accuracies.values()))
    rows = []
    for change, values in accuracies.items():
        if not values:
            continue
        differences = [100 * (value - base) for value, base in zip(values, unchanged, strict=False)]
        spread = statistics.stdev(100 * value for value in values) if len(values) > 1 else float("nan")
        rows.append((change, len(values), 100 * statistics.mean(values), spread, statistics.mean(differences)))
    return pd.DataFrame(rows, columns=["change", "seeds", "validation %", "sd", "difference"])


def parse_options() -> argparse.Namespace:
    parser = create_parser("ablations", __doc__, "se_fast")
    parser.add_argument(
        "--change", action="append", default=[], metavar="'KEY=VALUE ...'", help="overrides of one row; may be repeated"
    )
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds, from 0 (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="concurrent runs (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    with exit_on_error("ablations"):
        check_counts(seeds=options.seeds, jobs=options.jobs)
        out = create_out(options.out, "ablations")
        accuracies = measure(options, out)
    print(change_table(accuracies).to_string(index=False, float_format="{:.2f}".format))
    print(f"\nwritten: {out.with_name(f'{out.name}.json')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

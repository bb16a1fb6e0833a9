"""What single settings bring: the recipe as it is, and with each change, over several seeds, on the validation images.

    python -m benchmarks.ablations --config configs/se_fast.json --seeds 2 --set train.epochs=5 --set model.width=16 \
        --vary optimizer.nesterov=false --vary "train.ema_decay=null" --vary "optimizer.lr=0.3 data.batch_size=256"

The test set is never read. A figure is the validation accuracy after the last epoch. Seeds are the outer loop, so that
a run that is cut short has compared all changes on fewer seeds. FILE.json is rewritten after each run. On a CPU, as
many runs side by side as there are cores (`--jobs`) get more done than one run on all cores.
"""

import argparse
import json
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pandas as pd
import torch

from benchmarks.accuracy import current_commit
from cifar_ignite.config import Config, InputError, RunFailedError, load_config
from cifar_ignite.handlers import NonFiniteError
from cifar_ignite.train import train


def last_validation_accuracy(config: Config) -> float:
    """Train, and return the last epoch's validation accuracy in [0, 1]; 0.1, a guess, if training diverges."""
    try:
        run_dir = train(config)
    except NonFiniteError as error:
        print(f"diverged: {error}")
        return 0.1
    return float(pd.read_csv(run_dir / "logs" / "metrics.csv")["val_acc"].iloc[-1])


def measure(configs: Sequence[Config], jobs: int) -> Iterator[float]:
    """The last validation accuracy of each, in order, of `jobs` runs side by side that share the cores."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    spawn = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU
    with ProcessPoolExecutor(jobs, spawn, initializer=prepare, initargs=(threads,)) as pool:
        try:
            yield from pool.map(last_validation_accuracy, configs)
        finally:
            pool.shutdown(cancel_futures=True)


def prepare(threads: int) -> None:
    """Set up a process that trains."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(threads)


def table(accuracies: dict[str, list[float]]) -> pd.DataFrame:
    """Mean and standard deviation (of the sample) in percent, and the mean difference to the first row, by seed."""
    first = next(iter(accuracies.values()))
    rows = []
    for change, values in accuracies.items():
        if not values:
            continue
        differences = [100 * (value - base) for value, base in zip(values, first, strict=False)]
        spread = statistics.stdev(100 * value for value in values) if len(values) > 1 else float("nan")
        rows.append((change, len(values), 100 * statistics.mean(values), spread, statistics.mean(differences)))
    return pd.DataFrame(rows, columns=["change", "seeds", "validation %", "sd", "difference"])


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.ablations", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/se_fast.json"), help="(default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--vary", action="append", default=[], metavar="'KEY=VALUE ...'", help="one row each")
    parser.add_argument("--seeds", type=int, default=2, help="how many, from 0 on (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="names FILE.json (default: in a temporary folder)")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp()) / "ablations"
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f"{out.name}.json")
    accuracies: dict[str, list[float]] = {"the recipe": []} | {change: [] for change in options.vary}
    try:
        configs = {
            (seed, change): load_config(
                options.config,
                [*options.overrides, f"seed={seed}", "experiment=ablation"]
                + (change.split() if change in options.vary else []),
            )
            for seed in range(options.seeds)
            for change in accuracies
        }
        for (seed, change), accuracy in zip(configs, measure(list(configs.values()), options.jobs), strict=True):
            accuracies[change].append(accuracy)
            print(f"seed {seed}: {100 * accuracies[change][-1]:.2f}%  {change}", flush=True)
            result = {"commit": current_commit(), "overrides": options.overrides, "validation_accuracy": accuracies}
            path.write_text(json.dumps(result, indent=2) + "\n")
    except (InputError, RunFailedError) as error:
        parser.exit(getattr(error, "status", 2), f"ablations: {error}\n")
    print(table(accuracies).to_string(index=False, float_format="{:.2f}".format))
    print(f"\nwritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

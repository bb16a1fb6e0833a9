"""One table of the results of several benchmarks.

    python -m benchmarks.summary DIRECTORY

Reads the files accuracy_*.json and throughput_*.json that `benchmarks/gpu.sh` has written to the directory, complete or
not, and prints a row for each figure.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.options import exit_on_error, first_line
from cifar_ignite.errors import InputError


def accuracy_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (figure, value) of a result of `benchmarks.accuracy`."""
    summary, seeds = result["summary"], len(result["seeds"])
    for name, label in (("accuracy", "test accuracy"), ("accuracy_tta_flip", "test accuracy with flip")):
        yield label, f"{summary[name]['mean']:.2%} ± {summary[name]['sd']:.2%}, seeds: {seeds}"
    yield "training", f"{summary['seconds']['mean']:.1f} s, {summary['images_per_second']['mean']:,.0f} images/s"
    for row in result.get("time_to_accuracy", [])[-1:]:
        yield f"time to {row['val_acc']:.0%}", f"{row['seconds']:.1f} s, epoch {row['epoch']}"


def throughput_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (figure, value) of a result of `benchmarks.throughput`."""
    for row in [*result["images_per_second"], *result["batch_sizes"]]:
        yield row["workload"], f"{row['images/s']:,.0f} images/s"
    for name, ratio in result["ratios"].items():
        yield name, f"{ratio:.2f}"
    for device, count in result["peak_memory_bytes"].items():
        yield f"peak memory, {device}", f"{count / 1e6:,.0f} MB"


def summarize(directory: Path) -> pd.DataFrame:
    """Return a table of all results in a directory.

    Raises:
        InputError: If there is none, or a file is not a result.
    """
    rows = []
    for pattern, create_rows in (("accuracy_*.json", accuracy_rows), ("throughput_*.json", throughput_rows)):
        for path in sorted(directory.glob(pattern)):
            try:
                figures = list(create_rows(json.loads(path.read_text(encoding="utf-8"))))
            except (ValueError, KeyError, TypeError, AttributeError):  # ValueError: not JSON, or not UTF-8
                raise InputError(f"{path}: not the result of a benchmark; delete it, or measure again") from None
            rows += [{"result": path.stem, "figure": name, "value": value} for name, value in figures]
    if not rows:
        raise InputError(f"{directory}: no results of benchmarks")
    return pd.DataFrame(rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary", description=first_line(__doc__))
    parser.add_argument("directory", type=Path, help="directory of JSON files")
    with exit_on_error("summary"):
        table = summarize(parser.parse_args().directory)
    print(table.to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())

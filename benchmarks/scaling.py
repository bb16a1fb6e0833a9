"""Images per second by the number of processes on this machine, and the cost of their communication.

    python -m benchmarks.scaling --processes 1 2 --rounds 3 --seconds 60 --out FILE

Rows are measured alternately, so that a disturbance of the machine affects all of them: a plain process with all cores,
and torchrun with each number of processes, which share the cores or have one GPU each. Images are random. Each row runs
the training iteration of the train command for the given seconds. Then the all-reduce of the gradients, the check for
signals and the augmentation of a global batch are timed separately, and the memory of all processes is summed (PSS
counts a shared page once).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ignite.distributed as idist
import pandas as pd
import torch
import torch.distributed as dist

from benchmarks.measuring import synchronize
from benchmarks.options import create_out, create_parser, exit_on_error, write_json
from benchmarks.workloads import Setup, create_setup, project_workload, random_dataset
from cifar_ignite.config import Config
from cifar_ignite.config_io import load_config
from cifar_ignite.data.registry import check_registered
from cifar_ignite.distributed.collectives import all_reduce_max
from cifar_ignite.distributed.env import dist_env_from_environ
from cifar_ignite.distributed.process_group import DistributedContext, distributed_context
from cifar_ignite.training.device import select_device
from cifar_ignite.training.environment import describe_environment

ITERATIONS = 3
REPEATS = 20


# --- One row, in all of its processes -----------------------------------------------------------------------------


def measure_row(options: argparse.Namespace, config: Config) -> None:
    """Measure one row together with the other ranks; rank 0 writes it to `options.row`."""
    device = select_device(config.device)
    with distributed_context(device, dist_env_from_environ()) as context:
        setup = create_setup(config, random_dataset(options.images, config.data.image_size))
        row = {
            "images/s": measure_rate(setup, options.seconds, context),
            "augmentation ms": time_augmentation(setup),
            **(time_communication(setup, context) if context.env.is_distributed else {}),
            **total_memory(),
        }
        if context.env.is_primary:
            options.row.write_text(json.dumps(row), encoding="utf-8")


def measure_rate(setup: Setup, seconds: float, context: DistributedContext) -> float:
    """Return the images per second of all ranks together."""
    workload = project_workload(setup, ITERATIONS)
    workload()
    count, started, is_due = 0, time.perf_counter(), True
    while is_due:
        count += workload()
        is_due = bool(all_reduce_max(int(time.perf_counter() - started < seconds), context.cpu_group))
    synchronize(setup.device)
    return count / (time.perf_counter() - started)


def time_augmentation(setup: Setup) -> float:
    """Return the milliseconds that the augmentation of one global batch takes."""
    loader = setup.loader
    rows = torch.arange(loader.batch_size, device=setup.device) % len(loader.images)
    images, labels, flip_mask = loader.images[rows], loader.labels[rows], rows % 2 == 0
    return median_ms(lambda: loader.transform(images, labels, 0, flip_mask), setup.device)


def time_communication(setup: Setup, context: DistributedContext) -> dict[str, float]:
    """Return the size of the gradients, and the milliseconds of their all-reduce and of a check for signals."""
    gradients = torch.cat([parameter.detach().flatten() for parameter in setup.model.parameters()])
    return {
        "gradients MB": gradients.numel() * gradients.element_size() / 1e6,
        "gradient all-reduce ms": median_ms(lambda: dist.all_reduce(gradients), setup.device),
        "signal check ms": median_ms(lambda: all_reduce_max(0, context.cpu_group), setup.device),
    }


def median_ms(function: Callable[[], object], device: torch.device) -> float:
    """Return the median milliseconds of a call."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


def total_memory() -> dict[str, float]:
    """Return the memory of all ranks in MB: the sum of RSS, and of PSS, which counts a shared page once. Linux only."""
    path = Path("/proc/self/smaps_rollup")
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()[1:]] if path.exists() else []
    kilobytes = {line[0].rstrip(":"): int(line[1]) for line in lines}
    return {f"{name} MB": float(idist.all_reduce(kilobytes.get(name, 0))) / 1000 for name in ("Rss", "Pss")}


# --- All rows -----------------------------------------------------------------------------------------------------


def measure_all(options: argparse.Namespace) -> pd.DataFrame:
    """Return one row per number of processes: medians over the rounds, lowest and highest images per second."""
    rows: list[dict[str, float | str]] = []
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(options.rounds):
            for count in (None, *options.processes):
                name = f"torchrun, {count}" if count else "plain process"
                rows.append({"launch": name, **launch_row(count, options, Path(directory) / "row.json")})
    groups = pd.DataFrame(rows).groupby("launch", sort=False)
    table = groups.median()
    table.insert(1, "lowest", groups["images/s"].min())
    table.insert(2, "highest", groups["images/s"].max())
    return table


def launch_row(count: int | None, options: argparse.Namespace, path: Path) -> dict[str, float]:
    """Measure one row in new processes: `count` under torchrun, or a plain one for None.

    Raises:
        CalledProcessError: If the processes fail.
    """
    environ = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // (count or 1)))}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count else []
    arguments = ["--config", options.config, "--images", options.images, "--seconds", options.seconds, "--row", path]
    arguments += [word for override in options.overrides for word in ("--set", override)]
    words = [sys.executable, *torchrun, "-m", "benchmarks.scaling", *arguments]
    subprocess.run([str(word) for word in words], env=environ, check=True)
    row: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return row


def parse_options() -> argparse.Namespace:
    parser = create_parser("scaling", __doc__, "se")
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes (default: %(default)s)"
    )
    parser.add_argument("--images", type=int, default=50_000, help="training images (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30, help="seconds per row and round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each row (default: %(default)s)")
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)  # set in the processes of one row
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    with exit_on_error("scaling"):
        config = load_config(options.config, ["data.val_size=0", "compile=off", *options.overrides])
        check_registered(config.data)  # although the images are random
        if options.row:
            measure_row(options, config)
            return 0
        table = measure_all(options)
    print(table.to_string(float_format="{:.1f}".format, na_rep="-"))
    result = {
        "environment": describe_environment(select_device(config.device), config.precision),
        "config": config.model_dump(mode="json"),
        "rows": json.loads(table.to_json(orient="index")),
    }
    path = write_json(create_out(options.out, "scaling"), result)
    print(f"\nwritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Images per second of training, compared with the bare step (the upper bound) and with the loop of common tutorials.

    python -m benchmarks.throughput                       # the default recipe of se_resnet, on random images
    python -m benchmarks.throughput --set data.batch_size=512 --seconds 60 --out throughput

The rows of a table are measured alternately in one process, so that a disturbance of the machine affects all of them; a
figure is the median over the rounds, with the lowest and the highest. FILE.json is rewritten after each round and each
further measurement; FILE.png is written at the end.
"""

import argparse
import contextlib
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.baseline import baseline_pipeline_workload, baseline_workload, kornia_workload
from benchmarks.measuring import Workload, measure_rates, peak_memory, profile, rate_table, synchronize
from benchmarks.options import create_out, create_parser, exit_on_error, first_line, write_json
from benchmarks.workloads import (
    Setup,
    bare_step_workload,
    create_setup,
    engine_workload,
    evaluation_workload,
    pipeline_workload,
    project_workload,
    random_dataset,
)
from cifar_ignite.config import Config
from cifar_ignite.config_io import load_config
from cifar_ignite.data.loaders import create_loaders
from cifar_ignite.data.registry import check_registered
from cifar_ignite.errors import InputError
from cifar_ignite.figures import create_figure, default_style
from cifar_ignite.training.device import precision_name, select_device
from cifar_ignite.training.environment import describe_environment, device_name

PROJECT = "(a) this project"
BARE_STEP = "(b) bare step (upper bound)"
TUTORIAL = "(c) tutorial loop"
TUTORIAL_PIPELINE = "(c) tutorial pipeline, one core"
PIPELINE = "(e) input pipeline"
ENGINE = "(f) bare step in an Engine"
# Name of each ratio: numerator and denominator.
RATIOS = {
    "(a) / (b)": (PROJECT, BARE_STEP),
    "(a) / (c)": (PROJECT, TUTORIAL),
    "(e) / (c) pipeline, one core": (PIPELINE, TUTORIAL_PIPELINE),
    "(f) / (b)": (ENGINE, BARE_STEP),
}
# Measured after the first epoch, which is slower.
PIPELINE_EPOCHS = 3


@dataclass
class Results:
    """The results of a run of the benchmark, filled in one after the other.

    Attributes:
        title: Model, batch size, precision and device.
        memory: Peak memory in bytes, by device.
        rates: Table of the comparison, see `rate_table`.
        batch_rates: Table of this project's iteration by batch size.
        epoch_seconds: Seconds per epoch of the input pipeline, by size of the dataset.
        profile: Table of operators; None if not requested, or if the profiler failed.
    """

    title: str
    memory: dict[str, int]
    rates: pd.DataFrame = field(default_factory=lambda: rate_table({}))
    batch_rates: pd.DataFrame = field(default_factory=lambda: rate_table({}))
    epoch_seconds: dict[str, float] = field(default_factory=dict)
    profile: str | None = None

    @property
    def ratios(self) -> dict[str, float]:
        """Ratios of the images per second of two rows."""
        rates = self.rates.set_index("workload")["images/s"]
        pairs = {name: pair for name, pair in RATIOS.items() if set(pair) <= set(rates.index)}
        return {name: rates[numerator] / rates[denominator] for name, (numerator, denominator) in pairs.items()}


# --- Measuring ----------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, out: Path) -> Results:
    """Make all measurements; write {out}.json after each one, and after each round of the comparison.

    Raises:
        InputError: If the configuration is invalid, or there are fewer images than in one batch.
        TrainingError: If compilation was requested and fails.
    """
    config = load_config(options.config, [*options.overrides, "data.val_size=0"])
    check_registered(config.data)  # although the images are random
    device = select_device(config.device)
    if (largest := max([config.data.batch_size, *options.batch_sizes])) > options.images:
        raise InputError(f"--images {options.images}: fewer than one batch of {largest}; use at least {largest}")
    memory_before = peak_memory()
    setup = create_setup(config, random_dataset(options.images, config.data.image_size))
    project_workload(setup, 3)()
    results = Results(create_title(setup), {"cpu": peak_memory() - memory_before} if memory_before else {})
    if device.type == "cuda":
        results.memory["cuda"] = torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        results.memory["mps"] = torch.mps.driver_allocated_memory()  # with the cache, so close to the peak

    def save(**new: Any) -> None:
        for name, value in new.items():
            setattr(results, name, value)
        write_json(out, results_dict(config, results))

    def save_rates(rates: dict[str, list[float]]) -> None:
        save(rates=rate_table(rates))

    measure_rates(create_workloads(setup, options.iterations), device, options.seconds, save_rates)
    save(batch_rates=rate_table(measure_batch_sizes(setup, options.batch_sizes, options.seconds / 4)))
    sizes = [size for size in options.dataset_sizes if size <= options.images]
    save(epoch_seconds=measure_pipeline_epochs(config, sizes))
    if options.profile:
        save(profile=try_profile(setup))
    return results


def try_profile(setup: Setup) -> str | None:
    """Return a table of the operators of this project's iteration, or None with a warning if the profiler fails."""
    try:
        return profile(project_workload(setup, 4), setup.device)
    except Exception as error:  # whatever the profiler of the platform raises
        print(f"throughput: the profiler failed ({first_line(str(error))})", file=sys.stderr)
        return None


def create_workloads(setup: Setup, iterations: int) -> dict[str, Workload]:
    """Return the workloads of the comparison; the input pipeline, which is fast, makes ten times the iterations."""
    workloads = {
        PROJECT: project_workload(setup, iterations),
        BARE_STEP: bare_step_workload(setup, iterations),
        TUTORIAL: baseline_workload(setup, iterations),
        TUTORIAL_PIPELINE: baseline_pipeline_workload(setup, iterations),
        PIPELINE: pipeline_workload(setup, 10 * iterations),
        ENGINE: engine_workload(setup, iterations),
        "evaluation": evaluation_workload(setup, iterations),
    }
    if setup.is_compiled:
        eager = create_setup(setup.config.model_copy(update={"compile": "off"}), setup.dataset)
        workloads["(b) not compiled"] = bare_step_workload(eager, iterations)
    with contextlib.suppress(ImportError):
        workloads["(d) Kornia augmentation"] = kornia_workload(setup, iterations)
    return workloads


def measure_batch_sizes(setup: Setup, sizes: list[int], seconds: float) -> dict[str, list[float]]:
    """Return the rates of this project's eager iteration by batch size, over about equally many images."""
    if not sizes:
        return {}
    workloads = {}
    for size in sizes:
        data = setup.config.data.model_copy(update={"batch_size": size})
        # Every size would be compiled separately.
        config = setup.config.model_copy(update={"data": data, "compile": "off"})
        workloads[f"batch {size}"] = project_workload(create_setup(config, setup.dataset), max(1, max(sizes) // size))
    return measure_rates(workloads, setup.device, seconds)


def measure_pipeline_epochs(config: Config, sizes: list[int]) -> dict[str, float]:
    """Return the median seconds of the input pipeline for one epoch, by size of the dataset; proportional to it."""
    device = select_device(config.device)
    no_images = random_dataset(0, config.data.image_size)
    loaders = {
        f"{size} images": create_loaders(config, random_dataset(size, config.data.image_size), no_images, device)[0]
        for size in sizes
    }
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(1 + PIPELINE_EPOCHS):
        for name, loader in loaders.items():
            loader.iteration = 0
            synchronize(device)
            started = time.perf_counter()
            for _ in loader:
                pass
            synchronize(device)
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


# --- Reporting ----------------------------------------------------------------------------------------------------


def create_title(setup: Setup) -> str:
    """Return one line with model, batch size, precision and device."""
    config, compiled = setup.config, "compiled" if setup.is_compiled else "eager"
    precision = precision_name(config.precision, setup.device)
    return f"{config.model.name}, batch {config.data.batch_size}, {precision}, {compiled}, {device_name(setup.device)}"


def format_results(results: Results) -> str:
    """Return the results as text."""
    lines = [f"{results.title}, torch {torch.__version__}"]
    lines += [f"{name}: {count / 1e6:.0f} MB above imports" for name, count in results.memory.items()]
    for table in (results.rates, results.batch_rates):
        if len(table):
            lines += ["", table.to_string(index=False, float_format="{:,.0f}".format)]
    lines += ["", *(f"{name:35} {value:6.2f}" for name, value in results.ratios.items())]
    if results.profile:
        lines += ["", results.profile]
    seconds = ", ".join(f"{name} {value:.3f}" for name, value in results.epoch_seconds.items())
    return "\n".join([*lines, "", f"input pipeline, seconds per epoch: {seconds}"])


def results_dict(config: Config, results: Results) -> dict[str, Any]:
    """Return the content of FILE.json."""
    return {
        "title": results.title,
        "environment": describe_environment(select_device(config.device), config.precision),
        "config": config.model_dump(mode="json"),
        "peak_memory_bytes": results.memory,
        "images_per_second": results.rates.to_dict("records"),
        "ratios": results.ratios,
        "batch_sizes": results.batch_rates.to_dict("records"),
        "pipeline_epoch_seconds": results.epoch_seconds,
        "profile": results.profile,
    }


@default_style()
def plot_rates(rates: pd.DataFrame, path: Path, title: str) -> None:
    """Plot one bar per row of the comparison, with the lowest and the highest rate."""
    figure = create_figure((8, 0.5 * len(rates) + 1.5))
    axes = figure.subplots()
    spread = [rates["images/s"] - rates["lowest"], rates["highest"] - rates["images/s"]]
    bars = axes.barh(rates["workload"], rates["images/s"], xerr=spread, color="tab:blue")
    axes.bar_label(bars, [f" {value:,.0f}" for value in rates["images/s"]], padding=3)
    axes.set(xscale="log", xlabel="images per second (logarithmic)", title=title)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0.15)
    axes.invert_yaxis()
    figure.savefig(path)


def parse_options() -> argparse.Namespace:
    parser = create_parser("throughput", __doc__, "se")
    parser.add_argument("--images", type=int, default=50_000, help="images in the dataset (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=4, help="iterations per round (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=120.0, help="seconds of the comparison (default: %(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--dataset-sizes", type=int, nargs="*", default=[5_000, 10_000, 25_000, 50_000])
    parser.add_argument("--profile", action="store_true", help="also print the slowest operators of (a)")
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    out = create_out(options.out, "throughput")
    with exit_on_error("throughput"):
        results = measure(options, out)
    print(format_results(results))
    json_path, png_path = out.with_name(f"{out.name}.json"), out.with_name(f"{out.name}.png")
    plot_rates(results.rates, png_path, results.title)
    print(f"\nwritten: {json_path}, {png_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

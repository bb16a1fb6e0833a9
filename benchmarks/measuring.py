"""Interleaved measurement: workloads alternate in one process, so that a disturbance of the machine affects all."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import pandas as pd
import torch
from torch.profiler import ProfilerActivity

with suppress(ModuleNotFoundError):  # Windows
    import resource

Workload = Callable[[], int]
"""Does some work and returns the number of images that it processed."""

MIN_ROUNDS = 3


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measure_rates(
    workloads: Mapping[str, Workload],
    device: torch.device,
    seconds: float,
    on_round: Callable[[dict[str, list[float]]], None] = lambda rates: None,
) -> dict[str, list[float]]:
    """Run the workloads alternately, after one round to warm up.

    Args:
        workloads: Workloads by name.
        device: Device that they run on.
        seconds: Duration of the measurement; at least `MIN_ROUNDS` rounds are made.
        on_round: Called with the rates so far after each round.

    Returns:
        Images per second of each workload, one value per round.
    """
    for workload in workloads.values():
        workload()
    rates: dict[str, list[float]] = {name: [] for name in workloads}
    deadline, rounds = time.monotonic() + seconds, 0
    while time.monotonic() < deadline or rounds < MIN_ROUNDS:
        for name, workload in workloads.items():
            synchronize(device)
            started = time.perf_counter()
            count = workload()
            synchronize(device)
            rates[name].append(count / (time.perf_counter() - started))
        on_round(rates)
        rounds += 1
    return rates


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes; 0 on Windows, where Python does not know it."""
    if "resource" not in sys.modules:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def rate_table(rates: Mapping[str, list[float]]) -> pd.DataFrame:
    """Return one row per workload: median, lowest and highest images per second."""
    rows = [
        {"workload": name, "images/s": statistics.median(values), "lowest": min(values), "highest": max(values)}
        for name, values in rates.items()
    ]
    return pd.DataFrame(rows, columns=["workload", "images/s", "lowest", "highest"])


def profile(workload: Workload, device: torch.device) -> str:
    """Return a table of the operators with the largest time of their own, after one run to warm up."""
    workload()
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        workload()
        synchronize(device)
    column = "self_cuda_time_total" if is_cuda else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=column, row_limit=25, max_name_column_width=60)

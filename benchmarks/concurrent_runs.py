"""Trainings at once, in a process each.

On a CPU, one run per core is faster than one run on all cores. On a GPU, a model this small leaves most of it idle.
"""

import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

from cifar_ignite.config import Config

Result = TypeVar("Result")


def map_runs(run: Callable[[Config], Result], configs: Sequence[Config], jobs: int) -> Iterator[Result]:
    """Yield `run` of each configuration, in order; `jobs` concurrent runs share the cores.

    Args:
        run: Function of a module, which the processes import.
        configs: Configurations.
        jobs: Number of processes.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    spawn = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU
    with ProcessPoolExecutor(jobs, spawn, initializer=_initialize_worker, initargs=(threads,)) as pool:
        try:
            yield from pool.map(run, configs)
        finally:
            pool.shutdown(cancel_futures=True)


def _initialize_worker(threads: int) -> None:
    """Print only the warnings of a training process, whose training.log has all lines, and set its threads."""
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.WARNING)
    logging.basicConfig(format="%(message)s", handlers=[console])
    torch.set_num_threads(threads)

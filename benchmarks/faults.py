"""Kill training at random moments, resume it until it is done, and compare it bit for bit with an uninterrupted run.

    python -m benchmarks.faults --runs 200

Each run trains a tiny model on synthetic data in a process of its own, which receives SIGKILL, SIGTERM or SIGINT up to
five times: at a random moment, or while a checkpoint is being written. Then it is resumed to its end; its weights, EMA,
momentum buffers, counters, metrics and best model must equal those of the uninterrupted run. --config and --set test
any other training. With --processes 2, each run has two ranks, one of which receives the signal; both must exit.
Requires Linux or macOS: processes are forked.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.forked_jobs import start_job, wait
from benchmarks.options import add_overrides, first_line
from benchmarks.run_diff import diff_runs

TINY = {
    "experiment": "faults",
    "data.dataset": "synthetic",
    "data.synthetic.train_size": 250,
    "data.val_size": 50,
    "data.batch_size": 16,
    "model.name": "hybrid_resnet",
    "model.width": 2,
    "train.epochs": 3,
    "train.ema_decay": 0.9,
    "train.patience": 4,
    "train.checkpoint_every": 2,
    "train.save_every_seconds": 0.2,
}
# Exit statuses of the process that received a signal: finished, killed by it before training began, or stopped by it.
EXIT_STATUSES = {signal.SIGKILL: {0, -9}, signal.SIGTERM: {0, -15, 143}, signal.SIGINT: {0, 130}}
# Exit statuses of the other ranks: finished, stopped by the same signal, failed because a rank is gone, or terminated
# by this program while they waited for a rank that never joined.
PEER_STATUSES = {0, 1, 130, 143, -15}
PEER_TIMEOUT = 10
RUN_TIMEOUT = 3600


@dataclass(frozen=True)
class Training:
    """A train command that can be started again and again.

    Attributes:
        arguments: Command and options, without the output directory.
        world_size: Number of processes per run.
        threads: Threads of torch per process.
    """

    arguments: tuple[str, ...]
    world_size: int
    threads: int

    def start(self, output_dir: Path) -> list[int]:
        """Start a run, or resume the one in `output_dir`; return the process ids."""
        arguments = [*self.arguments, "--set", f"output_dir={output_dir}"]
        if any(output_dir.glob("training_runs/*/config.json")):
            arguments += ["--resume", "latest"]
        return start_job(arguments, self.log(output_dir), self.world_size, self.threads)

    def finish(self, output_dir: Path) -> Path:
        """Start or resume a run, wait for its end, and return the run directory.

        Raises:
            RuntimeError: If the run fails; the message ends with its log.
        """
        statuses = [wait(pid, RUN_TIMEOUT) for pid in self.start(output_dir)]
        if any(status != 0 for status in statuses):
            raise RuntimeError(
                f"training ended with status {statuses}\n{self.log(output_dir).read_text(encoding='utf-8')}"
            )
        (config,) = output_dir.glob("training_runs/*/config.json")
        return config.parent

    @staticmethod
    def log(output_dir: Path) -> Path:
        """Return the file with the output of all processes of a run."""
        return output_dir.with_suffix(".log")


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run.

    Attributes:
        run_dir: Run directory.
        seconds: Duration; the latest moment of a signal.
    """

    run_dir: Path
    seconds: float


# --- Interruptions ------------------------------------------------------------------------------------------------


def train_with_interruptions(
    training: Training, output_dir: Path, rng: random.Random, max_delay: float
) -> tuple[list[str], Path]:
    """Train to the end with two to five interruptions, if their signals come in time.

    Args:
        training: Train command.
        output_dir: Directory of the run's outputs.
        rng: Generator of the moments, signals and ranks.
        max_delay: Largest delay of a signal in seconds.

    Returns:
        Description of each signal with the exit status of its receiver, and the run directory.

    Raises:
        RuntimeError: If a process ended with an unexpected status, or not at all.
    """
    events: list[str] = []
    for _ in range(rng.randint(1, 4) + 1):
        event, status = interrupt(training.start(output_dir), output_dir, rng, max_delay)
        if event:
            events.append(f"{event} ({status})")
        elif status:
            raise RuntimeError(
                f"training ended with status {status}\n{training.log(output_dir).read_text(encoding='utf-8')}"
            )
    return events, training.finish(output_dir)


def interrupt(pids: list[int], output_dir: Path, rng: random.Random, max_delay: float) -> tuple[str, int]:
    """Send a random signal to one rank after a random delay, in half of the cases while a checkpoint is written.

    Args:
        pids: Process ids by rank.
        output_dir: Directory of the run's outputs.
        rng: Generator of the rank, the moment and the signal.
        max_delay: Largest delay in seconds.

    Returns:
        Description of the signal, empty if the rank finished before; and the exit status of the rank.

    Raises:
        RuntimeError: If a process ended with an unexpected status, or not at all.
    """
    receiver = rng.choice(pids)
    status = wait(receiver, rng.uniform(0, max_delay))
    is_save_awaited, deadline = rng.random() < 0.5, time.monotonic() + max_delay
    while status is None and is_save_awaited and not is_saving(pids, output_dir) and time.monotonic() < deadline:
        status = wait(receiver, 0)
    event, peer_statuses = "", {0}
    if status is None:
        signum = rng.choice(list(EXIT_STATUSES))
        event = f"{signal.Signals(signum).name}{' during a save' if is_saving(pids, output_dir) else ''}"
        peer_statuses = PEER_STATUSES
        os.kill(receiver, signum)
        status = wait(receiver, 600)
        if status is None or status not in EXIT_STATUSES[signum]:
            raise RuntimeError(f"{event}: the process ended with status {status}")
    peers = {wait_or_terminate(pid) for pid in pids if pid != receiver}
    if not peers <= peer_statuses:
        raise RuntimeError(f"{event or 'finished'}: the other processes ended with {peers}")
    return event, status


def is_saving(pids: list[int], output_dir: Path) -> bool:
    """Return whether one of the processes is writing a checkpoint."""
    return any(any(output_dir.glob(f"training_runs/*/checkpoints/.*.{pid}.tmp")) for pid in pids)


def wait_or_terminate(pid: int) -> int | None:
    """Return the exit status of a process that should exit because a peer has.

    Before the ranks have joined, a missing one is waited for: SIGTERM ends that, as torchrun does.
    """
    status = wait(pid, PEER_TIMEOUT)
    if status is None:
        os.kill(pid, signal.SIGTERM)
        status = wait(pid, PEER_TIMEOUT)
    return status


# --- The benchmark ------------------------------------------------------------------------------------------------


def compare_with_reference(
    training: Training, reference: Reference, output_dir: Path, rng: random.Random
) -> tuple[bool, str]:
    """Train with at least one interruption; return whether the run equals the reference, and a line for the report."""
    events: list[str] = []
    try:
        while not events:  # the run may end before the first signal
            shutil.rmtree(output_dir, ignore_errors=True)
            events, run_dir = train_with_interruptions(training, output_dir, rng, reference.seconds)
        diffs = diff_runs(reference.run_dir, run_dir)
    except RuntimeError as error:
        return False, f"FAILED: {error}"
    if diffs:
        return False, f"DIFFERS in {', '.join(diffs)}  {', '.join(events)}"
    shutil.rmtree(output_dir)
    return True, f"identical  {', '.join(events)}"


def run_all(training: Training, reference: Reference, scratch: Path, options: argparse.Namespace) -> list[bool]:
    """Print a line per run; return for each run that was started whether it is identical to the reference."""
    deadline = time.monotonic() + 60 * options.minutes

    def run(number: int) -> bool | None:
        if time.monotonic() > deadline:
            return None
        rng = random.Random(f"{options.seed}/{number}")
        is_identical, line = compare_with_reference(training, reference, scratch / f"run{number}", rng)
        print(f"run {number:3}: {line}", flush=True)
        return is_identical

    with ThreadPoolExecutor(options.jobs) as pool:
        return [result for result in pool.map(run, range(1, options.runs + 1)) if result is not None]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=first_line(__doc__))
    parser.add_argument("--runs", type=int, default=12, help="interrupted runs (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="start no run after this time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments and signals (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="concurrent runs (default: one per core)")
    parser.add_argument("--threads", type=int, default=1, help="threads per process (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="processes per run (default: %(default)s)")
    parser.add_argument("--config", type=Path, help="configuration (default: a tiny training)")
    add_overrides(parser)
    return parser.parse_args()


def create_training(options: argparse.Namespace, scratch: Path) -> Training:
    """Return the train command of the options; `scratch` gets the configuration file of the tiny training."""
    config, overrides = options.config, list(options.overrides)
    if config is None:
        config = scratch / "tiny.json"
        config.write_text("{}", encoding="utf-8")
        overrides = [*(f"{key}={value}" for key, value in TINY.items()), *overrides]
    words = [word for override in overrides for word in ("--set", override)]
    return Training(("train", "--config", str(config), *words), options.processes, options.threads)


def main() -> int:
    options = parse_options()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        training = create_training(options, scratch)
        try:
            run_dir = training.finish(scratch / "reference")
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        reference = Reference(run_dir, time.monotonic() - started)
        print(f"uninterrupted: {reference.seconds:.1f} s", flush=True)
        results = run_all(training, reference, scratch, options)
    seconds = time.monotonic() - started
    print(f"{sum(results)} of {len(results)} runs bit-identical to the uninterrupted one ({seconds:.0f} s)")
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main())

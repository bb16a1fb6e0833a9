"""Kill training at random moments, resume it until it is done, and compare it with a run that was left alone.

    python -m benchmarks.faults --runs 200

Each run trains a tiny model on embedded data in a process of its own, which is sent SIGKILL, SIGTERM or SIGINT one to
four times: at a random moment, or while a checkpoint is being written. Then it is resumed to its end, and its weights,
averaged weights, momenta, counters, metrics and best model are compared bit for bit with the uninterrupted run. With
--config and --set, any other training is put to the same test. With --processes 2, each run is one of two processes
that train together, of which one gets the signal; all must end.
"""

import argparse
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import cifar_ignite.train  # noqa: F401  loaded here once, not in each forked process
from cifar_ignite.__main__ import main as run_command
from cifar_ignite.checkpoints import load_checkpoint

TINY = {
    "experiment": "faults",
    "data.source": "synthetic",
    "data.synthetic.train_size": 250,
    "data.validation": 50,
    "data.batch_size": 16,
    "model.name": "hybrid_resnet",
    "model.width": 2,
    "train.epochs": 3,
    "train.ema_decay": 0.9,
    "train.patience": 4,
    "train.checkpoint_every": 2,
    "train.save_every_seconds": 0.2,
}
# What a process may end with: done, by the signal before training began, or by the flag that the signal sets.
ENDINGS = {signal.SIGKILL: {0, -9}, signal.SIGTERM: {0, -15, 143}, signal.SIGINT: {0, 130}}
# What the others of a run may end with: done, by the same signal, because one has ended, or before they have met.
OTHERS = {0, 1, 130, 143, -15}
PATIENCE = 10
TIMES = ["seconds", "images_per_second"]


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two run folders, times left aside: names of tensors, counters, columns, files."""
    found: list[str] = []
    for pattern in ("latest_*.pt", "best_*.pth"):
        files = [max((run / "checkpoints").glob(pattern)) for run in (one, other)]
        states = [load_checkpoint(file) for file in files]
        for state in states:
            state.pop("timer", None)
            state["history"] = [without_times(row) for row in state.pop("record").history]
        if files[0].name != files[1].name:
            found.append(f"{files[0].name} is {files[1].name}")
        found += compare(states[0], states[1], pattern)
    tables = [pd.read_csv(run / "logs" / "metrics.csv").drop(columns=TIMES) for run in (one, other)]
    if not tables[0].equals(tables[1]):
        found.append("metrics.csv")
    names = [
        sorted(path.name for path in (run / "checkpoints").iterdir() if path.name[:6] != "latest")
        for run in (one, other)
    ]
    if names[0] != names[1]:
        found.append(f"files {names[0]} are {names[1]}")
    return found


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in TIMES}


def compare(one: Any, other: Any, where: str) -> list[str]:
    """Places at which two trees of dicts, lists, tensors and numbers differ in any bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [place for key in one for place in compare(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            place for i, pair in enumerate(zip(one, other, strict=True)) for place in compare(*pair, f"{where}/{i}")
        ]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [where]
    return [] if one == other else [where]


def start(arguments: list[str], log: Path, threads: int = 1, environment: Mapping[str, str] | None = None) -> int:
    """Run one command in a forked process; returns its number. Forked, because importing torch takes seconds.

    OpenMP's threads do not survive a fork: this process must not have started any, so it computes with one alone.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(threads)
        os.environ.update(environment or {})
        status = run_command(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    except KeyboardInterrupt:
        status = 130
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def start_job(arguments: list[str], log: Path, processes: int, threads: int = 1) -> list[int]:
    """Run one command in one process or in several that know of each other, as torchrun does; returns their numbers."""
    if processes == 1:
        return [start(arguments, log, threads)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start(arguments, log, threads, places | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]


def wait(pid: int, seconds: float) -> int | None:
    """The exit status (negative: the signal), or None if the process still runs after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.002)


def is_saving(pids: list[int], folder: Path) -> bool:
    return any(any(folder.glob(f"training_runs/*/checkpoints/.*.{pid}.tmp")) for pid in pids)


def kill(pids: list[int], rng: random.Random, longest: float, outputs: Path) -> tuple[str, int]:
    """Wait for a random time, in half of the cases also for a save, and send a random signal to one of the processes.

    Returns:
        What was sent and when, and the exit status of the process that got it.

    Raises:
        RuntimeError: a process ended with another status than it should, or not at all.
    """
    victim = rng.choice(pids)
    status = wait(victim, rng.uniform(0, longest))
    during_save, ends = rng.random() < 0.5, time.monotonic() + longest
    while status is None and during_save and not is_saving(pids, outputs) and time.monotonic() < ends:
        status = wait(victim, 0)
    told, allowed = "finished", {0}
    if status is None:
        signum = rng.choice(list(ENDINGS))
        told = f"{signal.Signals(signum).name}{' in a save' if is_saving(pids, outputs) else ''}"
        allowed = OTHERS
        os.kill(victim, signum)
        status = wait(victim, 600)
        if status not in ENDINGS[signum]:
            raise RuntimeError(f"{told} ended with status {status}")
    others = {end(pid) for pid in pids if pid != victim}
    if not others <= allowed:
        raise RuntimeError(f"{told}: the other processes ended with {others}")
    return told, status


def end(pid: int) -> int | None:
    """The exit status of a process that should end by itself, or does so when told, as torchrun tells all at once.

    Before the processes have met, a missing one is waited for.
    """
    status = wait(pid, PATIENCE)
    if status is None:
        os.kill(pid, signal.SIGTERM)
        status = wait(pid, PATIENCE)
    return status


def harass(
    arguments: list[str], outputs: Path, rng: random.Random, longest: float, threads: int, processes: int
) -> tuple[list[str], Path]:
    """Train with interruptions until done; returns what was sent, and the run folder."""
    arguments = [*arguments, "--set", f"output_dir={outputs}"]
    sent: list[str] = []
    for attempt in range(rng.randint(1, 4) + 1):
        known = any(outputs.glob("training_runs/*/config.json"))
        words = [*arguments, *(["--resume", "latest"] if known else [])]
        pids = start_job(words, outputs.with_suffix(".log"), processes, threads)
        told, status = kill(pids, rng, longest, outputs)
        if told != "finished":
            sent.append(f"{told} ({status})")
        elif status:
            raise RuntimeError(f"attempt {attempt} ended with status {status}; see {outputs.with_suffix('.log')}")
    known = any(outputs.glob("training_runs/*/config.json"))
    words = [*arguments, *(["--resume", "latest"] if known else [])]
    pids = start_job(words, outputs.with_suffix(".log"), processes, threads)
    if any(last := [wait(pid, 3600) for pid in pids]):
        raise RuntimeError(f"the last attempt ended with status {last}; see {outputs.with_suffix('.log')}")
    (run_dir,) = (path.parent for path in outputs.glob("training_runs/*/config.json"))
    return sent, run_dir


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=12, help="runs to harass (default: 12)")
    parser.add_argument("--minutes", type=float, default=60, help="begin no run after so long (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default: 1)")
    parser.add_argument("--processes", type=int, default=1, help="of each run (default: 1)")
    parser.add_argument("--config", type=Path, help="another training than the tiny one")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a key")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "tiny.json").write_text("{}")
        overrides = options.set if options.config else [f"{k}={v}" for k, v in TINY.items()] + options.set
        arguments = ["train", "--config", str(options.config or scratch / "tiny.json")]
        arguments += [word for override in overrides for word in ("--set", override)]
        began = time.monotonic()
        words = [*arguments, "--set", f"output_dir={scratch / 'alone'}"]
        pids = start_job(words, scratch / "alone.log", options.processes, options.threads)
        if any(wait(pid, 3600) for pid in pids):
            print((scratch / "alone.log").read_text(), file=sys.stderr)
            return 1
        longest = time.monotonic() - began
        (alone,) = (scratch / "alone" / "training_runs").iterdir()
        print(f"uninterrupted: {longest:.1f} s")

        def one(number: int) -> bool | None:
            if time.monotonic() - began > 60 * options.minutes:
                return None
            rng = random.Random(f"{options.seed}/{number}")
            outputs = scratch / f"run{number}"
            try:
                sent, run_dir = harass(arguments, outputs, rng, longest, options.threads, options.processes)
                while not sent:  # done before the signal came
                    shutil.rmtree(outputs)
                    sent, run_dir = harass(arguments, outputs, rng, longest, options.threads, options.processes)
                differing = differences(alone, run_dir)
            except RuntimeError as error:
                sent, differing = [str(error)], ["no end"]
            verdict = "identical" if not differing else f"DIFFERS in {', '.join(differing)}"
            print(f"run {number:3}: {verdict:9}  {', '.join(sent)}", flush=True)
            if not differing:
                shutil.rmtree(outputs)
            return not differing

        with ThreadPoolExecutor(options.jobs) as pool:
            results = [result for result in pool.map(one, range(1, options.runs + 1)) if result is not None]
    took = time.monotonic() - began
    print(f"{sum(results)} of {len(results)} runs bit-identical to the uninterrupted one ({took:.0f} s)")
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main())

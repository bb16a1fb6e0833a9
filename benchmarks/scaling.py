"""Images a second by the number of processes on this machine, and what keeping them together costs.

    python -m benchmarks.scaling --processes 1 2 --rounds 3 --seconds 60 --out FILE

Rows come in turns, so that what else the machine does meets all of them: a plain process with all cores, and torchrun
with so many processes, which share the cores, or have a GPU each. Images are random. Each row trains as `train.fit`
does for the given seconds. Then the mean of the gradients, the signals' agreement and the augmentation of a whole batch
are timed alone, and the memory of all processes is summed: PSS, in which a shared page counts once.
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

from benchmarks.throughput import Setup, project_turn, random_images
from cifar_ignite import processes
from cifar_ignite.config import Config, InputError, load_config
from cifar_ignite.engines import select_device, weigh

WARM_UP = 3
REPEATS = 20


def median_ms(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call: the median of so many."""
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return 1000 * statistics.median(taken)


def measure(config: Config, images: int, seconds: float) -> dict[str, float]:
    """One row, by all processes together."""
    device = select_device(config.device)
    with processes.joined(device):
        (shared,) = processes.load_once(lambda: [random_images(images)])
        setup = Setup(config, shared)
        several, loader = idist.get_world_size() > 1, setup.loader
        if several:
            setup.loss_fn = weigh(setup.loss_fn, lambda: loader.weight)
            synchronised = config.train.sync_batch_norm
            setup.forward = processes.wrap(setup.model, setup.forward, device, sync_batch_norm=synchronised)
        turn = project_turn(setup, WARM_UP)
        turn()
        done, began, goes_on = 0, time.perf_counter(), True
        while goes_on:
            done += turn()
            goes_on = time.perf_counter() - began < seconds
            goes_on = bool(processes.agree(goes_on)) if several else goes_on
        if device.type == "cuda":
            torch.cuda.synchronize()
        row: dict[str, float] = {"images/s": done / (time.perf_counter() - began)}
        rows = torch.arange(config.data.batch_size, device=device) % len(loader.images)
        batch, labels, mirrored = loader.images[rows], loader.labels[rows], rows % 2 == 0
        row["augmentation ms"] = median_ms(lambda: loader.augment(batch, labels, 0, mirrored), device)
        if several:
            gradients = torch.cat([parameter.detach().flatten() for parameter in setup.model.parameters()])
            row["gradients MB"] = gradients.numel() * gradients.element_size() / 1e6
            row["mean of gradients ms"] = median_ms(lambda: dist.all_reduce(gradients), device)
            row["agreement ms"] = median_ms(lambda: processes.agree(0), device)
        return row | memory()


def memory() -> dict[str, float]:
    """MB of all processes: as each has them (RSS), and with shared pages counted once (PSS). Linux only."""
    path = Path("/proc/self/smaps_rollup")
    lines = [line.split() for line in path.read_text().splitlines()[1:]] if path.exists() else []
    kilobytes = {line[0].rstrip(":"): int(line[1]) for line in lines}
    return {f"{name} MB": float(idist.all_reduce(kilobytes.get(name, 0))) / 1000 for name in ("Rss", "Pss")}


def launch(count: int | None, arguments: list[str], out: Path) -> dict[str, float]:
    """One row in processes of its own: plain for None, or by torchrun."""
    cores = os.cpu_count() or 1
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // (count or 1)))}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count else []
    words = [sys.executable, *torchrun, "-m", "benchmarks.scaling", *arguments, "--row", str(out)]
    subprocess.run(words, env=environment, check=True)
    row: dict[str, float] = json.loads(out.read_text())
    return row


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/se.json"), help="the training (default: se)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a key")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of the rows (default: 1 2)")
    parser.add_argument("--images", type=int, default=50_000, help="in the training set (default: 50000)")
    parser.add_argument("--seconds", type=float, default=30, help="of training a row and round (default: 30)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each row is measured (default: 3)")
    parser.add_argument("--out", type=Path, help="write the medians to FILE.json")
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)  # a process that measures writes there
    options = parser.parse_args()
    try:
        config = load_config(options.config, ["data.validation=0", "compile=off", *options.set])
    except InputError as error:
        parser.exit(2, f"scaling: {error}\n")
    if options.row:
        row = measure(config, options.images, options.seconds)
        if os.environ.get("RANK", "0") == "0":
            options.row.write_text(json.dumps(row))
        return 0
    arguments = ["--config", str(options.config), "--images", str(options.images), "--seconds", str(options.seconds)]
    arguments += [word for override in options.set for word in ("--set", override)]
    measured: list[dict[str, float | str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for count in (None, *options.processes):
                what = f"torchrun, {count}" if count else "plain process"
                measured.append({"what": what} | launch(count, arguments, Path(folder) / "row.json"))
    table = pd.DataFrame(measured)
    speeds = table.groupby("what", sort=False)["images/s"]
    medians = table.groupby("what", sort=False).median()
    medians.insert(1, "lowest", speeds.min())
    medians.insert(2, "highest", speeds.max())
    print(medians.to_string(float_format=lambda value: f"{value:.1f}", na_rep="-"))
    if options.out:
        options.out.with_suffix(".json").write_text(medians.to_json(orient="index", indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

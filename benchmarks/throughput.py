"""Images a second of training, against its own limit and against the loop of the common tutorials.

    python -m benchmarks.throughput                       # the default recipe of se_resnet, on random images
    python -m benchmarks.throughput --set data.batch_size=512 --seconds 60 --out throughput

All rows of a table are measured in one process, in turns, so that whatever disturbs the machine disturbs all of them;
a figure is the median over the turns, with the lowest and the highest. Images are random: the time does not depend on
what is in them. Writes FILE.json and FILE.png.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import torch
import torch.nn.functional as F
from ignite.engine import Engine
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.profiler import ProfilerActivity
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms
from torchvision.transforms import v2

from cifar_ignite import handlers
from cifar_ignite.augment import create_augment
from cifar_ignite.building import build_model, create_loaders, create_optimizer, create_training_forward, should_compile
from cifar_ignite.config import AugmentConfig, Config, InputError, RunFailedError, load_config
from cifar_ignite.data import CIFAR10_CLASSES, NUM_CLASSES, Images, split_images
from cifar_ignite.engines import (
    Forward,
    LossFn,
    create_forward,
    create_trainer,
    select_device,
    select_precision,
)
from cifar_ignite.loader import EvalLoader, TrainLoader, part_of
from cifar_ignite.models import create_model

Turn = Callable[[], int]
"""Does some work and returns how many images it was."""


def random_images(count: int) -> Images:
    """Images of noise with random labels, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, NUM_CLASSES, (count,), generator=generator)
    return Images(images, labels, list(range(count)), CIFAR10_CLASSES)


# --- What is measured ---------------------------------------------------------------------------------------------


class Setup:
    """A configuration with its device, model, forward and optimizer, as `train.fit` makes them."""

    def __init__(self, config: Config, images: Images) -> None:
        self.config, self.device = config, select_device(config.device)
        self.loader, _ = create_loaders(config, split_images(config.data, images), self.device)
        self.model = build_model(config, self.device)
        iterations = config.train.epochs * len(self.loader)
        self.forward = create_training_forward(config, self.model, self.loader, self.precision, iterations)
        self.optimizer = create_optimizer(config.optimizer, self.model, self.precision)
        self.loss_fn: LossFn = nn.CrossEntropyLoss(label_smoothing=config.train.label_smoothing)
        self.scaler = GradScaler(self.device.type, enabled=self.precision == torch.float16)

    @property
    def precision(self) -> torch.dtype:
        return select_precision(self.config.precision, self.device)

    @property
    def is_compiled(self) -> bool:
        iterations = self.config.train.epochs * len(self.loader)
        return should_compile(self.config, self.device, iterations)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Whole batches without end; of several processes, each gets its parts of them."""
        part = part_of(self.config.data.batch_size, self.loader.rank, self.loader.processes)
        while True:
            for images, targets in self.loader:
                if len(images) == part.stop - part.start:
                    yield images, targets


def project_turn(setup: Setup, iterations: int) -> Turn:
    """The project's whole iteration: loader, augmentation, step, schedule, gradient guard, metrics."""
    options, config = setup.config.train, setup.config
    trainer = create_trainer(setup.model, setup.forward, setup.optimizer, setup.loss_fn, setup.scaler)
    handlers.attach_schedule(trainer, setup.optimizer, config.schedule, 10**9)
    check_every = 1 if setup.device.type == "cpu" else options.log_every
    handlers.attach_gradient_guard(
        trainer, setup.model, setup.optimizer, setup.scaler, options.clip_grad_norm, check_every
    )
    handlers.attach_metrics(trainer, setup.loss_fn, setup.device)
    if options.ema_decay:
        handlers.attach_ema(trainer, setup.model, options.ema_decay)
    batches = setup.batches()

    def turn() -> int:
        trainer.run(batches, max_epochs=(trainer.state.epoch or 0) + 1, epoch_length=iterations)
        return iterations * config.data.batch_size

    return turn


def step(
    model: nn.Module, forward: Forward, optimizer: torch.optim.Optimizer, loss_fn: LossFn, images: Any, targets: Any
) -> None:
    """Forward, backward, update, and nothing else."""
    optimizer.zero_grad()
    loss_fn(forward(images), targets).backward()
    optimizer.step()


def limit_turn(setup: Setup, iterations: int) -> Turn:
    """The same model's bare step on one batch that never changes."""
    images, targets = next(setup.batches())
    setup.model.train()

    def turn() -> int:
        for _ in range(iterations):
            step(setup.model, setup.forward, setup.optimizer, setup.loss_fn, images, targets)
        return iterations * len(images)

    return turn


def engine_turn(setup: Setup, iterations: int) -> Turn:
    """The bare step on one batch, called by an Ignite Engine."""
    images, targets = next(setup.batches())
    setup.model.train()

    def bare_step(engine: Engine, batch: None) -> None:
        step(setup.model, setup.forward, setup.optimizer, setup.loss_fn, images, targets)

    engine = Engine(bare_step)

    def turn() -> int:
        engine.run(cycle([None]), max_epochs=(engine.state.epoch or 0) + 1, epoch_length=iterations)
        return iterations * len(images)

    return turn


def pipeline_turn(setup: Setup, iterations: int) -> Turn:
    """Batches cut, augmented and normalised, and no model."""
    batches = setup.batches()

    def turn() -> int:
        for _ in range(iterations):
            next(batches)
        return iterations * setup.config.data.batch_size

    return turn


def evaluation_turn(setup: Setup, iterations: int) -> Turn:
    """Forward passes over an evaluation loader."""
    count, augment = iterations * setup.config.data.batch_size, setup.config.augment
    images = setup.loader.images[torch.arange(count, device=setup.device) % len(setup.loader.images)]
    loader = EvalLoader(images, None, batch_size=setup.config.data.batch_size, mean=augment.mean, std=augment.std)
    forward = create_forward(setup.model, setup.device, setup.precision)

    @torch.inference_mode()
    def turn() -> int:
        setup.model.eval()
        for batch, _ in loader:
            forward(batch)
        setup.model.train()
        return count

    return turn


# --- The peer: the common tutorials' loop -------------------------------------------------------------------------


class PILDataset(Dataset[tuple[Tensor, int]]):
    """As torchvision's CIFAR10: an array of images, each made a PIL image and transformed when it is asked for."""

    def __init__(self, images: Images, transform: Callable[[Image.Image], Tensor]) -> None:
        assert images.labels is not None, "the benchmark's images have labels"
        self.data, self.targets = images.images.permute(0, 2, 3, 1).numpy(), images.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def peer_transform(config: AugmentConfig) -> Callable[[Image.Image], Tensor]:
    """The default recipe's augmentation, image by image with PIL; CutMix follows on the batch."""
    return transforms.Compose(
        [
            transforms.RandomHorizontalFlip(config.flip_p),
            transforms.RandomRotation(config.rotation_degrees),
            transforms.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue),
            transforms.RandomPerspective(config.perspective_distortion, config.perspective_p),
            transforms.ToTensor(),
            transforms.Normalize(config.mean, config.std),
            transforms.RandomErasing(config.erasing_p, config.erasing_scale, config.erasing_ratio),
        ]
    )


def peer_loader(setup: Setup, images: Images, workers: int) -> Iterator[Any]:
    """A DataLoader over the PIL dataset, with CutMix in the collation, without end."""
    cutmix = v2.CutMix(num_classes=NUM_CLASSES, alpha=setup.config.augment.cutmix_alpha)

    def collate(samples: list[Any]) -> Any:
        batch = default_collate(samples)
        return cutmix(*batch) if torch.rand(()) < setup.config.augment.cutmix_p else batch

    loader = DataLoader(
        PILDataset(images, peer_transform(setup.config.augment)),
        batch_size=setup.config.data.batch_size,
        shuffle=True,
        num_workers=workers,
        collate_fn=collate,
        drop_last=True,
        pin_memory=setup.device.type == "cuda",
        persistent_workers=workers > 0,
        prefetch_factor=1 if workers else None,
    )
    while True:
        yield from loader


def peer_turn(setup: Setup, images: Images, iterations: int) -> Turn:
    """As the tutorials write it: eager, float32, NCHW, workers = cores, the loss read at each iteration."""
    model = create_model(num_classes=NUM_CLASSES, **setup.config.model.model_dump()).to(setup.device).train()
    options = setup.config.optimizer
    optimizer = torch.optim.SGD(
        model.parameters(), lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
    )
    workers = min(16, os.cpu_count() or 1)
    batches = peer_loader(setup, images, workers)
    # Between two turns each worker has made a batch, in time that is not measured: those are to be few.
    iterations = max(iterations, 10 * workers)

    def turn() -> int:
        running_loss = 0.0
        for _ in range(iterations):
            images, labels = next(batches)
            images, labels = images.to(setup.device), labels.to(setup.device)
            optimizer.zero_grad()
            loss = setup.loss_fn(model(images), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), setup.config.train.clip_grad_norm or float("inf"))
            optimizer.step()
            running_loss += loss.item()
        return iterations * setup.config.data.batch_size

    return turn


def peer_pipeline_turn(setup: Setup, images: Images, iterations: int) -> Turn:
    """The peer's batches, made by one core."""
    batches = peer_loader(setup, images, workers=0)

    def turn() -> int:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for _ in range(iterations):
            next(batches)
        torch.set_num_threads(threads)
        return iterations * setup.config.data.batch_size

    return turn


# --- Measuring ----------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(turns: dict[str, Turn], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Images a second of each turn, taken in turns after one to warm up, three rounds at least."""
    for turn in turns.values():
        turn()
    rates: dict[str, list[float]] = {name: [] for name in turns}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(next(iter(rates.values()))) < 3:
        for name, turn in turns.items():
            synchronize(device)
            started = time.perf_counter()
            count = turn()
            synchronize(device)
            rates[name].append(count / (time.perf_counter() - started))
    return rates


def table(rates: dict[str, list[float]]) -> pd.DataFrame:
    """Median, lowest and highest images a second."""
    return pd.DataFrame(
        [
            {"what": name, "images/s": statistics.median(values), "lowest": min(values), "highest": max(values)}
            for name, values in rates.items()
        ]
    )


def profile(setup: Setup) -> str:
    """Where the time of four whole iterations goes: the operators that cost most in themselves."""
    turn = project_turn(setup, 4)
    turn()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setup.device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        turn()
        synchronize(setup.device)
    column = "self_cuda_time_total" if setup.device.type == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=column, row_limit=25, max_name_column_width=60)


def peak_memory() -> int:
    """Bytes: the most that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compare(setup: Setup, images: Images, iterations: int, seconds: float) -> dict[str, list[float]]:
    """The rows of the comparison, measured in turns."""
    light = 10 * iterations
    turns = {
        "(a) this project": project_turn(setup, iterations),
        "(b) bare step, the limit": limit_turn(setup, iterations),
        "(c) tutorial loop": peer_turn(setup, images, iterations),
        "(c) its transforms, one core": peer_pipeline_turn(setup, images, iterations),
        "(e) pipeline alone": pipeline_turn(setup, light),
        "(f) bare step in an Engine": engine_turn(setup, iterations),
        "evaluation": evaluation_turn(setup, iterations),
    }
    if setup.is_compiled:
        turns["(b) not compiled"] = limit_turn(
            Setup(setup.config.model_copy(update={"compile": "off"}), images), iterations
        )
    with contextlib.suppress(ImportError):
        turns["(d) Kornia"] = kornia_turn(setup, iterations)
    return measure(turns, setup.device, seconds)


def kornia_turn(setup: Setup, iterations: int) -> Turn:
    """The project's step behind Kornia's batched augmentation.

    Raises:
        ImportError: Kornia is not installed.
    """
    import kornia.augmentation as K

    config = setup.config.augment
    augment = K.AugmentationSequential(
        K.RandomHorizontalFlip(p=config.flip_p),
        K.RandomRotation(config.rotation_degrees, p=1.0),
        K.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue, p=1.0),
        K.RandomPerspective(config.perspective_distortion, p=config.perspective_p),
        K.Normalize(torch.tensor(config.mean), torch.tensor(config.std)),
        K.RandomErasing(config.erasing_scale, config.erasing_ratio, p=config.erasing_p),
    )
    cutmix = v2.CutMix(num_classes=NUM_CLASSES, alpha=config.cutmix_alpha)

    def pipeline(images: Tensor, labels: Tensor, epoch: int, mirrored: Tensor) -> tuple[Tensor, Tensor]:
        images = augment(images.float() / 255)
        targets = F.one_hot(labels, NUM_CLASSES).float()
        if torch.rand(()) < config.cutmix_p:
            images, targets = cutmix(images, labels)
        return images.contiguous(memory_format=torch.channels_last), targets

    loader = TrainLoader(
        setup.loader.images,
        setup.loader.labels,
        batch_size=setup.config.data.batch_size,
        seed=setup.config.seed,
        augment=pipeline,
    )
    batches = iter(loader)

    def turn() -> int:
        nonlocal batches
        for _ in range(iterations):
            batch = next(batches, None)
            if batch is None or len(batch[0]) < loader.batch_size:
                batches = iter(loader)
                batch = next(batches)
            step(setup.model, setup.forward, setup.optimizer, setup.loss_fn, *batch)
        return iterations * loader.batch_size

    return turn


def scale_batches(config: Config, images: Images, sizes: list[int], seconds: float) -> dict[str, list[float]]:
    """The project's iteration at several batch sizes, in turns of about equally many images."""
    turns = {}
    for size in sizes:
        # Eager: each size would have to be compiled.
        data = config.data.model_copy(update={"batch_size": size})
        resized = config.model_copy(update={"data": data, "compile": "off"})
        turns[f"batch {size}"] = project_turn(Setup(resized, images), max(1, max(sizes) // size))
    return measure(turns, select_device(config.device), seconds)


def scale_dataset(config: Config, images: Images, sizes: list[int]) -> dict[str, list[float]]:
    """Seconds of the pipeline for one epoch over so many images: linear if nothing grows faster than the data."""
    device = select_device(config.device)
    assert images.labels is not None, "the benchmark's images have labels"
    augment = create_augment(config.augment, NUM_CLASSES, config.train.epochs)
    seconds: dict[str, list[float]] = {f"{size} images": [] for size in sizes}
    for _ in range(4):
        for size in sizes:
            loader = TrainLoader(
                images.images[:size].to(device),
                images.labels[:size].to(device),
                batch_size=config.data.batch_size,
                seed=0,
                augment=augment,
            )
            synchronize(device)
            started = time.perf_counter()
            for _ in loader:
                pass
            synchronize(device)
            seconds[f"{size} images"].append(time.perf_counter() - started)
    return {name: values[1:] for name, values in seconds.items()}


def draw(rates: pd.DataFrame, path: Path, title: str) -> None:
    """A bar for each row, with the lowest and the highest."""
    figure = Figure(figsize=(8, 0.5 * len(rates) + 1.5), layout="constrained")
    axes = figure.subplots()
    spread = [rates["images/s"] - rates["lowest"], rates["highest"] - rates["images/s"]]
    bars = axes.barh(rates["what"], rates["images/s"], xerr=spread, color="tab:blue")
    axes.bar_label(bars, [f" {value:,.0f}" for value in rates["images/s"]], padding=3)
    axes.set(xscale="log", xlabel="images a second (logarithmic)", title=title)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    with matplotlib.rc_context({"savefig.dpi": 120}):
        figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.throughput", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/se.json"), help="recipe (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE")
    parser.add_argument("--images", type=int, default=50_000, help="in the dataset (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=4, help="a turn (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=120.0, help="for the comparison (default: %(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--dataset-sizes", type=int, nargs="*", default=[5_000, 10_000, 25_000, 50_000])
    parser.add_argument("--profile", action="store_true", help="also print where the time of (a) goes, by operator")
    parser.add_argument("--out", type=Path, help="names FILE.json and FILE.png (default: in a temporary folder)")
    options = parser.parse_args()
    try:
        config = load_config(options.config, [*options.overrides, "data.validation=0"])
        device = select_device(config.device)
        if (largest := max([config.data.batch_size, *options.batch_sizes])) > options.images:
            raise InputError(f"--images {options.images}: less than a batch of {largest}")
        imported = peak_memory()
        images = random_images(options.images)
        setup = Setup(config, images)
    except (InputError, RunFailedError) as error:
        parser.exit(error.status, f"throughput: {error}\n")
    project_turn(setup, 3)()
    memory = {"cpu": peak_memory() - imported}
    if device.type == "cuda":
        memory["cuda"] = torch.cuda.max_memory_allocated(device)

    rates = table(compare(setup, images, options.iterations, options.seconds))
    rate = rates.set_index("what")["images/s"]
    ratios = {
        "(a) / (b)": rate["(a) this project"] / rate["(b) bare step, the limit"],
        "(a) / (c)": rate["(a) this project"] / rate["(c) tutorial loop"],
        "(e) / (c)'s transforms on one core": rate["(e) pipeline alone"] / rate["(c) its transforms, one core"],
        "(f) / (b)": rate["(f) bare step in an Engine"] / rate["(b) bare step, the limit"],
    }
    batches = (
        table(scale_batches(config, images, options.batch_sizes, options.seconds / 4)) if options.batch_sizes else None
    )
    sizes = [size for size in options.dataset_sizes if size <= options.images]
    epochs = {name: statistics.median(values) for name, values in scale_dataset(config, images, sizes).items()}

    precision = str(select_precision(config.precision, device)).removeprefix("torch.")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores"
    compiled = "compiled" if setup.is_compiled else "eager"
    title = f"{config.model.name}, batch {config.data.batch_size}, {precision}, {compiled}, {where}"
    print(
        f"{title}, torch {torch.__version__}",
        *(f"{name}: {count / 1e6:.0f} MB above imports" for name, count in memory.items()),
        sep="\n",
    )
    for shown in (rates, batches):
        if shown is not None:
            print(f"\n{shown.to_string(index=False, float_format='{:,.0f}'.format)}")
    print("\n" + "\n".join(f"{name:35} {value:6.2f}" for name, value in ratios.items()))
    if options.profile:
        print(profile(setup))
    print("\npipeline, seconds an epoch: " + ", ".join(f"{name} {value:.3f}" for name, value in epochs.items()))

    out = options.out or Path(tempfile.mkdtemp()) / "throughput"
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "title": title,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "config": config.model_dump(mode="json"),
        "peak_memory_bytes": memory,
        "images_per_second": rates.to_dict("records"),
        "ratios": ratios,
        "batch_sizes": batches.to_dict("records") if batches is not None else [],
        "pipeline_epoch_seconds": epochs,
    }
    json_path, png_path = out.with_name(f"{out.name}.json"), out.with_name(f"{out.name}.png")
    json_path.write_text(json.dumps(result, indent=2) + "\n")
    draw(rates, png_path, title)
    print(f"\nwritten: {json_path}, {png_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Workloads of this project: its complete training iteration, and parts of it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import cycle

import torch
from ignite.engine import Engine
from torch import Tensor, nn
from torch.amp import GradScaler

from benchmarks.measuring import Workload
from cifar_ignite.config import Config
from cifar_ignite.data.batch_entries import CIFAR_SIZE
from cifar_ignite.data.cifar10 import CIFAR10_CLASSES
from cifar_ignite.data.dataset import ImageDataset, train_val_split
from cifar_ignite.data.loaders import EvalLoader, TrainLoader, create_loaders, shard_slice
from cifar_ignite.distributed.collectives import wrap_ddp
from cifar_ignite.training import handlers
from cifar_ignite.training.device import (
    enable_deterministic_algorithms,
    resolve_amp_dtype,
    select_device,
    set_float32_precision,
)
from cifar_ignite.training.engines import LossFn, create_trainer, scale_loss
from cifar_ignite.training.forward import (
    Forward,
    create_forward,
    create_training_forward,
    should_compile,
    uses_cuda_graphs,
    zero_images,
)
from cifar_ignite.training.lr_schedule import attach_lr_schedule
from cifar_ignite.training.metrics import attach_metrics
from cifar_ignite.training.optimizers import create_optimizer
from cifar_ignite.training.state import create_initial_model

# Longer than any measurement: a schedule cannot be continued after its end.
SCHEDULE_ITERATIONS = 10**9


def random_dataset(count: int, size: int = CIFAR_SIZE) -> ImageDataset:
    """Return images of noise, like those of CIFAR-10, on the CPU; the speed does not depend on their content.

    Args:
        count: Number of images.
        size: Side of the images in pixels.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, len(CIFAR10_CLASSES), (count,), generator=generator)
    return ImageDataset(images, labels, list(range(count)), CIFAR10_CLASSES)


@dataclass(frozen=True)
class Setup:
    """The objects of a training, created as for the train command (training/state.py).

    Attributes:
        config: Configuration, without validation images.
        dataset: Training images on the CPU.
        loader: Training batches.
        model: Model on the device of the loader.
        forward: Forward pass, compiled or not; under several ranks, it averages gradients.
        optimizer: Optimizer of the model.
        loss_fn: Loss of logits and targets.
        scaler: Gradient scaler, enabled for fp16.
    """

    config: Config
    dataset: ImageDataset
    loader: TrainLoader
    model: nn.Module
    forward: Forward
    optimizer: torch.optim.Optimizer
    loss_fn: LossFn
    scaler: GradScaler

    @property
    def device(self) -> torch.device:
        return self.loader.images.device

    @property
    def amp_dtype(self) -> torch.dtype:
        return resolve_amp_dtype(self.config.precision, self.device)

    @property
    def is_compiled(self) -> bool:
        return should_compile(self.config, self.device, self.config.train.epochs * len(self.loader))

    def full_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's shards of full batches, without end."""
        shard = shard_slice(self.config.data.batch_size, self.loader.shard)
        while True:
            for images, targets in self.loader:
                if len(images) == shard.stop - shard.start:
                    yield images, targets

    def train_step(self, images: Tensor, targets: Tensor) -> None:
        """Make one bare step: forward pass, backward pass, update."""
        self.optimizer.zero_grad()
        self.loss_fn(self.forward(images), targets).backward()
        self.optimizer.step()


def create_setup(config: Config, dataset: ImageDataset) -> Setup:
    """Create the objects of a training on all images of a dataset.

    Raises:
        InputError: If the device is missing, or the configuration does not fit the model or the number of ranks.
        TrainingError: If compilation was requested and fails.
    """
    device = select_device(config.device)
    enable_deterministic_algorithms()
    set_float32_precision(config.precision)
    amp_dtype = resolve_amp_dtype(config.precision, device)
    train_set, no_images = train_val_split(dataset, 0, config.data.split_seed)
    loader, _ = create_loaders(config, train_set, no_images, device)
    model = create_initial_model(config, dataset.num_classes, device)
    forward = create_training_forward(config, model, loader, amp_dtype)
    return Setup(
        config=config,
        dataset=dataset,
        loader=loader,
        model=model,
        forward=wrap_ddp(model, forward, zero_images(loader, 2), sync_batch_norm=config.train.sync_batch_norm),
        optimizer=create_optimizer(config.optimizer, model, amp_dtype, use_cuda_graph=uses_cuda_graphs(config, device)),
        loss_fn=nn.CrossEntropyLoss(label_smoothing=config.train.label_smoothing),
        scaler=GradScaler(device.type, enabled=amp_dtype == torch.float16),
    )


def project_workload(setup: Setup, iterations: int) -> Workload:
    """Return the complete iteration: loader, augmentation, step, schedule, gradient clipping, metrics and EMA.

    Everything that happens in every iteration of the train command; checkpoints, logs and the progress bar do not.
    """
    config, options = setup.config, setup.config.train
    loss_fn = scale_loss(setup.loss_fn, setup.loader)
    trainer = create_trainer(setup.model, setup.forward, setup.optimizer, loss_fn, setup.scaler)
    attach_lr_schedule(trainer, setup.optimizer, config.schedule, SCHEDULE_ITERATIONS)
    attach_metrics(trainer, setup.loss_fn, setup.device)
    if options.ema_decay:
        handlers.attach_ema(trainer, setup.model, options.ema_decay)
    handlers.attach_grad_clipping(trainer, setup.model, setup.optimizer, setup.scaler, options)
    batches = setup.full_batches()

    def run() -> int:
        trainer.run(batches, max_epochs=(trainer.state.epoch or 0) + 1, epoch_length=iterations)
        return iterations * config.data.batch_size

    return run


def bare_step_workload(setup: Setup, iterations: int) -> Workload:
    """Return the model's bare step on one batch that never changes: the upper bound of the training speed."""
    images, targets = next(setup.full_batches())
    setup.model.train()

    def run() -> int:
        for _ in range(iterations):
            setup.train_step(images, targets)
        return iterations * len(images)

    return run


def engine_workload(setup: Setup, iterations: int) -> Workload:
    """Return the bare step on one batch, called by an Ignite Engine."""
    images, targets = next(setup.full_batches())
    setup.model.train()
    engine = Engine(lambda engine, batch: setup.train_step(images, targets))

    def run() -> int:
        engine.run(cycle([None]), max_epochs=(engine.state.epoch or 0) + 1, epoch_length=iterations)
        return iterations * len(images)

    return run


def pipeline_workload(setup: Setup, iterations: int) -> Workload:
    """Return the input pipeline: batches that are indexed, augmented and normalized, without a model."""
    batches = setup.full_batches()

    def run() -> int:
        for _ in range(iterations):
            next(batches)
        return iterations * setup.config.data.batch_size

    return run


def evaluation_workload(setup: Setup, iterations: int) -> Workload:
    """Return the forward passes over an evaluation loader of `iterations` batches."""
    batch_size, images = setup.config.data.batch_size, setup.loader.images
    count = iterations * batch_size
    rows = torch.arange(count, device=setup.device) % len(images)
    dataset = replace(setup.dataset, images=images[rows], labels=None, ids=list(range(count)))
    loader = EvalLoader(dataset, batch_size=batch_size, augment=setup.config.augment)
    forward = create_forward(setup.model, setup.device, setup.amp_dtype)

    @torch.inference_mode()
    def run() -> int:
        setup.model.eval()
        for batch, _ in loader:
            forward(batch)
        setup.model.train()
        return count

    return run

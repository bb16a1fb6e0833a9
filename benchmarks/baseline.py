"""The baselines of the comparison: the training loop of the common tutorials, and Kornia's augmentation."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms
from torchvision.transforms import v2

from benchmarks.measuring import Workload
from benchmarks.workloads import Setup
from cifar_ignite.augment.pipeline import BatchTransform
from cifar_ignite.config import AugmentConfig
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.data.loaders import TrainLoader
from cifar_ignite.models.registry import create_model

MAX_WORKERS = 16


# --- The tutorial loop --------------------------------------------------------------------------------------------


class PILDataset(Dataset[tuple[Tensor, int]]):
    """A dataset like torchvision's CIFAR10: an array of images, each converted to PIL and transformed when indexed."""

    def __init__(self, dataset: ImageDataset, transform: Callable[[Image.Image], Tensor]) -> None:
        assert dataset.labels is not None, "training requires labels"
        self.data, self.targets = dataset.images.permute(0, 2, 3, 1).numpy(), dataset.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def baseline_transform(config: AugmentConfig) -> Callable[[Image.Image], Tensor]:
    """Return the default recipe's augmentation, image by image with PIL; CutMix follows on the batch."""
    return transforms.Compose(
        [
            transforms.RandomHorizontalFlip(config.flip_p),
            transforms.RandomRotation(config.rotation_degrees),
            transforms.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue),
            transforms.RandomPerspective(config.distortion_scale, config.perspective_p),
            transforms.ToTensor(),
            transforms.Normalize(config.mean, config.std),
            transforms.RandomErasing(config.erasing_p, config.erasing_scale, config.erasing_ratio),
        ]
    )


def baseline_batches(setup: Setup, workers: int) -> Iterator[Any]:
    """Yield batches of a DataLoader over the PIL dataset, with CutMix in the collation, without end."""
    config = setup.config.augment
    cutmix = v2.CutMix(num_classes=setup.dataset.num_classes, alpha=config.cutmix_alpha)

    def collate(samples: list[Any]) -> Any:
        batch = default_collate(samples)
        return cutmix(*batch) if torch.rand(()) < config.cutmix_p else batch

    loader = DataLoader(
        PILDataset(setup.dataset, baseline_transform(config)),
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


def baseline_workload(setup: Setup, iterations: int) -> Workload:
    """Return the loop of the tutorials: eager, float32, NCHW, one worker per core, the loss read in each iteration."""
    config = setup.config
    model = create_model(num_classes=setup.dataset.num_classes, **config.model.model_dump()).to(setup.device).train()
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.optimizer.lr,
        momentum=config.optimizer.momentum,
        weight_decay=config.optimizer.weight_decay,
    )
    workers = min(MAX_WORKERS, os.cpu_count() or 1)
    batches = baseline_batches(setup, workers)
    # Each worker prefetches one batch while other workloads are measured: these must be few among all.
    iterations = max(iterations, 10 * workers)

    def run() -> int:
        running_loss = 0.0
        for _ in range(iterations):
            images, targets = (tensor.to(setup.device) for tensor in next(batches))
            optimizer.zero_grad()
            loss = setup.loss_fn(model(images), targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_grad_norm or float("inf"))
            optimizer.step()
            running_loss += loss.item()
        return iterations * config.data.batch_size

    return run


def baseline_pipeline_workload(setup: Setup, iterations: int) -> Workload:
    """Return the input pipeline of the tutorials on one core."""
    batches = baseline_batches(setup, workers=0)

    def run() -> int:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for _ in range(iterations):
            next(batches)
        torch.set_num_threads(threads)
        return iterations * setup.config.data.batch_size

    return run


# --- Kornia -------------------------------------------------------------------------------------------------------


def kornia_workload(setup: Setup, iterations: int) -> Workload:
    """Return this project's bare step on batches of Kornia's batched augmentation.

    Raises:
        ImportError: If Kornia is not installed.
    """
    transform = kornia_transform(setup.config.augment, setup.dataset.num_classes)
    batch_size, dataset = setup.config.data.batch_size, setup.dataset.to(setup.device)
    loader = TrainLoader(dataset, batch_size=batch_size, seed=setup.config.seed, transform=transform)

    def full_batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from (batch for batch in loader if len(batch[0]) == batch_size)

    batches = full_batches()

    def run() -> int:
        for _ in range(iterations):
            setup.train_step(*next(batches))
        return iterations * batch_size

    return run


def kornia_transform(config: AugmentConfig, num_classes: int) -> BatchTransform:
    """Return the default recipe's augmentation by Kornia, with torchvision's CutMix.

    Raises:
        ImportError: If Kornia is not installed.
    """
    import kornia.augmentation as K

    augment = K.AugmentationSequential(
        K.RandomHorizontalFlip(p=config.flip_p),
        K.RandomRotation(config.rotation_degrees, p=1.0),
        K.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue, p=1.0),
        K.RandomPerspective(config.distortion_scale, p=config.perspective_p),
        K.Normalize(torch.tensor(config.mean), torch.tensor(config.std)),
        K.RandomErasing(config.erasing_scale, config.erasing_ratio, p=config.erasing_p),
    )
    cutmix = v2.CutMix(num_classes=num_classes, alpha=config.cutmix_alpha)

    def transform(images: Tensor, labels: Tensor, epoch: int, flip_mask: Tensor) -> tuple[Tensor, Tensor]:
        images = augment(images.float() / 255)
        targets = F.one_hot(labels, num_classes).float()
        if torch.rand(()) < config.cutmix_p:
            images, targets = cutmix(images, labels)
        return images.contiguous(memory_format=torch.channels_last), targets

    return transform

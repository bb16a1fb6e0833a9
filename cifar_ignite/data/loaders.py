"""Loaders that index images on the device: no workers, no copies, no Python code per image.

All randomness of an iteration is a function of (seed, iteration) and never of history: `TrainLoader` seeds torch's
global generators before each batch. Augmentation, CutMix, dropout, stochastic depth, and anything else that draws with
plain torch calls are therefore bit-identical after a resume at any iteration, without a random state to save.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import ignite.distributed as idist
import torch
from torch import Tensor

from cifar_ignite.augment.elementwise import memory_format, normalize, to_float
from cifar_ignite.augment.pipeline import BatchTransform, create_train_transform
from cifar_ignite.config import AugmentConfig, Config
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.data.seeding import FLIP_MASK, ITERATION, ORDER, RANK, derive_seed, seed_generators
from cifar_ignite.errors import InputError


@dataclass(frozen=True)
class Shard:
    """One rank's share of the data.

    Attributes:
        rank: Rank of the process.
        world_size: Number of processes.
    """

    rank: int = 0
    world_size: int = 1

    @classmethod
    def current(cls) -> "Shard":
        """Return the shard of this process."""
        return cls(idist.get_rank(), idist.get_world_size())


UNSHARDED = Shard()


def shard_slice(count: int, shard: Shard) -> slice:
    """Return the rows of a batch of `count` images that belong to a shard.

    Shards differ by at most one image, and may be empty.
    """
    size, rest = divmod(count, shard.world_size)
    return slice(*(size * rank + min(rest, rank) for rank in (shard.rank, shard.rank + 1)))


class TrainLoader:
    """Augmented batches in a new order each epoch, with every image exactly once; the last batch may be smaller.

    Every rank augments the global batch and then takes its shard, so the global batch does not depend on the number of
    ranks, and images are mixed with the same partners. Random numbers drawn afterwards, as for dropout, differ between
    ranks.

    Attributes:
        iteration: Number of batches returned since the start of training. Set it to resume: the next batch is the one
            of that iteration in an uninterrupted run.
        loss_scale: Factor for the mean loss over this rank's shard of the last batch, such that the mean over all ranks
            is the mean over the batch; 1 if all shards have the same size.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        batch_size: int,
        seed: int,
        transform: BatchTransform,
        shard: Shard = UNSHARDED,
    ) -> None:
        """
        Args:
            dataset: Labeled dataset on the training device.
            batch_size: Number of images per batch, over all ranks.
            seed: Seed of the run.
            transform: Augmentation, a function from a batch to (normalized images, targets); see augment/pipeline.py.
            shard: Shard of this rank.
        """
        assert dataset.labels is not None, "training requires labels"
        self.images, self.labels = dataset.images, dataset.labels
        self.batch_size, self.seed, self.transform, self.shard = batch_size, seed, transform, shard
        self.iteration, self.loss_scale = 0, 1.0
        generator = torch.Generator().manual_seed(derive_seed(seed, FLIP_MASK))
        flip_mask = torch.randint(2, (len(self.images),), generator=generator, dtype=torch.bool)
        self._flip_mask = flip_mask.to(self.images.device)

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's shards of the remaining batches of the epoch that contains `iteration`."""
        for images, targets in self._global_batches():
            yield self._shard(images, targets)

    def _global_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, start = divmod(self.iteration, len(self))
        order = self.epoch_permutation(epoch).to(self.images.device)
        columns = order, self.labels[order], self._flip_mask[order] ^ bool(epoch % 2)
        batches = list(zip(*(column.split(self.batch_size) for column in columns), strict=True))
        for indices, labels, flip_mask in batches[start:]:
            seed_generators(derive_seed(self.seed, ITERATION, self.iteration), self.images.device)
            self.iteration += 1
            # index_select copies image by image; images[indices] copies byte by byte, 20x slower on a CPU.
            images = self.images.index_select(0, indices)
            yield self.transform(images, labels, epoch, flip_mask)

    def peek(self) -> tuple[Tensor, Tensor]:
        """Return the global batch of the next iteration, which that iteration then draws again."""
        iteration = self.iteration
        batch = next(self._global_batches())
        self.iteration = iteration
        return batch

    def _shard(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's rows of a batch, and set the loss scale and the seed for what is drawn afterwards."""
        rows = shard_slice(len(images), self.shard)
        self.loss_scale = (rows.stop - rows.start) * self.shard.world_size / len(images)
        if self.shard.world_size > 1:
            seed_generators(derive_seed(self.seed, RANK, self.iteration, self.shard.rank), images.device)
        return images[rows], targets[rows]

    def epoch_permutation(self, epoch: int) -> Tensor:
        """Return the order of the images, int64 (N,), in an epoch (from 0)."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, ORDER, epoch))
        return torch.randperm(len(self.images), generator=generator)


class EvalLoader:
    """Normalized batches in order, with their labels, or with None for an unlabeled dataset.

    Ranks take turns at complete batches, so the model's outputs for a batch do not depend on the number of ranks. All
    ranks get the same number of batches; the last ones may be empty.
    """

    def __init__(
        self, dataset: ImageDataset, *, batch_size: int, augment: AugmentConfig, shard: Shard = UNSHARDED
    ) -> None:
        """
        Args:
            dataset: Dataset on the device, labeled or not.
            batch_size: Number of images per batch.
            augment: Section with the mean and the standard deviation for normalization.
            shard: Shard of this rank.
        """
        self.images, self.labels = dataset.images, dataset.labels
        self.batch_size, self.augment, self.shard = batch_size, augment, shard

    def __len__(self) -> int:
        """Return the number of batches per rank."""
        return math.ceil(len(self.images) / (self.batch_size * self.shard.world_size))

    def rows(self) -> list[slice]:
        """Return the rows of the dataset in each of this rank's batches."""
        starts = [(turn * self.shard.world_size + self.shard.rank) * self.batch_size for turn in range(len(self))]
        return [slice(start, start + self.batch_size) for start in starts]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for rows in self.rows():
            images = normalize(to_float(self.images[rows]), *self.augment.normalization)
            labels = None if self.labels is None else self.labels[rows]
            yield images.contiguous(memory_format=memory_format(images.device)), labels


def create_loaders(
    config: Config, train_set: ImageDataset, val_set: ImageDataset, device: torch.device
) -> tuple[TrainLoader, EvalLoader | None]:
    """Move the datasets to the device and create their loaders for this rank.

    Args:
        config: Configuration of the run.
        train_set: Images to train on.
        val_set: Images for validation, which may be empty.
        device: Device of training.

    Returns:
        The training loader, and the validation loader or None if there are no validation images.

    Raises:
        InputError: If a batch has fewer images than there are ranks.
        TrainingError: If compilation of the augmentation was requested (compile="on") and fails.
    """
    batch_size, shard = config.data.batch_size, Shard.current()
    if batch_size < shard.world_size:
        raise InputError(
            f"data.batch_size: {batch_size} images cannot be split over {shard.world_size} processes; "
            f"use at least {shard.world_size}"
        )
    train_set = train_set.to(device)
    is_compiled = config.compile == "on" and batch_size <= len(train_set)
    transform = create_train_transform(
        config.augment,
        train_set.num_classes,
        config.train.epochs,
        compile_for=train_set.images[:batch_size] if is_compiled else None,
        # CUDA graphs have not been measured in distributed runs.
        graph_batch=batch_size if config.compile != "off" and shard.world_size == 1 else 0,
    )
    train_loader = TrainLoader(train_set, batch_size=batch_size, seed=config.seed, transform=transform, shard=shard)
    if not len(val_set):
        return train_loader, None
    return train_loader, EvalLoader(val_set.to(device), batch_size=batch_size, augment=config.augment, shard=shard)

"""Batches cut from images that stay on the device as uint8: no workers, no copies, no per-image Python.

All randomness of an iteration is a function of (seed, iteration) and never of history: `TrainLoader` re-seeds torch's
global generators before each batch, so augmentation, CutMix, dropout and stochastic depth, and whatever a user adds
with plain torch calls, repeat bit for bit from any iteration on, with no random state to save.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from cifar_ignite.augment import Augment, normalize, to_float

# The purposes that seeds are derived for; the numbers only keep the streams apart.
ORDER, ITERATION, INITIAL_WEIGHTS, MIRRORED = range(4)


def derive_seed(seed: int, purpose: int, index: int = 0) -> int:
    """A well-mixed 64-bit seed for one purpose and index (numpy's SeedSequence, after O'Neill's seed_seq)."""
    return int(np.random.SeedSequence([seed, purpose, index]).generate_state(1, np.uint64)[0])


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the global generators of the CPU and of `device`.

    torch.manual_seed also seeds every other kind of device there could be, which costs 0.1 ms.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


class TrainLoader:
    """Augmented batches in a new order each epoch, every image exactly once; the last batch may be smaller.

    Attributes:
        iteration: batches handed out since the start of training. Set it to resume: the next batch, its order and its
            augmentation are those of that iteration of an uninterrupted run.
    """

    def __init__(self, images: Tensor, labels: Tensor, *, batch_size: int, seed: int, augment: Augment) -> None:
        """
        Args:
            images: uint8 (N, 3, H, W) on the device.
            labels: int64 (N,) on the same device.
            batch_size: images a batch.
            seed: the run's seed.
            augment: turns a batch into (normalised images, targets), see augment.py.
        """
        self.images, self.labels = images, labels
        self.batch_size, self.seed, self.augment = batch_size, seed, augment
        self.iteration = 0
        generator = torch.Generator().manual_seed(derive_seed(seed, MIRRORED))
        self._mirrored = torch.randint(2, (len(images),), generator=generator, dtype=torch.bool).to(images.device)

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest of the epoch that `iteration` lies in."""
        epoch, done = divmod(self.iteration, len(self))
        batches = self.order(epoch).to(self.images.device).split(self.batch_size)
        for indices in batches[done:]:
            seed_generators(derive_seed(self.seed, ITERATION, self.iteration), self.images.device)
            self.iteration += 1
            # index_select copies whole images; images[indices] goes byte by byte, twenty times slower on a CPU.
            images, labels = self.images.index_select(0, indices), self.labels[indices]
            yield self.augment(images, labels, epoch, self._mirrored[indices] ^ bool(epoch % 2))

    def order(self, epoch: int) -> Tensor:
        """The permutation of one epoch (from 0): int64 (N,)."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, ORDER, epoch))
        return torch.randperm(len(self.images), generator=generator)


class EvalLoader:
    """Normalised batches in order, with their labels, or None in place of labels that nobody knows."""

    def __init__(
        self, images: Tensor, labels: Tensor | None, *, batch_size: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        """
        Args:
            images: uint8 (N, 3, H, W) on the device.
            labels: int64 (N,) on the same device, or None.
            batch_size: images a batch.
            mean: of each channel, in [0, 1].
            std: of each channel, in [0, 1].
        """
        self.images, self.labels = images, labels
        self.batch_size, self.mean, self.std = batch_size, mean, std

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for start in range(0, len(self.images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            batch = normalize(to_float(self.images[rows]), self.mean, self.std)
            labels = None if self.labels is None else self.labels[rows]
            yield batch.contiguous(memory_format=torch.channels_last), labels

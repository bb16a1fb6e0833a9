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
ORDER, ITERATION, INITIAL_WEIGHTS, MIRRORED, PROCESS = range(5)


def derive_seed(seed: int, purpose: int, index: int = 0, *more: int) -> int:
    """A well-mixed 64-bit seed for one purpose and index (numpy's SeedSequence, after O'Neill's seed_seq)."""
    return int(np.random.SeedSequence([seed, purpose, index, *more]).generate_state(1, np.uint64)[0])


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the global generators of the CPU and of `device`.

    torch.manual_seed also seeds every other kind of device there could be, which costs 0.1 ms.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def part_of(count: int, rank: int, processes: int) -> slice:
    """The share of one of several processes in a batch: its parts differ by at most one image, and may be empty."""
    return slice(*(count // processes * one + min(count % processes, one) for one in (rank, rank + 1)))


class TrainLoader:
    """Augmented batches in a new order each epoch, every image exactly once; the last batch may be smaller.

    Each of several processes augments the whole batch and then takes its part: so the batch is bit for bit that of one
    process, and images mix with the same neighbours. What is drawn after that, as for dropout, differs between them.

    Attributes:
        iteration: batches handed out since the start of training. Set it to resume: the next batch, its order and its
            augmentation are those of that iteration of an uninterrupted run.
        weight: by which the mean over this process's part of the newest batch is to be multiplied, so that the mean
            over processes is the mean over the batch: 1 if all parts are equal.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        seed: int,
        augment: Augment,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        """
        Args:
            images: uint8 (N, 3, H, W) on the device.
            labels: int64 (N,) on the same device.
            batch_size: images a batch, of all processes together.
            seed: the run's seed.
            augment: turns a batch into (normalised images, targets), see augment.py.
            rank: of this process.
            processes: that share each batch.
        """
        self.images, self.labels = images, labels
        self.batch_size, self.seed, self.augment = batch_size, seed, augment
        self.rank, self.processes = rank, processes
        self.iteration, self.weight = 0, 1.0
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
            batch = self.augment(images, labels, epoch, self._mirrored[indices] ^ bool(epoch % 2))
            yield batch if self.processes == 1 else self._take_part(*batch)

    def _take_part(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        rows = part_of(len(images), self.rank, self.processes)
        self.weight = (rows.stop - rows.start) * self.processes / len(images)
        seed_generators(derive_seed(self.seed, PROCESS, self.iteration, self.rank), images.device)
        return images[rows], targets[rows]

    def order(self, epoch: int) -> Tensor:
        """The permutation of one epoch (from 0): int64 (N,)."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, ORDER, epoch))
        return torch.randperm(len(self.images), generator=generator)


class EvalLoader:
    """Normalised batches in order, with their labels, or None in place of labels that nobody knows.

    Several processes take turns at whole batches, so that each batch's outputs are those of one process. All get the
    same number of batches: of the last ones, some may be empty.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None,
        *,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        """
        Args:
            images: uint8 (N, 3, H, W) on the device.
            labels: int64 (N,) on the same device, or None.
            batch_size: images a batch.
            mean: of each channel, in [0, 1].
            std: of each channel, in [0, 1].
            rank: of this process.
            processes: that share the batches.
        """
        self.images, self.labels = images, labels
        self.batch_size, self.mean, self.std = batch_size, mean, std
        self.rank, self.processes = rank, processes

    def __len__(self) -> int:
        return math.ceil(len(self.images) / (self.batch_size * self.processes))

    def rows(self) -> list[slice]:
        """The images of each of this process's batches."""
        starts = [(turn * self.processes + self.rank) * self.batch_size for turn in range(len(self))]
        return [slice(start, start + self.batch_size) for start in starts]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for rows in self.rows():
            batch = normalize(to_float(self.images[rows]), self.mean, self.std)
            labels = None if self.labels is None else self.labels[rows]
            yield batch.contiguous(memory_format=torch.channels_last), labels

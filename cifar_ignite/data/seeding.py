"""Seeds derived from the run's seed, one per purpose and index."""

import numpy as np
import torch

# Purposes of derived seeds; the numbers only keep the random streams apart, and changing one changes every run.
ORDER = 0
ITERATION = 1
INITIAL_WEIGHTS = 2
FLIP_MASK = 3
RANK = 4


def derive_seed(seed: int, purpose: int, index: int = 0, *more: int) -> int:
    """Derive a well-mixed 64-bit seed (numpy's SeedSequence, after O'Neill's seed_seq).

    Args:
        seed: Seed of the run.
        purpose: Purpose of the seed, for example `ITERATION`.
        index: Index within the purpose, for example the iteration.
        more: Further indices, for example the rank.
    """
    return int(np.random.SeedSequence([seed, purpose, index, *more]).generate_state(1, np.uint64)[0])


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the global generators of the CPU and of `device`.

    torch.manual_seed also seeds all other types of devices, MPS included, which takes 0.1 ms.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    if device.type == "mps":
        torch.mps.manual_seed(seed)

"""Derived seeds."""

import torch

from cifar_ignite.data.seeding import (
    FLIP_MASK,
    INITIAL_WEIGHTS,
    ITERATION,
    ORDER,
    RANK,
    derive_seed,
    seed_generators,
)


def test_derived_seeds_differ_by_seed_purpose_and_index():
    seeds = {
        derive_seed(seed, purpose, index) for seed in range(5) for purpose in (ORDER, ITERATION) for index in range(99)
    }
    assert len(seeds) == 5 * 2 * 99
    assert derive_seed(0, RANK, 3, 0) != derive_seed(0, RANK, 3, 1)


def test_derived_seeds_stay_the_same_between_versions():
    """Another value would change every run and make old checkpoints resume differently."""
    assert (ORDER, ITERATION, INITIAL_WEIGHTS, FLIP_MASK, RANK) == (0, 1, 2, 3, 4)
    assert derive_seed(0, INITIAL_WEIGHTS) == 17195319236771816063
    assert derive_seed(7, RANK, 5, 1) == 4990212653544736142


def test_seed_generators_repeats_random_numbers():
    seed_generators(5, torch.device("cpu"))
    first = torch.rand(3)
    seed_generators(5, torch.device("cpu"))
    assert torch.equal(torch.rand(3), first)


def test_seed_generators_seeds_mps_only_on_mps(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.mps, "manual_seed", seeds.append)
    seed_generators(5, torch.device("cpu"))
    assert seeds == []
    seed_generators(6, torch.device("mps"))
    assert seeds == [6]

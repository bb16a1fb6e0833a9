"""Batches: complete, and a function of (seed, iteration) alone."""

import torch

from cifar_ignite.augment import create_augment
from cifar_ignite.config import AugmentConfig
from cifar_ignite.loader import ITERATION, ORDER, EvalLoader, TrainLoader, derive_seed

IMAGES = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(50)


def identity(images, labels, epoch, mirrored):
    return images, labels


def loader(augment=identity, seed=0, batch_size=16):
    return TrainLoader(IMAGES, LABELS, batch_size=batch_size, seed=seed, augment=augment)


def test_every_image_is_seen_exactly_once_an_epoch():
    batches = loader()
    assert len(batches) == 4
    orders = []
    for _ in range(3):
        epoch = [labels for _, labels in batches]
        assert [len(labels) for labels in epoch] == [16, 16, 16, 2]
        orders.append(torch.cat(epoch))
        assert torch.equal(orders[-1].sort().values, LABELS)
    assert not torch.equal(orders[0], orders[1])
    assert batches.iteration == 12


def test_images_and_labels_stay_together():
    for images, labels in loader():
        assert torch.equal(images, IMAGES[labels])


def test_a_loader_set_to_any_iteration_continues_as_if_never_stopped():
    augment = create_augment(AugmentConfig(crop_padding=4, flip_mode="alternating"), 50, 3)
    straight = loader(augment)
    expected = [batch for _ in range(3) for batch in straight]
    noise = [torch.rand(3) for _ in range(3)]
    assert noise
    for start in (0, 1, 3, 4, 7, 11):
        resumed = loader(augment)
        resumed.iteration = start
        torch.rand(17)  # history must not matter
        got = [batch for _ in range(3 - start // 4) for batch in resumed]
        assert len(got) == 12 - start
        for (images, targets), (want_images, want_targets) in zip(got, expected[start:], strict=True):
            assert torch.equal(images, want_images)
            assert torch.equal(targets, want_targets)


def test_what_follows_a_batch_draws_the_same_numbers_too():
    """Dropout and stochastic depth draw from the global generators after the batch is made."""

    def draws(start):
        batches = loader(create_augment(AugmentConfig(), 50, 3))
        batches.iteration = start
        return [torch.rand(2) for _ in batches]

    assert torch.equal(torch.stack(draws(0)[2:]), torch.stack(draws(2)))


def test_each_image_is_mirrored_in_every_other_epoch():
    def turns(start=0, seed=0):
        batches = loader(lambda images, labels, epoch, mirrored: (labels, mirrored), seed=seed)
        batches.iteration = start * len(batches)
        rows = []
        for _ in range(start, 4):
            labels, mirrored = (torch.cat(parts) for parts in zip(*batches, strict=True))
            rows.append(mirrored[labels.argsort()])
        return torch.stack(rows)

    seen = turns()
    assert torch.equal(seen[0], ~seen[1])
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert 10 < seen[0].sum() < 40
    assert torch.equal(turns(start=3)[0], seen[3])
    assert not torch.equal(turns(seed=1)[0], seen[0])


def test_the_epoch_is_told():
    batches = loader(lambda images, labels, epoch, mirrored: (epoch, None))
    assert [[epoch for epoch, _ in batches] for _ in range(3)] == [[0] * 4, [1] * 4, [2] * 4]


def test_seeds_give_different_streams():
    assert not torch.equal(loader(seed=0).order(0), loader(seed=1).order(0))
    seeds = {
        derive_seed(seed, purpose, index) for seed in range(5) for purpose in (ORDER, ITERATION) for index in range(99)
    }
    assert len(seeds) == 5 * 2 * 99


def test_the_eval_loader_normalises_in_order():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    batches = list(EvalLoader(IMAGES, LABELS, batch_size=20, mean=mean, std=std))
    assert [len(labels) for _, labels in batches] == [20, 20, 10]
    assert torch.equal(torch.cat([labels for _, labels in batches]), LABELS)
    shape = (1, 3, 1, 1)
    expected = (IMAGES / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    assert torch.allclose(torch.cat([images for images, _ in batches]), expected, atol=1e-6)
    assert all(labels is None for _, labels in EvalLoader(IMAGES, None, batch_size=20, mean=mean, std=std))

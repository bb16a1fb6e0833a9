"""Batches: complete, a function of (seed, iteration) alone, and the same for every number of ranks."""

import ignite.distributed as idist
import pytest
import torch

from cifar_ignite.augment.pipeline import create_train_transform
from cifar_ignite.config import AugmentConfig
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.data.loaders import EvalLoader, Shard, TrainLoader, create_loaders, shard_slice
from cifar_ignite.errors import InputError

CPU = torch.device("cpu")
AUGMENT = AugmentConfig(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def random_dataset(count, num_classes):
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    names = tuple(str(label) for label in range(num_classes))
    return ImageDataset(images, torch.arange(count) % num_classes, list(range(count)), names)


# Every image has its own label, so that labels identify images.
DISTINCT = random_dataset(50, 50)
CLASSES = random_dataset(90, 10)


def identity(images, labels, epoch, flip_mask):
    return images, labels


def create_loader(transform=identity, seed=0):
    return TrainLoader(DISTINCT, batch_size=16, seed=seed, transform=transform)


# --- Training -----------------------------------------------------------------------------------------------------


def test_train_loader_returns_every_image_once_per_epoch():
    loader = create_loader()
    assert len(loader) == 4
    orders = []
    for _ in range(3):
        epoch = [labels for _, labels in loader]
        assert [len(labels) for labels in epoch] == [16, 16, 16, 2]
        orders.append(torch.cat(epoch))
        assert torch.equal(orders[-1].sort().values, DISTINCT.labels)
    assert not torch.equal(orders[0], orders[1])
    assert loader.iteration == 12


def test_train_loader_keeps_images_and_labels_together():
    for images, labels in create_loader():
        assert torch.equal(images, DISTINCT.images[labels])


def test_train_loader_set_to_any_iteration_continues_bit_identically():
    transform = create_train_transform(AugmentConfig(crop_padding=4, flip_mode="alternating"), 50, 3)
    uninterrupted = create_loader(transform)
    expected = [batch for _ in range(3) for batch in uninterrupted]
    for start in (0, 1, 3, 4, 7, 11):
        resumed = create_loader(transform)
        resumed.iteration = start
        torch.rand(17)  # the state of the generators must not matter
        batches = [batch for _ in range(3 - start // 4) for batch in resumed]
        assert len(batches) == 12 - start
        for (images, targets), (expected_images, expected_targets) in zip(batches, expected[start:], strict=True):
            assert torch.equal(images, expected_images)
            assert torch.equal(targets, expected_targets)


def test_peek_returns_next_batch_and_changes_nothing():
    transform = create_train_transform(AugmentConfig(), 50, 3)
    expected = list(create_loader(transform))
    loader = create_loader(transform)
    for images, targets in expected:
        for batch in (loader.peek(), next(iter(loader))):
            assert torch.equal(batch[0], images)
            assert torch.equal(batch[1], targets)
    assert loader.iteration == 4


def test_train_loader_repeats_random_numbers_drawn_after_batch():
    """Dropout and stochastic depth draw from the global generators after the batch is made."""

    def draws(start):
        loader = create_loader(create_train_transform(AugmentConfig(), 50, 3))
        loader.iteration = start
        return [torch.rand(2) for _ in loader]

    assert torch.equal(torch.stack(draws(0)[2:]), torch.stack(draws(2)))


def test_flip_mask_alternates_between_epochs_for_each_image():
    def flip_masks(start=0, seed=0):
        loader = create_loader(lambda images, labels, epoch, flip_mask: (labels, flip_mask), seed=seed)
        loader.iteration = start * len(loader)
        epochs = []
        for _ in range(start, 4):
            labels, mask = (torch.cat(columns) for columns in zip(*loader, strict=True))
            epochs.append(mask[labels.argsort()])
        return torch.stack(epochs)

    masks = flip_masks()
    assert torch.equal(masks[0], ~masks[1])
    assert torch.equal(masks[0], masks[2])
    assert torch.equal(masks[1], masks[3])
    assert 10 < masks[0].sum() < 40
    assert torch.equal(flip_masks(start=3)[0], masks[3])
    assert not torch.equal(flip_masks(seed=1)[0], masks[0])


def test_train_loader_passes_epoch_to_transform():
    epochs = []

    def transform(images, labels, epoch, flip_mask):
        epochs.append(epoch)
        return images, labels

    loader = create_loader(transform)
    for _ in range(3):
        list(loader)
    assert epochs == [0] * 4 + [1] * 4 + [2] * 4


def test_epoch_permutation_depends_on_seed():
    assert not torch.equal(create_loader(seed=0).epoch_permutation(0), create_loader(seed=1).epoch_permutation(0))


# --- Evaluation ---------------------------------------------------------------------------------------------------


def test_eval_loader_normalizes_in_order():
    batches = list(EvalLoader(DISTINCT, batch_size=20, augment=AUGMENT))
    assert [len(labels) for _, labels in batches] == [20, 20, 10]
    assert torch.equal(torch.cat([labels for _, labels in batches]), DISTINCT.labels)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (AUGMENT.mean, AUGMENT.std))
    expected = (DISTINCT.images / 255 - mean) / std
    assert torch.allclose(torch.cat([images for images, _ in batches]), expected, atol=1e-6)
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in batches)


def test_eval_loader_of_unlabeled_dataset_yields_none_as_labels():
    unlabeled = ImageDataset(DISTINCT.images, None, DISTINCT.ids, DISTINCT.class_names)
    assert all(labels is None for _, labels in EvalLoader(unlabeled, batch_size=20, augment=AUGMENT))


# --- Shards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shards_cover_batch_and_differ_by_at_most_one_image(world_size):
    for count in range(20):
        shards = [range(count)[shard_slice(count, Shard(rank, world_size))] for rank in range(world_size)]
        assert [row for shard in shards for row in shard] == list(range(count))
        sizes = [len(shard) for shard in shards]
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)


def create_sharded(shard, batch_size=16, **augment):
    transform = create_train_transform(AugmentConfig(**augment), 10, 2)
    return TrainLoader(CLASSES, batch_size=batch_size, seed=5, transform=transform, shard=shard)


@pytest.mark.parametrize(
    ("world_size", "batch_size", "augment"),
    [
        (2, 16, {}),  # the last batch has 10 images
        (2, 15, {"cutmix_p": 1.0}),
        (3, 89, {"cutmix_p": 0.0, "mixup_p": 1.0}),  # the last batch has 1 image
        (4, 22, {"trivial_augment": "wide", "crop_padding": 4, "flip_mode": "alternating", "cutout_size": 8}),
    ],
)
def test_shards_of_all_ranks_form_global_batch_bit_identically(world_size, batch_size, augment):
    """Over two epochs, with uneven last batches and images that are mixed with their neighbors."""
    single = create_sharded(Shard(), batch_size, **augment)
    expected = [batch for _ in range(2) for batch in single]
    assert single.loss_scale == 1
    loaders = [create_sharded(Shard(rank, world_size), batch_size, **augment) for rank in range(world_size)]
    by_rank = [[(*batch, loader.loss_scale) for _ in range(2) for batch in loader] for loader in loaders]
    assert len(expected) == 2 * len(single)
    for (images, targets), *shards in zip(expected, *by_rank, strict=True):
        assert torch.equal(torch.cat([shard[0] for shard in shards]), images)
        assert torch.equal(torch.cat([shard[1] for shard in shards]), targets)
        scales = [shard[2] for shard in shards]
        assert scales == pytest.approx([len(shard[0]) * world_size / len(images) for shard in shards])
        assert sum(scales) == pytest.approx(world_size)


def test_random_numbers_drawn_after_batch_differ_between_ranks_and_repeat():
    def draws(rank):
        return torch.stack([torch.rand(3) for _ in create_sharded(Shard(rank, 2))])

    rank_0, rank_1 = draws(0), draws(1)
    assert not torch.eq(rank_0, rank_1).any()
    assert len(rank_0.flatten().unique()) == rank_0.numel()
    assert torch.equal(rank_0, draws(0))
    resumed = create_sharded(Shard(1, 2))
    resumed.iteration = 3
    assert torch.equal(torch.stack([torch.rand(3) for _ in resumed]), rank_1[3:])


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_take_turns_at_complete_evaluation_batches(world_size):
    expected = list(EvalLoader(CLASSES, batch_size=20, augment=AUGMENT))
    loaders = [
        EvalLoader(CLASSES, batch_size=20, augment=AUGMENT, shard=Shard(rank, world_size)) for rank in range(world_size)
    ]
    assert {len(loader) for loader in loaders} == {-(-5 // world_size)}
    batches = [batch for turn in zip(*loaders, strict=True) for batch in turn]
    assert all(len(images) == 0 for images, _ in batches[5:])
    for (images, labels), (expected_images, expected_labels) in zip(batches[:5], expected, strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)


# --- From the configuration ---------------------------------------------------------------------------------------


def set_world(monkeypatch, rank, world_size):
    monkeypatch.setattr(idist, "get_rank", lambda: rank)
    monkeypatch.setattr(idist, "get_world_size", lambda: world_size)


def test_create_loaders_uses_configuration_classes_and_current_shard(tiny_config, monkeypatch):
    set_world(monkeypatch, 1, 3)
    config = tiny_config(seed=8, augment={"cutmix_p": 1.0})
    train_loader, val_loader = create_loaders(config, DISTINCT, CLASSES, CPU)
    assert train_loader.shard == val_loader.shard == Shard(1, 3)
    assert (train_loader.batch_size, train_loader.seed, val_loader.batch_size) == (32, 8, 32)
    images, targets = next(iter(train_loader))
    assert images.shape == (11, 3, 32, 32)
    assert targets.shape == (11, DISTINCT.num_classes)
    assert torch.equal(val_loader.labels, CLASSES.labels)


def test_create_loaders_without_validation_images_has_no_validation_loader(tiny_config):
    train_loader, val_loader = create_loaders(tiny_config(), DISTINCT, random_dataset(0, 50), CPU)
    assert val_loader is None
    assert train_loader.shard == Shard(0, 1)


def test_create_loaders_with_batch_smaller_than_world_size_names_key(tiny_config, monkeypatch):
    set_world(monkeypatch, 0, 8)
    with pytest.raises(InputError, match=r"data\.batch_size: 4 .* 8 processes; use at least 8"):
        create_loaders(tiny_config(data={"batch_size": 4}), DISTINCT, CLASSES, CPU)
    create_loaders(tiny_config(data={"batch_size": 8}), DISTINCT, CLASSES, CPU)

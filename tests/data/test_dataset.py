"""The dataset class and the validation split."""

import hashlib
from dataclasses import replace

import pytest
import torch

from cifar_ignite.data.dataset import ImageDataset, stratified_split, train_val_split
from cifar_ignite.errors import InputError


def dataset(count=40, num_classes=4):
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)
    names = tuple(f"class {label}" for label in range(num_classes))
    return ImageDataset(images, torch.arange(count) % num_classes, list(range(count)), names)


def test_dataset_reports_length_and_classes_and_moves_to_device():
    labeled = dataset()
    assert len(labeled) == 40
    assert labeled.num_classes == 4
    moved = labeled.to(torch.device("meta"))
    assert moved.images.device.type == moved.labels.device.type == "meta"
    assert (moved.ids, moved.class_names) == (labeled.ids, labeled.class_names)
    unlabeled = ImageDataset(labeled.images, None, labeled.ids, labeled.class_names)
    assert unlabeled.to(torch.device("meta")).labels is None


def test_train_val_split_keeps_images_labels_and_ids_together():
    train, val = train_val_split(dataset(), val_size=12, seed=1)
    assert (len(train), len(val)) == (28, 12)
    assert sorted(train.ids + val.ids) == list(range(40))
    for subset in (train, val):
        assert subset.num_classes == 4
        assert subset.images[:, 0, 0, 0].tolist() == subset.ids
        assert subset.labels.tolist() == [id_ % 4 for id_ in subset.ids]
    assert torch.bincount(val.labels).tolist() == [3] * 4


def test_train_val_split_without_size_takes_a_tenth():
    train, val = train_val_split(dataset(), val_size=None, seed=1)
    assert (len(train), len(val)) == (36, 4)


@pytest.mark.parametrize(("val_size", "expected"), [(None, 7), (12, 7), (0, 0)])
def test_train_val_split_returns_validation_images_of_the_dataset(val_size, expected):
    labeled = replace(dataset(), val=dataset(7))
    train, val = train_val_split(labeled, val_size, seed=1)
    assert (len(train), len(val)) == (40, expected)
    assert train.val is None


def test_train_val_split_keeps_a_training_image_of_rare_classes():
    labels = torch.tensor([0] * 30 + [1] * 8 + [2, 3])
    rare = replace(dataset(), labels=labels)
    for val_size in (0, 1, 20, 35, 36):
        train, val = train_val_split(rare, val_size=val_size, seed=1)
        assert len(val) == val_size
        assert train.class_counts[2:] == [1, 1]
        assert min(train.class_counts) == 1
    with pytest.raises(InputError, match=r"data\.val_size: .* at most 36"):
        train_val_split(rare, val_size=37, seed=1)


def test_fingerprint_depends_on_images_labels_and_class_names():
    labeled = dataset()
    changes = [
        {"images": labeled.images.flip(0)},
        {"labels": labeled.labels.flip(0)},
        {"labels": None},
        {"class_names": labeled.class_names[::-1]},
    ]
    fingerprints = [labeled.fingerprint, *(replace(labeled, **change).fingerprint for change in changes)]
    assert len(set(fingerprints)) == 5
    assert replace(dataset(), ids=["x"] * 40).fingerprint == labeled.fingerprint


def test_train_val_split_with_size_0_leaves_validation_empty():
    train, val = train_val_split(dataset(), val_size=0, seed=1)
    assert (len(train), len(val)) == (40, 0)


@pytest.mark.parametrize("val_size", [0, 1, 7, 100, 333])
def test_stratified_split_is_disjoint_complete_and_proportional(val_size):
    labels = torch.randint(0, 10, (1000,), generator=torch.Generator().manual_seed(0))
    train, val = stratified_split(labels, 10, val_size, seed=3)
    assert len(val) == val_size
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(1000))
    exact = torch.bincount(labels, minlength=10) * val_size / 1000
    assert ((torch.bincount(labels[val], minlength=10) - exact).abs() <= 1).all()


def test_stratified_split_of_balanced_labels_is_exact_and_seeded():
    labels = torch.arange(50_000) % 10
    train, val = stratified_split(labels, 10, 5000, seed=0)
    assert torch.bincount(labels[val]).tolist() == [500] * 10
    assert torch.equal(val, stratified_split(labels, 10, 5000, seed=0)[1])
    assert not torch.equal(val, stratified_split(labels, 10, 5000, seed=1)[1])
    assert len(train) == 45_000


@pytest.mark.parametrize(
    ("counts", "val_size", "expected"),
    [((5, 1, 4), 1, [1, 0, 0]), ((1, 1, 2), 1, [0, 0, 1]), ((3, 1, 1, 9), 5, [1, 0, 0, 4]), ((2, 0, 2), 2, [1, 0, 1])],
)
def test_stratified_split_gives_the_share_of_rare_classes_to_others(counts, val_size, expected):
    labels = torch.repeat_interleave(torch.tensor(counts))
    for seed in range(3):
        train, val = stratified_split(labels, len(counts), val_size, seed)
        assert torch.bincount(labels[val], minlength=len(counts)).tolist() == expected
        assert torch.bincount(labels[train], minlength=len(counts)).bool().tolist() == [count > 0 for count in counts]


def test_stratified_split_of_no_images_is_empty():
    assert [len(rows) for rows in stratified_split(torch.empty(0, dtype=torch.long), 2, 0, seed=0)] == [0, 0]


def test_stratified_split_without_rare_classes_never_changes():
    """Another split would make models of CIFAR-10 incomparable, and runs impossible to resume."""
    for labels, expected in (
        (torch.arange(50_000) % 10, "e9de51dcca089a3f"),
        (torch.arange(1000) ** 2 % 7, "5a80986b0790826d"),
    ):
        val = stratified_split(labels, 10, len(labels) // 10, seed=0)[1]
        assert hashlib.sha256(val.numpy().tobytes()).hexdigest().startswith(expected)


def test_stratified_split_that_leaves_too_few_images_is_refused():
    labels = torch.arange(20) % 10
    with pytest.raises(InputError, match=r"data\.val_size.* at most 10"):
        stratified_split(labels, 10, 15, seed=0)
    assert len(stratified_split(labels, 10, 10, seed=0)[0]) == 10

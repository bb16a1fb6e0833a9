"""What a dataset contains: counts, sizes, duplicates."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_ignite.config import DataConfig
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.data.inspection import describe_duplicates, find_duplicates, inspect_dataset, read_sizes
from tests.helpers.images import write_photos


@pytest.fixture
def root(tmp_path):
    return write_photos(tmp_path / "photos", {"train": 10, "test": 4})


def inspect(root, **options):
    return inspect_dataset(DataConfig(dataset="folder", root=root, **options))


def test_inspect_dataset_counts_images_per_class_and_split(root):
    report = inspect(root, val_size=3)
    assert report.class_table.to_dict("list") == {"train": [9, 9, 9], "val": [1, 1, 1], "test": [4, 4, 4]}
    assert report.class_table.index.tolist() == ["cat", "dog", "fish"]
    assert report.describe().startswith("3 classes; 27 train images (9 cat, 9 dog, 9 fish); 3 val images")
    assert report.missing_test == ""
    assert not any(report.num_unreadable.values())


def test_inspect_dataset_counts_unreadable_files_of_each_split(root):
    shutil.copytree(root / "test", root / "val")
    for name in ("train/cat/a.txt", "val/dog/b.txt", "val/dog/c.txt", "test/fish/d.txt"):
        (root / name).write_text("no image")
    report = inspect(root)
    assert report.num_unreadable == {"train": 1, "val": 2, "test": 1}
    assert report.class_table["val"].tolist() == [4, 4, 4]
    assert len(report.sizes) == 54


def test_inspect_dataset_lists_each_split_once(root, caplog):
    (root / "train" / "cat" / ".DS_Store").touch()
    (root / "test" / "cat" / ".DS_Store").touch()
    with caplog.at_level("INFO", "cifar_ignite"):
        inspect(root)
    messages = [record.message for record in caplog.records if "skipped" in record.message]
    assert len(messages) == len(set(messages)) == 2


def test_inspect_dataset_with_missing_or_unlabeled_test_set(root):
    shutil.rmtree(root / "test" / "dog")
    shutil.rmtree(root / "test" / "fish")
    shutil.copytree(root / "test" / "cat", root / "test", dirs_exist_ok=True)
    shutil.rmtree(root / "test" / "cat")
    report = inspect(root)
    assert list(report.class_table.columns) == ["train", "val"]
    assert "4 test images (unlabeled)" in report.describe()
    shutil.rmtree(root / "test")
    assert "no such directory" in inspect(root).missing_test


def test_inspect_dataset_without_files_has_no_sizes(cifar_root):
    report = inspect_dataset(DataConfig(root=cifar_root))
    assert report.sizes.shape == (0, 2)
    assert report.class_table.sum().tolist() == [108, 12, 30]


def test_read_sizes_skips_what_is_no_image(tmp_path):
    for name, size in (("a.png", (40, 50)), ("b.png", (60, 20))):
        Image.new("RGB", size).save(tmp_path / name)
    (tmp_path / "c.png").write_text("x")
    sizes = read_sizes(sorted(tmp_path.iterdir()))
    assert sizes.tolist() == [[40, 50], [60, 20]]


def test_report_describes_sizes(root):
    report = inspect(root)
    smallest, median, largest = (np.quantile(report.sizes, q, axis=0).astype(int) for q in (0, 0.5, 1))
    text = report.describe_sizes(100)
    for name, (width, height) in (("smallest", smallest), ("median", median), ("largest", largest)):
        assert f"{name} {width}x{height}" in text
    num_small = sum(min(size) < 100 for size in report.sizes.tolist())
    assert f"{num_small} of 42 are smaller than data.image_size=100" in text


# --- Duplicates ---------------------------------------------------------------------------------------------------


def images_of(*values, labels=None):
    """Return a dataset of images of one value each."""
    images = torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    labels = None if labels is None else torch.tensor(labels)
    return ImageDataset(images, labels, [f"{value}.png" for value in values], ("a", "b"))


def test_duplicates_between_splits_are_reported():
    splits = {
        "train": images_of(1, 2, 3, 2, labels=[0, 1, 0, 1]),
        "val": images_of(4, 2, labels=[0, 1]),
        "test": images_of(3, 5, 4),
    }
    groups = find_duplicates(splits)
    assert [[str(item) for item in group] for group in groups] == [
        ["train/2.png", "train/2.png", "val/2.png"], ["train/3.png", "test/3.png"], ["val/4.png", "test/4.png"]
    ]  # fmt: skip
    lines = list(describe_duplicates(groups))
    assert [line.partition(" (")[0] for line in lines] == [
        "1 images of val are in train too", "1 images of test are in train too", "1 images of test are in val too"
    ]  # fmt: skip


def test_duplicates_with_different_labels_are_reported():
    (line,) = describe_duplicates(find_duplicates({"train": images_of(7, 7, 8, labels=[0, 1, 1])}))
    assert line == "1 images have different labels in different places (train/7.png = train/7.png)"


def test_harmless_duplicates_are_not_reported():
    assert list(describe_duplicates(find_duplicates({"train": images_of(7, 7, labels=[1, 1])}))) == []
    assert find_duplicates({"train": images_of(1, 2, labels=[0, 1]), "test": images_of(3)}) == []

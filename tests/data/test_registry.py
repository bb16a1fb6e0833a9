"""The dataset registry."""

import pytest
import torch
from PIL import Image

from cifar_ignite.config import DataConfig
from cifar_ignite.data import DATASETS, load_dataset, register_dataset
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.data.file_dataset import ImageFiles
from cifar_ignite.errors import InputError
from tests.helpers.images import smooth_image


def test_load_dataset_with_unknown_name_lists_known_ones():
    with pytest.raises(InputError, match=r"data\.dataset: .*'imagenet'.* cifar10, cifar100, folder, synthetic"):
        load_dataset(DataConfig(dataset="imagenet"), train=True)


def test_register_dataset_refuses_taken_name():
    def synthetic(config, *, train):
        raise AssertionError

    with pytest.raises(ValueError, match="already registered"):
        register_dataset(synthetic)


def test_registered_function_is_loaded_by_its_name(monkeypatch, tmp_path):
    monkeypatch.setattr("cifar_ignite.data.registry.DATASETS", dict(DATASETS))

    @register_dataset
    def black(config, *, train):
        count = 6 if train else 4
        images = torch.zeros(count, 3, 32, 32, dtype=torch.uint8)
        return ImageDataset(images, torch.arange(count) % 2, [str(config.root)] * count, ("dark", "darker"))

    config = DataConfig(dataset="black", root=tmp_path)
    train, test = (load_dataset(config, train=train) for train in (True, False))
    assert (len(train), len(test)) == (6, 4)
    assert train.num_classes == 2
    assert train.ids[0] == str(tmp_path)


def test_registered_function_may_list_files(monkeypatch, tmp_path):
    """As in CONTRIBUTING.md."""
    monkeypatch.setattr("cifar_ignite.data.registry.DATASETS", dict(DATASETS))

    @register_dataset
    def my_photos(config, *, train):
        directory = config.root / ("train" if train else "test")
        files = sorted(directory.iterdir())
        labels = [int(file.name.startswith("dog")) for file in files]
        return ImageFiles(directory, files, labels, [file.name for file in files], ("cat", "dog"))

    (tmp_path / "train").mkdir()
    for name in ("dog_1", "cat_1", "dog_2"):
        Image.fromarray(smooth_image(40, 60)).save(tmp_path / "train" / f"{name}.png")
    dataset = load_dataset(DataConfig(dataset="my_photos", root=tmp_path, image_size=16), train=True)
    assert dataset.images.shape == (3, 3, 16, 16)
    assert dataset.labels.tolist() == [0, 1, 1]
    assert dataset.ids == ["cat_1.png", "dog_1.png", "dog_2.png"]


def test_error_of_registered_function_reaches_the_caller(monkeypatch):
    monkeypatch.setattr("cifar_ignite.data.registry.DATASETS", dict(DATASETS))

    @register_dataset
    def broken(config, *, train):
        raise InputError("data.root: not there")

    with pytest.raises(InputError, match=r"^data\.root: not there$"):
        load_dataset(DataConfig(dataset="broken"), train=True)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 64, 64), r"data\.image_size: large has images of 64 pixels; use 64"),
        ((3, 64, 48), r"data\.dataset: large .*\(3, 64, 48\).*\(3, size, size\)"),
        ((1, 32, 32), r"data\.dataset: large .*\(1, 32, 32\)"),
    ],
)
def test_load_dataset_with_images_of_another_shape_is_refused(monkeypatch, shape, message):
    monkeypatch.setattr("cifar_ignite.data.registry.DATASETS", dict(DATASETS))

    @register_dataset
    def large(config, *, train):
        return ImageDataset(torch.zeros(2, *shape, dtype=torch.uint8), torch.arange(2), [0, 1], ("a", "b"))

    with pytest.raises(InputError, match=message):
        load_dataset(DataConfig(dataset="large"), train=True)

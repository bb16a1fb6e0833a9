"""Your own images: layouts, order, labels, unreadable files, memory."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from cifar_ignite.config import DataConfig
from cifar_ignite.data import memory
from cifar_ignite.data.dataset import train_val_split
from cifar_ignite.data.folder import natural_key
from cifar_ignite.data.registry import load_dataset
from cifar_ignite.errors import InputError
from tests.helpers import posix_only
from tests.helpers.images import load_image, save_photo, smooth_image, write_photos


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), {"train": 10, "test": 4})


@pytest.fixture
def root(photos, tmp_path):
    """A copy of the photos, which are drawn once."""
    return shutil.copytree(photos, tmp_path / "photos")


def load(root, *, train=True, **options):
    return load_dataset(DataConfig(dataset="folder", root=root, **options), train=train)


def write_kaggle(root, count=12):
    """Write train/1.png ... and trainLabels.csv in another order, and an unlabeled test set."""
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
        for index in range(1, count + 1):
            Image.fromarray(np.full((32, 32, 3), index, np.uint8)).save(root / split / f"{index}.png")
    rows = [f"{index},{'cat' if index % 2 else 'dog'}" for index in range(count, 0, -1)]
    (root / "trainLabels.csv").write_text("\n".join(["id,label", *rows, ""]))
    return root


# --- Layouts ------------------------------------------------------------------------------------------------------


def test_folder_reads_photos_of_all_kinds_at_the_configured_size(root):
    dataset = load(root, image_size=48)
    assert dataset.images.shape == (30, 3, 48, 48)
    assert dataset.images.dtype == torch.uint8
    assert dataset.class_names == ("cat", "dog", "fish")
    assert dataset.class_counts == [10, 10, 10]
    assert dataset.ids[:4] == ["cat/000.jpg", "dog/000.jpg", "fish/000.jpg", "cat/001.jpg"]
    for row in range(0, 30, 7):
        assert torch.equal(load(root).images[row], load_image(root / "train" / dataset.ids[row]))


def test_folder_has_the_classes_of_image_folder(root):
    """The labels are those of torchvision's ImageFolder."""
    (root / "train" / "Zebra").mkdir()
    shutil.copy(root / "train" / "cat" / "000.jpg", root / "train" / "Zebra")
    for path in (root / "train").rglob("*.gif"):  # ImageFolder selects files by their extension, without this one
        path.unlink()
    reference = ImageFolder(root / "train")
    dataset = load(root)
    assert list(dataset.class_names) == reference.classes
    labels = {
        f"{name}/{path.rpartition('/')[2]}": label
        for path, label in reference.samples
        for name in [reference.classes[label]]
    }
    assert dict(zip(dataset.ids, dataset.labels.tolist(), strict=True)) == labels


def test_folder_of_cifar_images_equals_official_files(tmp_path, cifar_root):
    """Numbered over the split, the images come in the order of the official files."""
    for train in (True, False):
        official = load_dataset(DataConfig(root=cifar_root), train=train)
        for index, (image, label) in enumerate(zip(official.images, official.labels.tolist(), strict=True)):
            directory = tmp_path / "png" / ("train" if train else "test") / official.class_names[label]
            directory.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(directory / f"{index}.png")
        assert load(tmp_path / "png", train=train).fingerprint == official.fingerprint


def test_folder_uses_validation_directory_instead_of_random_split(root):
    shutil.copytree(root / "test", root / "val")
    dataset = load(root)
    assert dataset.val is not None
    assert dataset.val.fingerprint == load(root, train=False).fingerprint
    train_set, val_set = train_val_split(dataset, None, 0)
    assert (len(train_set), len(val_set)) == (30, 12)


def test_folder_test_set_without_class_directories_is_unlabeled(root):
    shutil.rmtree(root / "test")
    (root / "test").mkdir()
    for index in (10, 9, 2):
        save_photo(Image.fromarray(smooth_image(50, 60)), root / "test" / f"{index}", index)
    dataset = load(root, train=False)
    assert dataset.labels is None
    assert dataset.ids == ["2", "9", "10"]
    assert dataset.class_names == ("cat", "dog", "fish")


def test_folder_test_set_may_lack_classes_and_training_images(root):
    shutil.rmtree(root / "test" / "dog")
    dataset = load(root, train=False)
    assert dataset.class_names == ("cat", "dog", "fish")
    assert dataset.class_counts == [4, 0, 4]
    shutil.rmtree(root / "train")
    assert load(root, train=False).class_names == ("cat", "fish")


def test_folder_with_class_directories_warns_that_csv_is_not_read(root, caplog):
    (root / "train.csv").write_text("id,label\n0.png,cat")
    assert load(root).class_names == ("cat", "dog", "fish")
    (message,) = caplog.messages
    assert str(root / "train.csv") in message


def test_folder_ignores_hidden_and_system_files(root):
    (root / "train" / ".cache").mkdir()
    (root / "train" / "__MACOSX").mkdir()
    (root / "train" / "cat" / "Thumbs.db").touch()
    assert len(load(root)) == 30


@pytest.mark.parametrize("name", ["trainLabels.csv", "train_labels.csv", "train.csv", "labels.csv"])
@pytest.mark.parametrize("suffix", ["", ".png"])
def test_folder_reads_labels_from_csv(tmp_path, name, suffix):
    root = write_kaggle(tmp_path / "kaggle")
    text = (root / "trainLabels.csv").read_text().replace(",cat", f"{suffix},cat").replace(",dog", f"{suffix},dog")
    (root / "trainLabels.csv").unlink()
    (root / name).write_text(text)
    dataset = load(root)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.images[:, 0, 0, 0].tolist() == list(range(1, 13))
    assert dataset.labels.tolist() == [0, 1] * 6
    test = load(root, train=False)
    assert test.labels is None
    assert test.ids == [str(index) for index in range(1, 13)]
    (root / "testLabels.csv").write_text(text)
    assert load(root, train=False).labels.tolist() == dataset.labels.tolist()


def test_natural_key_orders_numbers_by_value(tmp_path):
    names = ["img_2.png", "img_10.png", "img_010.png", "a/1.png", "b.png", "1.png", "²³.png"]
    paths = sorted((tmp_path / name for name in names), key=lambda path: natural_key(path.relative_to(tmp_path)))
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "1.png", "a/1.png", "b.png", "img_2.png", "img_010.png", "img_10.png", "²³.png"
    ]  # fmt: skip


# --- Invalid input ------------------------------------------------------------------------------------------------


def remove_train(root):
    shutil.rmtree(root / "train")
    shutil.rmtree(root / "test")


def file_as_root(root):
    shutil.rmtree(root)
    root.touch()


def empty_train(root):
    shutil.rmtree(root / "train")
    (root / "train").mkdir()


def empty_class(root):
    (root / "train" / "bird").mkdir()


def one_class(root):
    for name in ("dog", "fish"):
        shutil.rmtree(root / "train" / name)


def reserved_class(root):
    (root / "train" / "cat").rename(root / "train" / "true")


def reserved_class_of_predict(root):
    (root / "train" / "cat").rename(root / "train" / "unsure")


def unreadable_file(root):
    (root / "train" / "dog" / "notes.txt").write_text("no image")


def unprintable_class(root):
    (root / "train" / "cat").rename(root / "train" / "c\nt")


def other_class_in_val(root):
    shutil.copytree(root / "test", root / "val")
    (root / "val" / "cat").rename(root / "val" / "lion")


def unlabeled_test_alone(root):
    shutil.rmtree(root / "train")
    shutil.move(root / "test" / "cat", root / "images")
    shutil.rmtree(root / "test")
    (root / "images").rename(root / "test")


def unlabeled_val(root):
    shutil.copytree(root / "test" / "cat", root / "val")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unlabeled_val, r"val: no class directories, and no valLabels\.csv; validation requires labels"),
        (remove_train, r"photos: no directory train \(.*contains nothing\); put the images into"),
        (shutil.rmtree, r"photos: no directory train \(.*does not exist\)"),
        (file_as_root, r"photos: no directory train \(.*is not a directory\)"),
        (unlabeled_test_alone, r"photos: no directory train, .*make predict IMAGES="),
        (empty_train, r"train: no class directories, and no trainLabels\.csv"),
        (empty_class, r"train/bird: no images.*every class directory must contain images"),
        (one_class, r"data\.dataset: folder has one class only \(cat\)"),
        (reserved_class, r"data\.dataset: a class is named true"),
        (reserved_class_of_predict, r"data\.dataset: a class is named unsure"),
        (unreadable_file, r"train: 1 of 31 files are unreadable, such as notes\.txt .*data\.max_unreadable=1"),
        pytest.param(unprintable_class, r"a class name cannot be printed \(c\?t\)", marks=posix_only),
        (other_class_in_val, r"val: lion is no class of the training images \(cat, dog, fish\)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_folder_that_cannot_be_trained_on_is_refused(root, change, message):
    change(root)
    with pytest.raises(InputError, match=message) as raised:
        load(root)
    assert "\n" not in str(raised.value)


def other_class(root):
    (root / "test" / "cat").rename(root / "test" / "lion")


def no_test(root):
    shutil.rmtree(root / "test")


def file_as_test(root):
    shutil.rmtree(root / "test")
    (root / "test").touch()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_class, r"test: lion is no class of the training images \(cat, dog, fish\); .*unlabeled"),
        (no_test, r"test: no such directory \(.*contains train\)"),
        (file_as_test, r"test: not a directory"),
    ],
)
def test_folder_without_valid_test_set_is_refused(root, change, message):
    change(root)
    with pytest.raises(InputError, match=message):
        load(root, train=False)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("12,dog\n", "12,dog\n13,dog\n14,cat\n", r"trainLabels\.csv: 13, 14: no such image in .*train"),
        ("12,dog\n", "", r"trainLabels\.csv: 12\.png: no such id"),
        ("12,dog\n", "12,dog\n12,cat\n", r"trainLabels\.csv: 12: repeated ids"),
        ("12,dog\n", "12,\n", r"trainLabels\.csv: 12: ids without a label"),
        ("id,label", "id,label,breed", r"trainLabels\.csv: expected two columns.*found 3 \(id, label, breed\)"),
        ("id,label\n", "", r"trainLabels\.csv: 12\.png: no such id.*header"),
        ("12,dog\n", "12,dog,brown\n", r"trainLabels\.csv: expected two columns.*found 3 \(12, dog, brown\)"),
        ("12,dog\n", "12\n", r"trainLabels\.csv: expected two columns.*found 1 \(12\)"),
        (",", ";", r"trainLabels\.csv: expected two columns.*by a comma; found 1 \(id;label\)"),
        ("12,dog\n", '12,"dog\n', r"trainLabels\.csv: cannot read the labels"),
        ("dog", "cat", r"one class only"),
    ],
)
def test_folder_with_invalid_csv_names_it(tmp_path, old, new, message):
    root = write_kaggle(tmp_path / "kaggle")
    text = (root / "trainLabels.csv").read_text()
    assert old in text
    (root / "trainLabels.csv").write_text(text.replace(old, new))
    with pytest.raises(InputError, match=message) as raised:
        load(root)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [("\n", ",\n"), ("dog\n", "dog,\n"), (",dog", ', "dog"'), ("\n", "\r\n"), ("\n", "\n  \n,\n")],
    ids=["trailing commas", "some trailing commas", "quotes after a space", "CRLF", "empty lines"],
)
def test_folder_reads_csv_as_other_programs_write_it(tmp_path, old, new):
    root = write_kaggle(tmp_path / "kaggle")
    expected = load(root).fingerprint
    text = (root / "trainLabels.csv").read_text()
    (root / "trainLabels.csv").write_text(text.replace(old, new), newline="")
    assert load(root).fingerprint == expected


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_folder_with_csv_of_another_encoding_names_utf8(tmp_path, encoding):
    root = write_kaggle(tmp_path / "kaggle")
    text = (root / "trainLabels.csv").read_text().replace("dog", "café")
    (root / "trainLabels.csv").write_text(text, encoding=encoding)
    with pytest.raises(InputError, match=r"trainLabels\.csv: not UTF-8; save"):
        load(root)


@pytest.mark.parametrize("text", ["", "id,label\n", "\n\n"])
def test_folder_with_csv_without_labels_is_refused(tmp_path, text):
    root = write_kaggle(tmp_path / "kaggle")
    (root / "trainLabels.csv").write_text(text)
    with pytest.raises(InputError, match=r"trainLabels\.csv: no labels; .*header"):
        load(root)


def test_folder_with_ambiguous_id_is_refused(tmp_path):
    root = write_kaggle(tmp_path / "kaggle")
    shutil.copy(root / "train" / "3.png", root / "train" / "3.bmp")
    with pytest.raises(InputError, match=r"3: several images"):
        load(root)


def test_folder_leaves_out_allowed_number_of_unreadable_files(root, caplog):
    unreadable_file(root)
    (root / "train" / "cat" / "000.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(InputError, match=r"2 of 31 files.*max_unreadable=2"):
        load(root, max_unreadable=1)
    assert [message.rpartition("/")[2].split(":")[0] for message in caplog.messages] == ["000.jpg", "notes.txt"]
    dataset = load(root, max_unreadable=2)
    assert dataset.class_counts == [9, 10, 10]
    assert dataset.ids[:3] == ["dog/000.jpg", "fish/000.jpg", "cat/001.jpg"]
    assert torch.equal(dataset.images[0], load_image(root / "train" / "dog" / "000.jpg"))


def test_folder_with_unreadable_class_is_refused(root):
    for path in (root / "train" / "cat").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(InputError, match=r"no file of the class cat is readable"):
        load(root, max_unreadable=10)


def test_unlabeled_test_set_without_readable_file_is_refused(tmp_path):
    root = write_kaggle(tmp_path / "photos")
    for path in (root / "test").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(InputError, match=r"test: none of the 12 files is readable"):
        load(root, train=False, max_unreadable=100)


# --- Memory -------------------------------------------------------------------------------------------------------


def test_images_beyond_memory_are_refused_before_loading(root, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 10_000_000)
    monkeypatch.setattr("cifar_ignite.data.file_dataset.load_images", None)
    with pytest.raises(InputError, match=r"data\.image_size: 30 images of 1024 pixels .*0\.2 GB.*10\.0 MB") as raised:
        load(root, image_size=1024)
    assert "smaller data.image_size" in str(raised.value)


def test_images_beyond_gpu_memory_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5_000, 10_000))
    with pytest.raises(InputError, match=r"0\.3 MB of GPU memory, but 0\.0 MB"):
        memory.check_memory((100, 3, 32, 32), torch.device("cuda"))
    memory.check_memory((1, 3, 32, 32), torch.device("cuda"))


def test_available_memory_is_the_smallest_known_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    physical = memory.available_memory()
    (tmp_path / "meminfo").write_text("MemTotal:       9000 kB\nMemAvailable:    4000 kB\n")
    assert memory.available_memory() == 4_096_000
    assert physical > 4_096_000
    for name, text in (("max", "1000000\n"), ("current", "400000\n"), ("stat", "anon 5\ninactive_file 100000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory.available_memory() == 700_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory() == 4_096_000


def test_available_memory_of_this_machine_is_plausible():
    assert 10**8 < memory.available_memory() < 10**14

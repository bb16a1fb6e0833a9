"""CIFAR-100's official files, valid and invalid."""

import pickle
from urllib.error import URLError

import pytest
from torchvision.datasets import CIFAR100

from cifar_ignite.config import DataConfig
from cifar_ignite.data import cifar_files
from cifar_ignite.data.cifar100 import CIFAR100_FILES, load_class_names
from cifar_ignite.data.registry import load_dataset
from cifar_ignite.errors import InputError
from tests.data.helpers import Payload, dump
from tests.helpers import write_cifar100


@pytest.fixture
def root(tmp_path):
    return write_cifar100(tmp_path / "data", train=200, test=100)


def load(root, *, train=True):
    return load_dataset(DataConfig(dataset="cifar100", root=root), train=train)


def test_cifar100_has_the_official_files_of_torchvision():
    assert CIFAR100_FILES.all == dict([*CIFAR100.train_list, *CIFAR100.test_list]) | {"meta": CIFAR100.meta["md5"]}
    assert CIFAR100_FILES.source.tgz_md5 == CIFAR100.tgz_md5


def test_cifar100_is_loaded_with_fine_labels_and_their_names(root, caplog):
    train, test = load(root), load(root, train=False)
    assert train.images.shape == (200, 3, 32, 32)
    assert train.labels.tolist() == list(range(100)) * 2
    assert train.class_names[:2] == ("class 00", "class 01")
    assert train.num_classes == test.num_classes == 100
    assert test.ids == list(range(100))
    assert "md5 of train, meta differs" in caplog.text


def test_cifar100_without_needed_file_names_it(root):
    (root / "cifar-100-python" / "test").unlink()
    assert len(load(root)) == 200
    with pytest.raises(InputError, match=r"cifar-100-python: no file test; .*CIFAR-100"):
        load(root, train=False)
    (root / "cifar-100-python" / "meta").unlink()
    with pytest.raises(InputError, match=r"cifar-100-python: no file meta; "):
        load(root)


def test_cifar100_from_official_cifar10_directory_is_downloaded(cifar_root, monkeypatch):
    def fail(url, *_, **__):
        raise URLError(url)

    monkeypatch.setattr(cifar_files, "download_and_extract_archive", fail)
    with pytest.raises(InputError, match=r"contains no CIFAR-100, .*cifar-100-python\.tar\.gz"):
        load(cifar_root)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({b"coarse_label_names": [b"x"] * 20}, "it has no 'fine_label_names'"),
        ({b"fine_label_names": [b"x"] * 20}, "'fine_label_names' must hold .* a list of 100"),
        ({b"fine_label_names": [b"x"] * 100}, "'fine_label_names' must be 100 different names"),
        ({b"fine_label_names": list(range(100))}, "'fine_label_names' must be 100 different names.*int"),
        (None, "it has no 'fine_label_names'"),
    ],
)
def test_load_class_names_of_malformed_file_names_entry(tmp_path, meta, message):
    with pytest.raises(InputError, match=message):
        load_class_names(dump(tmp_path / "meta", meta).parent)


def test_cifar100_executes_no_code_of_its_files(root, tmp_path):
    for name in ("meta", "train"):
        path = root / "cifar-100-python" / name
        intact = path.read_bytes()
        dump(path, {b"data": Payload(tmp_path / "marker")})
        with pytest.raises(InputError, match=f"{name}: refused"):
            load(root)
        path.write_bytes(intact)
    assert not (tmp_path / "marker").exists()


def test_cifar100_with_coarse_labels_only_names_the_missing_key(root):
    path = root / "cifar-100-python" / "train"
    batch = pickle.loads(path.read_bytes(), encoding="bytes")
    batch.pop(b"fine_labels")
    dump(path, batch)
    with pytest.raises(InputError, match=r"it has no 'fine_labels'; found .*coarse_labels"):
        load(root)

"""CIFAR-10's official files and the competition's test file, valid and invalid."""

import hashlib
import os
import pickle
import shutil
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from cifar_ignite.config import DataConfig
from cifar_ignite.data import cifar10
from cifar_ignite.data.cifar10 import (
    CIFAR10_DIR,
    OFFICIAL_MD5S,
    load_cifar10,
    load_unlabeled_test_set,
    mismatched_files,
    missing_files,
)
from cifar_ignite.data.registry import load_dataset
from cifar_ignite.errors import InputError
from tests.helpers import snapshot, write_batch

UINT8 = np.arange(2 * 3072, dtype=np.uint32).astype(np.uint8).reshape(2, 3072)


class Payload:
    """Creates a file when it is unpickled by the standard unpickler."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def dump(path, batch, protocol=2):
    path.write_bytes(pickle.dumps(batch, protocol=protocol))
    return path


# --- The official files -------------------------------------------------------------------------------------------


def test_load_dataset_reads_official_files_in_order(cifar_root):
    train = load_dataset(DataConfig(root=cifar_root), train=True)
    test = load_dataset(DataConfig(root=cifar_root), train=False)
    assert train.images.shape == (120, 3, 32, 32)
    assert train.images.dtype == torch.uint8
    assert train.labels.tolist() == [label for _ in range(5) for label in (np.arange(24) % 10)]
    assert test.images.shape == (30, 3, 32, 32)
    assert test.ids == list(range(30))
    assert train.num_classes == test.num_classes == 10
    with (cifar_root / CIFAR10_DIR / "data_batch_2").open("rb") as file:
        second = pickle.load(file, encoding="bytes")
    assert np.array_equal(train.images[24:48].numpy().reshape(24, 3072), second[b"data"])


def test_load_cifar10_for_training_never_reads_test_set(cifar_root):
    (cifar_root / CIFAR10_DIR / "test_batch").unlink()
    assert len(load_cifar10(cifar_root, train=True)) == 120


def test_load_cifar10_never_reads_batches_meta(cifar_root, tmp_path):
    dump(cifar_root / CIFAR10_DIR / "batches.meta", Payload(tmp_path / "marker"))
    for train in (True, False):
        load_cifar10(cifar_root, train=train)
    assert not (tmp_path / "marker").exists()


def test_load_cifar10_with_unofficial_files_warns_once(cifar_root, caplog):
    load_cifar10(cifar_root, train=True)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not the official files" in caplog.text


def test_load_cifar10_with_official_files_does_not_warn(cifar_root, caplog, monkeypatch):
    monkeypatch.setattr(cifar10, "TRAIN_MD5S", md5s_of(cifar_root / CIFAR10_DIR, "data_batch_1", "data_batch_2"))
    assert len(load_cifar10(cifar_root, train=True)) == 48
    assert not caplog.records


def md5s_of(directory, *names):
    return {name: hashlib.md5((directory / name).read_bytes()).hexdigest() for name in names}


def test_missing_and_mismatched_files_are_listed(cifar_root):
    directory = cifar_root / CIFAR10_DIR
    assert list(OFFICIAL_MD5S) == [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    assert missing_files(directory) == []
    assert mismatched_files(directory) == list(OFFICIAL_MD5S)
    md5s = md5s_of(directory, "data_batch_1", "data_batch_2", "test_batch")
    assert mismatched_files(directory, md5s) == []
    (directory / "data_batch_2").write_bytes(b"")
    assert mismatched_files(directory, md5s) == ["data_batch_2"]
    (directory / "data_batch_2").unlink()
    assert missing_files(directory) == missing_files(directory, md5s) == ["data_batch_2"]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1, 2], "no 'data'"),
        ({b"labels": [1]}, "no 'data'"),
        ({b"data": UINT8}, "no 'labels'"),
        ({b"data": [1, 2], b"labels": [1]}, "'data' must be a uint8 array"),
        ({b"data": UINT8.astype(float), b"labels": [1, 2]}, "got float64"),
        ({b"data": UINT8[:, :100], b"labels": [1, 2]}, r"got uint8 \(2, 100\)"),
        ({b"data": UINT8[:0], b"labels": []}, "'data' holds no images"),
        ({b"data": UINT8, b"labels": [1]}, "'labels' must be a list of 2"),
        ({b"data": UINT8, b"labels": [1, 10]}, "'labels' must be .* from 0 to 9"),
        ({b"data": UINT8, b"labels": [1, -1]}, "'labels' must be .* from 0 to 9"),
        ({b"data": UINT8, b"labels": [1, "x"]}, "'labels' must be .* from 0 to 9"),
    ],
)
def test_load_labeled_batch_with_malformed_entry_names_it(tmp_path, batch, message):
    with pytest.raises(InputError, match=message):
        cifar10._load_labeled_batch(dump(tmp_path / "batch", batch, protocol=4))


def test_load_labeled_batch_of_damaged_file_is_refused_or_valid(tmp_path):
    write_batch(tmp_path / "intact", 12, 0)
    intact = (tmp_path / "intact").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        (tmp_path / "damaged").write_bytes(intact[: rng.integers(len(intact))])
        with pytest.raises(InputError):
            cifar10._load_labeled_batch(tmp_path / "damaged")
    refused = 0
    # Flipped bits outside the pixels break the pickle, or change a label or a name; they must have no other effect.
    positions = [*range(intact.index(b"data")), *range(len(intact) - 400, len(intact))]
    for _ in range(150):
        damaged = bytearray(intact)
        damaged[rng.choice(positions)] ^= 1 << rng.integers(8)
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            images, labels = cifar10._load_labeled_batch(tmp_path / "damaged")
        except InputError as error:
            refused += "\n" not in str(error)
        else:
            assert images.shape == (12, 3, 32, 32)
            assert labels.min() >= 0
            assert labels.max() <= 9
    assert refused > 30


def test_load_cifar10_with_missing_truncated_or_unsafe_file_names_it(cifar_root, tmp_path):
    path = cifar_root / CIFAR10_DIR / "data_batch_2"
    intact, marker = path.read_bytes(), tmp_path / "marker"
    path.write_bytes(intact[:-100])
    with pytest.raises(InputError, match="data_batch_2: refused"):
        load_cifar10(cifar_root, train=True)
    dump(path, {b"data": Payload(marker)})
    with pytest.raises(InputError, match="data_batch_2: refused"):
        load_cifar10(cifar_root, train=True)
    path.unlink()
    with pytest.raises(InputError, match=f"data_batch_2: no such file; delete {path.parent}"):
        load_cifar10(cifar_root, train=True)
    assert not marker.exists()


# --- Download -----------------------------------------------------------------------------------------------------


def test_download_without_network_gives_advice_and_leaves_nothing(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(cifar10, "download_and_extract_archive", offline)
    with pytest.raises(InputError, match=r"no route to host.*put the official files into.*DATA=synthetic") as raised:
        load_cifar10(tmp_path / "a" / "b" / "data", train=True)
    assert "data.dataset=synthetic" in str(raised.value)
    assert not snapshot(tmp_path)


def test_download_appears_only_when_complete(tmp_path, monkeypatch):
    def download(url, root, filename, md5):
        assert md5 == cifar10.CIFAR10.tgz_md5
        directory = Path(root) / CIFAR10_DIR
        directory.mkdir()
        for number in range(1, 6):
            assert not (tmp_path / "data" / CIFAR10_DIR).exists()
            write_batch(directory / f"data_batch_{number}", 10, number)

    monkeypatch.setattr(cifar10, "download_and_extract_archive", download)
    assert len(load_cifar10(tmp_path / "data", train=True)) == 50
    assert [path.name for path in (tmp_path / "data").iterdir()] == [CIFAR10_DIR]


def test_download_finished_by_another_process_is_used(tmp_path, monkeypatch):
    def download(url, root, filename, md5):
        for directory in (Path(root), tmp_path / "data"):
            (directory / CIFAR10_DIR).mkdir()
            write_batch(directory / CIFAR10_DIR / "test_batch", 10, 1)

    monkeypatch.setattr(cifar10, "download_and_extract_archive", download)
    assert len(load_cifar10(tmp_path / "data", train=False)) == 10


def test_load_cifar10_downloads_if_directory_is_missing(cifar_root, monkeypatch):
    called = []
    monkeypatch.setattr(cifar10, "download_cifar10", called.append)
    shutil.rmtree(cifar_root)
    with pytest.raises(InputError, match="data_batch_1: no such file"):
        load_cifar10(cifar_root, train=True)
    assert called == [cifar_root]


# --- The competition's test file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("layout", ["rows", "images"])
def test_load_unlabeled_test_set_reads_both_layouts(tmp_path, layout, protocol):
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    rows = images.transpose(0, 3, 1, 2).reshape(5, 3072)
    data = images if layout == "images" else rows
    path = dump(tmp_path / "test.pkl", {b"data": data, b"ids": np.array([7, 3, 9, 1, 5])}, protocol)
    dataset = load_unlabeled_test_set(path)
    assert dataset.labels is None
    assert dataset.ids == [7, 3, 9, 1, 5]
    assert np.array_equal(dataset.images.numpy(), images.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("ids", [[1], "ab", [1, 2.5], None])
def test_load_unlabeled_test_set_with_malformed_ids_names_them(tmp_path, ids):
    with pytest.raises(InputError, match="'ids' must"):
        load_unlabeled_test_set(dump(tmp_path / "test", {b"data": UINT8, b"ids": ids}))


def test_load_unlabeled_test_set_with_invalid_file_is_refused(tmp_path):
    path, marker = tmp_path / "test.pkl", tmp_path / "marker"
    for contents, message in (
        (b"", "refused"),
        (pickle.dumps(Payload(marker)), "refused"),
        (pickle.dumps({b"data": [1]}), "uint8 array"),
    ):
        path.write_bytes(contents)
        with pytest.raises(InputError, match=message):
            load_unlabeled_test_set(path)
    assert not marker.exists()
    with pytest.raises(InputError, match=r"none\.pkl: no such file"):
        load_unlabeled_test_set(tmp_path / "none.pkl")

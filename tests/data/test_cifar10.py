"""CIFAR-10's official files, valid and invalid."""

import pickle

import numpy as np
import pytest
import torch

from cifar_ignite.config import DataConfig
from cifar_ignite.data.cifar_batches import load_labeled_batch
from cifar_ignite.data.registry import load_dataset
from cifar_ignite.errors import InputError
from tests.data.helpers import CIFAR10_DIR, UINT8, Payload, dump, dump_python2, load_cifar10, md5s_of, use_official
from tests.helpers import write_batch


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
    md5s = md5s_of(cifar_root / CIFAR10_DIR, "data_batch_1", "data_batch_2")
    use_official(monkeypatch, train_list=list(md5s.items()))
    assert len(load_cifar10(cifar_root, train=True)) == 48
    assert not caplog.records


@pytest.mark.parametrize(
    "labels",
    [np.array([1, 9]), [np.int64(1), np.uint8(9)], np.array([[1], [9]], dtype=">u2"), (1, 9)],
    ids=repr,
)
def test_load_labeled_batch_accepts_labels_of_numpy(tmp_path, labels):
    for write in (dump, dump_python2):
        path = write(tmp_path / "batch", {b"data": UINT8, b"labels": labels})
        images, loaded = load_labeled_batch(path, "labels", 10)
        assert np.array_equal(images.reshape(2, 3072).numpy(), UINT8)
        assert loaded.tolist() == [1, 9]
        assert loaded.dtype == torch.int64


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1, 2], "no 'data'"),
        ({b"labels": [1]}, "no 'data'"),
        ({b"data": UINT8}, "no 'labels'"),
        ({b"data": [1, 2], b"labels": [1]}, "'data' must be a uint8 array"),
        ({b"data": UINT8.astype(float), b"labels": [1, 2]}, "got float64 array"),
        ({b"data": UINT8[:, :100], b"labels": [1, 2]}, r"got uint8 array of shape \(2, 100\)"),
        ({b"data": UINT8[:0], b"labels": []}, "'data' holds no images"),
        ({b"data": UINT8, b"labels": [1]}, "'labels' must .* a list of 2"),
        ({b"data": UINT8, b"labels": [1.0, 2.0]}, r"'labels' must be integers.*got list of 2 values \(float\)"),
        ({b"data": UINT8, b"labels": [True, False]}, r"'labels' must be integers.*\(bool\)"),
        (
            {b"data": UINT8, b"labels": np.eye(10, dtype=int)[:2]},
            r"'labels' must .*int64 array of shape \(2, 10\)",
        ),
        ({b"data": UINT8, b"fine_labels": [1, 2]}, "no 'labels'.*fine_labels"),
        ({b"data": UINT8, b"labels": np.array([1, 10])}, "'labels' must be from 0 to 9, got 10"),
        ({b"data": UINT8, b"labels": [1, -1]}, "'labels' must be from 0 to 9, got -1"),
        ({b"data": UINT8, b"labels": [1, "x"]}, r"'labels' must be integers.*\(int, str\)"),
    ],
)
def test_load_labeled_batch_with_malformed_entry_names_it(tmp_path, batch, message):
    with pytest.raises(InputError, match=message):
        load_labeled_batch(dump(tmp_path / "batch", batch, protocol=4), "labels", 10)


def test_load_labeled_batch_of_damaged_file_is_refused_or_valid(tmp_path):
    write_batch(tmp_path / "intact", 12, 0)
    intact = (tmp_path / "intact").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        (tmp_path / "damaged").write_bytes(intact[: rng.integers(len(intact))])
        with pytest.raises(InputError):
            load_labeled_batch(tmp_path / "damaged", "labels", 10)
    refused = 0
    # Flipped bits outside the pixels break the pickle, or change a label or a name; they must have no other effect.
    positions = [*range(intact.index(b"data")), *range(len(intact) - 400, len(intact))]
    for _ in range(150):
        damaged = bytearray(intact)
        damaged[rng.choice(positions)] ^= 1 << rng.integers(8)
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            images, labels = load_labeled_batch(tmp_path / "damaged", "labels", 10)
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
    with pytest.raises(InputError, match="no file data_batch_2; ") as raised:
        load_cifar10(cifar_root, train=True)
    assert "delete" not in str(raised.value)
    assert not marker.exists()

"""Reading files with suspicion, the embedded dataset, the split."""

import codecs
import os
import pickle
import warnings
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import snapshot, write_batch

from cifar_ignite import data
from cifar_ignite.config import DataConfig, InputError, SyntheticConfig

UINT8 = np.arange(2 * 3072, dtype=np.uint32).astype(np.uint8).reshape(2, 3072)


def dump(path, batch, protocol=2):
    path.write_bytes(pickle.dumps(batch, protocol=protocol))
    return path


def test_the_official_layout_is_read_in_order(cifar_root):
    train = data.load_images(DataConfig(root=cifar_root), train=True)
    test = data.load_images(DataConfig(root=cifar_root), train=False)
    assert train.images.shape == (120, 3, 32, 32)
    assert train.images.dtype == torch.uint8
    assert train.labels.tolist() == [label for _ in range(5) for label in (np.arange(24) % 10)]
    assert test.images.shape == (30, 3, 32, 32)
    assert test.ids == list(range(30))
    with (cifar_root / "cifar-10-batches-py" / "data_batch_2").open("rb") as file:
        second = pickle.load(file, encoding="bytes")
    assert np.array_equal(train.images[24:48].numpy().reshape(24, 3072), second[b"data"])


def test_training_never_reads_the_test_set(cifar_root):
    (cifar_root / "cifar-10-batches-py" / "test_batch").unlink()
    assert len(data.load_images(DataConfig(root=cifar_root), train=True).images) == 120


def test_other_than_the_official_files_are_used_with_one_warning(cifar_root, caplog):
    data.read_cifar10(cifar_root, train=True)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not the official files" in caplog.text


def test_the_official_files_are_used_without_a_warning(cifar_root, caplog, monkeypatch):
    checksums = [
        [name, data._md5(cifar_root / "cifar-10-batches-py" / name)] for name in ("data_batch_1", "data_batch_2")
    ]
    monkeypatch.setattr(data.CIFAR10, "train_list", checksums)
    assert len(data.read_cifar10(cifar_root, train=True).images) == 48
    assert not caplog.records


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("layout", ["rows", "pictures"])
def test_both_layouts_of_the_competition_file(tmp_path, layout, protocol):
    pictures = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    rows = pictures.transpose(0, 3, 1, 2).reshape(5, 3072)
    stored = pictures if layout == "pictures" else rows
    path = dump(tmp_path / "test.pkl", {b"data": stored, b"ids": np.array([7, 3, 9, 1, 5])}, protocol)
    read = data.read_test_file(path)
    assert read.labels is None
    assert read.ids == [7, 3, 9, 1, 5]
    assert np.array_equal(read.images.numpy(), pictures.transpose(0, 3, 1, 2))


def test_numpy_1_pickles_are_read(tmp_path):
    text = pickle.dumps({b"data": UINT8, b"labels": [1, 2]}, protocol=0).replace(b"numpy._core", b"numpy.core")
    path = tmp_path / "old"
    path.write_bytes(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images, labels = data._read_labelled_batch(path)
    assert np.array_equal(images.reshape(2, 3072).numpy(), UINT8)
    assert labels.tolist() == [1, 2]


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


class CallPayload:
    """Calls something that is not admitted, or something admitted with an argument that is not."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("read", [data._read_labelled_batch, data.read_test_file])
def test_hostile_pickles_run_nothing(tmp_path, read):
    marker = tmp_path / "marker"
    payloads = [
        Payload(marker),
        {b"data": Payload(marker)},
        CallPayload(getattr, "text", "upper"),
        CallPayload(codecs.encode, "text", "rot13"),
    ]
    for number, payload in enumerate(payloads):
        with pytest.raises(InputError, match="refused") as raised:
            read(dump(tmp_path / f"{number}", payload))
        assert "\n" not in str(raised.value)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1, 2], "no 'data' in it"),
        ({b"labels": [1]}, "no 'data' in it"),
        ({b"data": UINT8}, "no 'labels' in it"),
        ({b"data": [1, 2], b"labels": [1]}, "uint8 array of shape"),
        ({b"data": UINT8.astype(float), b"labels": [1, 2]}, "got float64"),
        ({b"data": UINT8[:, :100], b"labels": [1, 2]}, r"got uint8 \(2, 100\)"),
        ({b"data": UINT8[:0], b"labels": []}, "no images"),
        ({b"data": UINT8, b"labels": [1]}, "list of 2 numbers"),
        ({b"data": UINT8, b"labels": [1, 10]}, "from 0 to 9"),
        ({b"data": UINT8, b"labels": [1, -1]}, "from 0 to 9"),
        ({b"data": UINT8, b"labels": [1, "x"]}, "from 0 to 9"),
    ],
)
def test_malformed_batches_are_named(tmp_path, batch, message):
    with pytest.raises(InputError, match=message):
        data._read_labelled_batch(dump(tmp_path / "batch", batch, protocol=4))


@pytest.mark.parametrize("ids", [[1], "ab", [1, 2.5], None])
def test_malformed_ids_are_named(tmp_path, ids):
    with pytest.raises(InputError, match="'ids' must"):
        data.read_test_file(dump(tmp_path / "test", {b"data": UINT8, b"ids": ids}))


def test_truncated_and_damaged_files_are_refused(tmp_path):
    write_batch(tmp_path / "whole", 12, 0)
    whole = (tmp_path / "whole").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        (tmp_path / "damaged").write_bytes(whole[: rng.integers(len(whole))])
        with pytest.raises(InputError):
            data._read_labelled_batch(tmp_path / "damaged")
    refused = 0
    # Flips in the part around the pixels break the pickle, or change a label or a name; nothing else may come of it.
    places = [*range(whole.index(b"data")), *range(len(whole) - 400, len(whole))]
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.choice(places)] ^= 1 << rng.integers(8)
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            images, labels = data._read_labelled_batch(tmp_path / "damaged")
        except InputError as error:
            refused += "\n" not in str(error)
        else:
            assert images.shape == (12, 3, 32, 32)
            assert labels.min() >= 0
            assert labels.max() <= 9
    assert refused > 30


def test_a_missing_file_is_named(cifar_root):
    (cifar_root / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(InputError, match="data_batch_3: no such file"):
        data.read_cifar10(cifar_root, train=True)


def test_without_a_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(data, "download_and_extract_archive", offline)
    with pytest.raises(InputError, match=r"no route to host.*put the official files into.*DATA=synthetic"):
        data.read_cifar10(tmp_path / "a" / "b" / "data", train=True)
    assert not snapshot(tmp_path)


def test_a_download_appears_only_when_complete(tmp_path, monkeypatch):
    def download(url, root, filename, md5):
        assert md5 == data.CIFAR10.tgz_md5
        folder = data.Path(root) / "cifar-10-batches-py"
        folder.mkdir()
        for number in range(1, 6):
            assert not (tmp_path / "data" / "cifar-10-batches-py").exists()
            write_batch(folder / f"data_batch_{number}", 10, number)

    monkeypatch.setattr(data, "download_and_extract_archive", download)
    assert len(data.read_cifar10(tmp_path / "data", train=True).images) == 50
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar-10-batches-py"]


def test_a_process_that_downloads_while_another_finishes_takes_its_files(tmp_path, monkeypatch):
    def download(url, root, filename, md5):
        for folder in (data.Path(root), tmp_path / "data"):
            (folder / "cifar-10-batches-py").mkdir()
            write_batch(folder / "cifar-10-batches-py" / "test_batch", 10, 1)

    monkeypatch.setattr(data, "download_and_extract_archive", download)
    assert len(data.read_cifar10(tmp_path / "data", train=False).images) == 10


# --- The embedded dataset ---------------------------------------------------------------------------------------


def test_the_embedded_dataset_is_a_function_of_its_seed():
    config = SyntheticConfig(train_size=200, test_size=50)
    train, test = data.draw_synthetic(config, train=True), data.draw_synthetic(config, train=False)
    assert train.images.shape == (200, 3, 32, 32)
    assert train.images.dtype == torch.uint8
    assert torch.bincount(train.labels).tolist() == [20] * 10
    assert len(test.images) == 50
    assert torch.equal(train.images, data.draw_synthetic(config, train=True).images)
    other = data.draw_synthetic(config.model_copy(update={"seed": 1}), train=True)
    assert not torch.equal(train.images, other.images)
    assert not torch.equal(train.images[:50], test.images)


def test_a_linear_classifier_stays_below_60_percent_on_the_embedded_dataset():
    config = SyntheticConfig(train_size=6000, test_size=1000)
    train, test = data.draw_synthetic(config, train=True), data.draw_synthetic(config, train=False)

    def features(images):
        flat = images.flatten(1).double() / 255
        return torch.cat([flat, torch.ones(len(flat), 1, dtype=torch.double)], 1)

    x, y = features(train.images), torch.nn.functional.one_hot(train.labels, 10).double()
    weights = torch.linalg.solve(x.T @ x + 100 * torch.eye(x.shape[1]), x.T @ y)
    accuracy = ((features(test.images) @ weights).argmax(1) == test.labels).float().mean().item()
    assert 0.15 < accuracy < 0.6


# --- The split --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 7, 100, 333])
def test_the_split_is_disjoint_stratified_and_complete(size):
    labels = torch.randint(0, 10, (1000,), generator=torch.Generator().manual_seed(0))
    train, val = data.split_validation(labels, size, seed=3)
    assert len(val) == size
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(1000))
    exact = torch.bincount(labels, minlength=10) * size / 1000
    assert ((torch.bincount(labels[val], minlength=10) - exact).abs() <= 1).all()


def test_the_split_of_a_balanced_set_is_exact_and_seeded():
    labels = torch.arange(50_000) % 10
    train, val = data.split_validation(labels, 5000, seed=0)
    assert torch.bincount(labels[val]).tolist() == [500] * 10
    assert torch.equal(val, data.split_validation(labels, 5000, seed=0)[1])
    assert not torch.equal(val, data.split_validation(labels, 5000, seed=1)[1])
    assert len(train) == 45_000


def test_a_split_that_leaves_nothing_is_refused():
    with pytest.raises(InputError, match="data.validation"):
        data.split_validation(torch.arange(20) % 10, 15, seed=0)

"""The competition's unlabeled test set."""

import pickle

import numpy as np
import pytest

from cifar_ignite.data.cifar10 import CIFAR10_CLASSES
from cifar_ignite.data.unlabeled import load_unlabeled_test_set
from cifar_ignite.errors import InputError
from tests.data.helpers import UINT8, Payload, dump, dump_python2


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
    assert dataset.class_names == CIFAR10_CLASSES
    assert np.array_equal(dataset.images.numpy(), images.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("protocol", [0, 1, 2])
@pytest.mark.parametrize(
    "ids",
    [
        ["img_1", "img_2"],
        [b"img_1", b"img_2"],
        np.array(["img_1", "img_2"]),
        np.array([b"img_1", b"img_2"]),
        np.array(["img_1", "img_2"], dtype=object),
        list(np.array(["img_1", "img_2"])),
        np.array([["img_1"], ["img_2"]]),
    ],
    ids=repr,
)
def test_load_unlabeled_test_set_accepts_strings_of_both_pythons(tmp_path, caplog, ids, protocol):
    for write in (dump, dump_python2):
        dataset = load_unlabeled_test_set(write(tmp_path / "test.pkl", {"data": UINT8, "ids": ids}, protocol))
        assert dataset.ids == ["img_1", "img_2"]
        assert np.array_equal(dataset.images.reshape(2, 3072).numpy(), UINT8)
    assert not caplog.records


def test_load_unlabeled_test_set_decodes_utf8_of_python_2(tmp_path):
    path = dump(tmp_path / "test.pkl", {"data": UINT8, "ids": ["é".encode(), "ü"]})
    assert load_unlabeled_test_set(path).ids == ["é", "ü"]


@pytest.mark.parametrize(
    ("ids", "repeated", "first"),
    [([7, 7], 1, "7"), (["a", b"a"], 1, "a"), ([1, "1"], 1, "1")],
    ids=str,
)
def test_load_unlabeled_test_set_warns_once_of_repeated_ids(tmp_path, caplog, ids, repeated, first):
    assert len(load_unlabeled_test_set(dump(tmp_path / "test.pkl", {"data": UINT8, "ids": ids}))) == 2
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.args[1:] == (repeated, first)


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ([1], "list of 1 values"),
        ("ab", "str"),
        (None, "NoneType"),
        ([1, 2.5], "float"),
        (np.array([0.0, 1.0]), "float"),
        ([True, False], "bool"),
        ([None, 1], "NoneType"),
        ([1, b"\xff"], "bytes"),
        ([1, "\udcff"], "str"),
        ([[1, 2], [3, 4]], "list of 2 values"),
    ],
    ids=repr,
)
def test_load_unlabeled_test_set_with_malformed_ids_names_them(tmp_path, ids, found):
    with pytest.raises(InputError, match=f"'ids' must .*got {found}"):
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

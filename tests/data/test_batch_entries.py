"""Entries of pickled batches in the forms that people store them in."""

from pathlib import Path

import numpy as np
import pytest

from cifar_ignite.data.batch_entries import describe, get_entry, to_images, to_list
from cifar_ignite.errors import InputError

PATH = Path("batch")
PLANES = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
ROWS, HWC = PLANES.reshape(4, 3072), PLANES.transpose(0, 2, 3, 1).copy()


@pytest.mark.parametrize(
    "data",
    [ROWS, PLANES, HWC, np.asfortranarray(HWC), HWC[::-1][::-1], list(HWC), tuple(ROWS)],
    ids=["rows", "planes", "hwc", "fortran", "strided", "list", "tuple"],
)
def test_to_images_accepts_unambiguous_forms(data):
    assert np.array_equal(to_images(data, PATH).numpy(), PLANES)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (HWC.astype(np.float32) / 255, "float32 array of shape (4, 32, 32, 3)"),
        (HWC.astype(np.int64), "int64 array of shape (4, 32, 32, 3)"),
        (HWC[..., 0], "uint8 array of shape (4, 32, 32)"),
        (HWC[0], "uint8 array of shape (32, 32, 3)"),
        (ROWS.T, "uint8 array of shape (3072, 4)"),
        (np.zeros((), np.uint8), "uint8 array of shape ()"),
        ([HWC[0], ROWS[0]], "list of 2 values (ndarray)"),
        ([], "list of 0 values ()"),
        (ROWS.tolist(), "list of 4 values (list)"),
        (ROWS.tobytes(), "bytes"),
        (None, "NoneType"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_to_images_with_another_form_names_found_and_allowed_ones(data, found):
    with pytest.raises(InputError, match=r"^batch: 'data' must be a uint8 array of shape \(N, 3072\) or ") as raised:
        to_images(data, PATH)
    assert f"(N, 3, 32, 32) or (N, 32, 32, 3), got {found}" in str(raised.value)


def test_to_images_without_images_is_refused():
    with pytest.raises(InputError, match="no images"):
        to_images(ROWS[:0], PATH)


@pytest.mark.parametrize(
    "column",
    [
        [3, 1, 2],
        (3, 1, 2),
        [np.int64(3), np.uint8(1), 2],
        [np.array(3), np.array([1]), [2]],
        np.array([3, 1, 2], dtype=">i2"),
        np.array([[3], [1], [2]]),
        np.array([3, 1, 2], dtype=object),
        [[3], (1,), [2]],
    ],
    ids=str,
)
def test_to_list_returns_plain_values(column):
    values = to_list(column, "labels", 3, PATH)
    assert values == [3, 1, 2]
    assert all(type(value) is int for value in values)


@pytest.mark.parametrize(
    ("column", "found"),
    [
        ([1, 2], "list of 2 values (int)"),
        (np.arange(6), "int64 array of shape (6,)"),
        (np.arange(3).reshape(1, 3), "int64 array of shape (1, 3)"),
        (np.array(3), "int64 array of shape ()"),
        ("abc", "str"),
        ({1: 2}, "dict with the keys [1]"),
        (None, "NoneType"),
    ],
    ids=str,
)
def test_to_list_with_another_form_names_found_and_allowed_ones(column, found):
    with pytest.raises(
        InputError, match=r"^batch: 'ids' must .* a list of 3, or an array of shape \(3,\) or \(3, 1\)"
    ) as raised:
        to_list(column, "ids", 3, PATH)
    assert str(raised.value).endswith(f"got {found}")


def test_get_entry_accepts_keys_of_both_pythons_and_names_the_keys_found():
    assert get_entry({b"data": 1}, "data", PATH) == get_entry({"data": 1}, "data", PATH) == 1
    with pytest.raises(InputError, match=r"it has no 'labels'; found dict with the keys \[b'fine_labels'\]"):
        get_entry({b"fine_labels": 1}, "labels", PATH)
    with pytest.raises(InputError, match=r"it has no 'data'; found tuple of 2 values \(int, ndarray\)"):
        get_entry((HWC, 1), "data", PATH)


def test_describe_of_long_values_is_short():
    assert len(describe({f"key {number}": 0 for number in range(1000)})) < 200

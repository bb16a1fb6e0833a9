"""The restricted unpickler: arrays are loaded, everything else is refused without running it."""

import codecs
import gzip
import os
import pickle
import warnings

import numpy as np
import pytest

from cifar_ignite.data.unpickling import load_pickle
from cifar_ignite.errors import InputError
from tests.data.helpers import dump, dump_python2

BATCH = {b"data": np.arange(24, dtype=np.uint8).reshape(2, 12), b"labels": [1, np.int64(2)], "name": "x"}


class Call:
    """Calls a function when it is unpickled by the standard unpickler."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_load_pickle_reads_arrays_and_scalars_of_every_protocol(tmp_path, protocol):
    loaded = load_pickle(dump(tmp_path / "batch", BATCH, protocol))
    assert np.array_equal(loaded[b"data"], BATCH[b"data"])
    assert loaded[b"labels"] == [1, 2]


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_load_pickle_reads_arrays_and_scalars_of_python_2(tmp_path, protocol):
    loaded = load_pickle(dump_python2(tmp_path / "batch", BATCH, protocol))
    assert np.array_equal(loaded[b"data"], BATCH[b"data"])
    assert loaded[b"labels"] == [1, 2]
    assert loaded[b"name"] == b"x"


def test_load_pickle_reads_numpy_1_module_names_without_warnings(tmp_path):
    text = pickle.dumps(BATCH, protocol=0)
    assert b"numpy._core" in text
    (tmp_path / "old").write_bytes(text.replace(b"numpy._core", b"numpy.core"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_pickle(tmp_path / "old")
    assert np.array_equal(loaded[b"data"], BATCH[b"data"])


def test_load_pickle_refuses_code_without_running_it(tmp_path):
    marker = tmp_path / "marker"
    payloads = [
        Call(os.system, f"touch '{marker}'"),
        {b"data": Call(os.system, f"touch '{marker}'")},
        Call(getattr, "text", "upper"),
        Call(codecs.encode, "text", "rot13"),
    ]
    for number, payload in enumerate(payloads):
        with pytest.raises(InputError, match="refused") as raised:
            load_pickle(dump(tmp_path / f"{number}", payload))
        assert "\n" not in str(raised.value)
    assert not marker.exists()


def test_load_pickle_with_unreadable_path_names_it(tmp_path):
    with pytest.raises(InputError, match="none: no such file"):
        load_pickle(tmp_path / "none")
    with pytest.raises(InputError, match="cannot read"):
        load_pickle(tmp_path)
    with pytest.raises(InputError, match="cannot access"):
        load_pickle(tmp_path / ("x" * 300))


def test_load_pickle_names_other_formats(tmp_path):
    contents = {"x.npz": lambda path: np.savez(path, x=[1]), "x.npy": lambda path: np.save(path, [1])}
    contents["x.gz"] = lambda path: path.write_bytes(gzip.compress(pickle.dumps(BATCH)))
    for name, write in contents.items():
        write(tmp_path / name)
        with pytest.raises(InputError, match=rf"{name}: is a .*({name[1:]}|gzipped) file.*not a pickle"):
            load_pickle(tmp_path / name)

"""Loading pickles of numpy arrays without running code that they refer to."""

import codecs
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from cifar_ignite.errors import InputError, first_line
from cifar_ignite.files import path_exists

# By the first bytes of a file.
OTHER_FORMATS = {
    b"\x1f\x8b": "a gzipped file (gunzip it)",
    b"PK\x03\x04": "a zip or .npz file",
    b"\x93NUMPY": "a .npy file",
}


def _encode_latin1(text: str, encoding: str) -> bytes:
    """Encode text as pickles of protocol 2 written by Python 3 do for bytes; other codecs are refused."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding!r}")
    return codecs.encode(text, "latin1")


# Everything that a pickle of numpy arrays in plain containers refers to, under the module names of numpy 1 and 2. The
# functions are taken from what numpy itself pickles, because the modules that hold them are private.
_ALLOWED_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode_latin1,
}
for _module in ("numpy.core", "numpy._core"):
    _ALLOWED_GLOBALS[f"{_module}.multiarray", "_reconstruct"] = np.empty(0).__reduce__()[0]
    _ALLOWED_GLOBALS[f"{_module}.multiarray", "scalar"] = np.float64(1).__reduce__()[0]
    _ALLOWED_GLOBALS[f"{_module}.numeric", "_frombuffer"] = np.empty(0).__reduce_ex__(5)[0]


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickler that allows numpy arrays and plain containers and refuses every other global."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed global.

        Raises:
            UnpicklingError: If the global is not allowed.
        """
        try:
            return _ALLOWED_GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}") from None


def load_pickle(path: Path) -> Any:
    """Load a pickle of numpy arrays in plain containers; strings of Python 2 are returned as bytes.

    Raises:
        InputError: If the file is missing, unreadable or damaged, or refers to anything else.
    """
    if not path_exists(path):
        raise InputError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            if kind := next((kind for magic, kind in OTHER_FORMATS.items() if file.peek().startswith(magic)), None):
                raise InputError(f"{path}: is {kind}, not a pickle")
            return RestrictedUnpickler(file, encoding="bytes").load()
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot read the file: {error.strerror}") from None
    except (
        Exception
    ) as error:  # a damaged pickle can raise almost anything: EOFError, IndexError, TypeError, MemoryError
        raise InputError(f"{path}: refused: not a valid pickle of plain arrays ({first_line(error)})") from None

"""Pickles as people have them."""

import hashlib
import io
import os
import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

UINT8 = np.arange(2 * 3072, dtype=np.uint32).astype(np.uint8).reshape(2, 3072)


class Payload:
    """Creates a file when it is unpickled by the standard unpickler."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Pickles text and bytes as Python 2 pickles its strings, which are both."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, value: str | bytes) -> None:
        data = value.encode("latin1") if isinstance(value, str) else value
        if self.proto:
            self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        else:
            self.write(pickle.STRING + repr(data)[1:].encode() + b"\n")
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def dump(path: Path, value: Any, protocol: int = 2) -> Path:
    """Write a pickle and return its path."""
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


def dump_python2(path: Path, value: Any, protocol: int = 2) -> Path:
    """Write a pickle as Python 2 and numpy 1 do, with protocol 0, 1 or 2, and return its path."""
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol).dump(value)
    path.write_bytes(buffer.getvalue().replace(b"numpy._core", b"numpy.core"))
    return path


def md5s_of(directory: Path, *names: str) -> dict[str, str]:
    """Return the md5 of files by name."""
    return {name: hashlib.md5((directory / name).read_bytes()).hexdigest() for name in names}

"""Pickles as people have them."""

import dataclasses
import hashlib
import io
import os
import pickle
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from cifar_ignite.config import DataConfig
from cifar_ignite.data import cifar10
from cifar_ignite.data.dataset import ImageDataset
from cifar_ignite.data.registry import load_dataset

CIFAR10_DIR = cifar10.CIFAR10_FILES.directory

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


def load_cifar10(root: Path, *, train: bool) -> ImageDataset:
    """Load a split of CIFAR-10."""
    return load_dataset(DataConfig().model_copy(update={"root": root}), train=train)


def use_official(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Let other names and md5s count as the official ones of CIFAR-10."""
    source = cifar10.CIFAR10_FILES.source
    names = ("base_folder", "url", "filename", "tgz_md5", "train_list", "test_list")
    values = {name: getattr(source, name) for name in names} | changes
    official = dataclasses.replace(cifar10.CIFAR10_FILES, source=SimpleNamespace(**values))
    monkeypatch.setattr(cifar10, "CIFAR10_FILES", official)

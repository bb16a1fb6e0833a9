"""Checkpoint files: complete or absent, and loaded without trust."""

import math
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from cifar_ignite.checkpointing import io
from cifar_ignite.checkpointing.io import copy_checkpoint, load_checkpoint
from cifar_ignite.errors import InputError
from tests.checkpointing.helpers import create_record, fail_saves, names_in, write_checkpoint
from tests.helpers import REPOSITORY

# --- Writing ------------------------------------------------------------------------------------------------------


def test_saved_checkpoint_loads(tmp_path):
    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "c.pt"))
    weight = torch.randn(300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(checkpoint["model"]["weight"], weight)
    assert checkpoint["record"] == create_record()
    assert checkpoint["record"].epoch == 3
    assert checkpoint["record"].val_acc == 0.5
    assert names_in(tmp_path) == ["c.pt"]


def test_saved_checkpoint_loads_with_weights_only(tmp_path):
    loaded = torch.load(write_checkpoint(tmp_path / "c.pt"), weights_only=True)
    assert loaded.keys() == {"model", "record"}


def test_failed_save_keeps_previous_file_and_leaves_nothing_else(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "c.pt")
    before = path.read_bytes()
    fail_saves(monkeypatch, lambda: True)
    with pytest.raises(OSError, match="No space"):
        write_checkpoint(path)
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["c.pt"]


@pytest.mark.parametrize("write", [write_checkpoint, lambda path: copy_checkpoint(REPOSITORY / "LICENSE", path)])
def test_written_file_is_flushed_before_rename_and_directory_after_it(tmp_path, monkeypatch, write):
    events = []
    for function in ("fsync_file", "fsync_directory"):
        monkeypatch.setattr(io, function, lambda path: events.append(path.name))
    original = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), original(*paths)))
    write(tmp_path / "c.pt")
    temp_name, *rest = events
    assert temp_name.endswith(".tmp")
    assert rest == ["rename", tmp_path.name]


def test_copy_checkpoint_creates_directory_and_replaces_file(tmp_path):
    source, target = write_checkpoint(tmp_path / "c.pt"), tmp_path / "new" / "d.pt"
    copy_checkpoint(source, target)
    write_checkpoint(source, val_acc=0.9)
    copy_checkpoint(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert names_in(target.parent) == ["d.pt"]


def test_failed_copy_keeps_previous_file(tmp_path, monkeypatch):
    source, target = write_checkpoint(tmp_path / "c.pt"), write_checkpoint(tmp_path / "d.pt", val_acc=0.9)
    before = target.read_bytes()

    def fail(source, target):
        target.write_bytes(b"half of the file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io.shutil, "copyfile", fail)
    with pytest.raises(OSError, match="No space"):
        copy_checkpoint(source, target)
    assert target.read_bytes() == before
    assert names_in(tmp_path) == ["c.pt", "d.pt"]


# --- Damaged files ------------------------------------------------------------------------------------------------


def test_load_checkpoint_notices_every_flipped_bit(tmp_path):
    """torch.load alone loads most of these files, with other weights."""
    intact = write_checkpoint(tmp_path / "c.pt").read_bytes()
    expected = load_checkpoint(tmp_path / "c.pt")
    rng = np.random.default_rng(0)
    num_refused = 0
    for _ in range(250):
        damaged = bytearray(intact)
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        (tmp_path / "d.pt").write_bytes(damaged)
        try:
            loaded = load_checkpoint(tmp_path / "d.pt")
        except InputError as error:
            num_refused += "\n" not in str(error)
        else:  # a bit of padding or of a file's time: the content is unchanged
            assert torch.equal(loaded["model"]["weight"], expected["model"]["weight"])
            assert loaded["record"] == expected["record"]
    assert num_refused > 100


def test_load_checkpoint_notices_every_truncation(tmp_path):
    intact = write_checkpoint(tmp_path / "c.pt").read_bytes()
    for size in range(0, len(intact), 97):
        (tmp_path / "d.pt").write_bytes(intact[:size])
        with pytest.raises(InputError, match="not a checkpoint, or truncated"):
            load_checkpoint(tmp_path / "d.pt")


class Payload:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def test_load_checkpoint_executes_no_code_of_malicious_file(tmp_path):
    marker = tmp_path / "marker"
    torch.save({"model": Payload(marker), "record": {}}, tmp_path / "zip.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(InputError, match="refused"):
        load_checkpoint(tmp_path / "zip.pt")
    with pytest.raises(InputError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "pickle.pt")
    assert not marker.exists()


# --- Files of another kind ----------------------------------------------------------------------------------------

RECORD = create_record().state_dict()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.zeros(1)}, "it has no model and record"),
        ([1, 2], "it has no model and record"),
        ({"model": [1], "record": {}}, "model is not a state dict"),
        ({"model": {"weight": 1}, "record": {}}, "model is not a state dict"),
        ({"model": {1: torch.zeros(1)}, "record": {}}, "model is not a state dict"),
        ({"model": {}, "ema": [1], "record": {}}, "ema is not a state dict"),
        ({"model": {}, "record": {}, "temperatures": 1.5}, "temperatures are not positive numbers"),
        ({"model": {}, "record": {}, "temperatures": {"plain": "1"}}, "temperatures are not positive numbers"),
        ({"model": {}, "record": {}, "temperatures": {"plain": 0.0}}, "temperatures are not positive numbers"),
        ({"model": {}, "record": {}, "temperatures": {"plain": math.nan}}, "temperatures are not positive numbers"),
        ({"model": {}, "record": {"other": 1}}, "invalid record"),
        ({"model": {}, "record": [1]}, "invalid record"),
        ({"model": {}, "record": RECORD | {"history": 1}}, "invalid record"),
        ({"model": {}, "record": RECORD | {"history": [{"epoch": 1}]}}, "invalid record"),
        ({"model": {}, "record": RECORD | {"config": 3}}, "invalid record"),
        ({"model": {}, "record": RECORD | {"config": {"seed": torch.zeros(1)}}}, "invalid record"),
        ({"model": {}, "record": RECORD | {"format": 3}}, "invalid record"),
    ],
)
def test_load_checkpoint_names_what_foreign_file_lacks(tmp_path, content, message):
    torch.save(content, tmp_path / "f.pt")
    with pytest.raises(InputError, match=message):
        load_checkpoint(tmp_path / "f.pt")


def test_load_checkpoint_names_format_of_previous_version(tmp_path):
    """Its configuration has the keys of before they were renamed."""
    torch.save({"model": {}, "record": RECORD | {"format": 1}}, tmp_path / "f.pt")
    with pytest.raises(InputError, match="format 1") as raised:
        load_checkpoint(tmp_path / "f.pt")
    assert "\n" not in str(raised.value)


def test_load_checkpoint_of_missing_file_directory_or_other_zip_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "missing.pt")
    with pytest.raises(InputError, match="is a directory"):
        load_checkpoint(tmp_path)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(InputError, match="damaged checkpoint"):
        load_checkpoint(tmp_path / "other.zip")


def test_load_checkpoint_of_unreadable_file_names_reason(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "c.pt")

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(io.zipfile, "ZipFile", refuse)
    with pytest.raises(InputError, match="cannot read the checkpoint: Permission denied"):
        load_checkpoint(path)

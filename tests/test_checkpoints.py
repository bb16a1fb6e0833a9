"""Files that outlive a run: whole or not there, and read with suspicion."""

import os
import pickle
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import row

from cifar_ignite import checkpoints
from cifar_ignite.checkpoints import DurableSaver, RunRecord, create_unique_dir, load_checkpoint, write_checkpoint
from cifar_ignite.config import Config, InputError


def record(val_acc=0.5, run="2026", **data):
    tree = Config().model_dump(mode="json")
    tree["data"] |= data
    return RunRecord(run, tree, ["a", "b"], [row(3, val_acc)])


def write(path, val_acc=0.5, run="2026", **data):
    torch.manual_seed(0)
    contents = {"model": {"weight": torch.randn(300)}, "record": record(val_acc, run, **data).state_dict()}
    write_checkpoint(path, contents)
    return path


def test_a_checkpoint_reads_back(tmp_path):
    checkpoint = load_checkpoint(write(tmp_path / "c.pt"))
    torch.manual_seed(0)
    assert torch.equal(checkpoint["model"]["weight"], torch.randn(300))
    assert checkpoint["record"] == record()
    assert checkpoint["record"].epoch == 3
    assert checkpoint["record"].val_acc == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_checkpoints_hold_only_what_weights_only_loads(tmp_path):
    loaded = torch.load(write(tmp_path / "c.pt"), weights_only=True)
    assert loaded.keys() == {"model", "record"}


def test_every_flipped_bit_is_noticed(tmp_path):
    """torch.load alone loads most of these, with other weights."""
    whole = write(tmp_path / "c.pt").read_bytes()
    expected = load_checkpoint(tmp_path / "c.pt")
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(250):
        damaged = bytearray(whole)
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        (tmp_path / "d.pt").write_bytes(damaged)
        try:
            loaded = load_checkpoint(tmp_path / "d.pt")
        except InputError as error:
            refused += "\n" not in str(error)
        else:  # a bit of padding or of a file time: the contents are what they were
            assert torch.equal(loaded["model"]["weight"], expected["model"]["weight"])
            assert loaded["record"] == expected["record"]
    assert refused > 100


def test_every_truncation_is_noticed(tmp_path):
    whole = write(tmp_path / "c.pt").read_bytes()
    for size in range(0, len(whole), 97):
        (tmp_path / "d.pt").write_bytes(whole[:size])
        with pytest.raises(InputError, match="not a checkpoint, or truncated"):
            load_checkpoint(tmp_path / "d.pt")


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def test_hostile_checkpoints_run_nothing(tmp_path):
    marker = tmp_path / "marker"
    torch.save({"model": Payload(marker), "record": {}}, tmp_path / "zip.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(InputError, match="refused"):
        load_checkpoint(tmp_path / "zip.pt")
    with pytest.raises(InputError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "pickle.pt")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"weight": torch.zeros(1)}, "no model and record in it"),
        ([1, 2], "no model and record in it"),
        ({"model": [1], "record": {}}, "model is no state dict"),
        ({"model": {"weight": 1}, "record": {}}, "model is no state dict"),
        ({"model": {}, "record": {"other": 1}}, "its record is another"),
        ({"model": {}, "record": [1]}, "its record is another"),
        ({"model": {}, "record": record().state_dict() | {"history": 1}}, "its record is another"),
        ({"model": {}, "record": record().state_dict() | {"history": [{"epoch": 1}]}}, "its record is another"),
        ({"model": {}, "record": record().state_dict() | {"config": 3}}, "its record is another"),
        (
            {"model": {}, "record": record().state_dict() | {"config": {"seed": torch.zeros(1)}}},
            "its record is another",
        ),
    ],
)
def test_foreign_checkpoints_are_named(tmp_path, contents, message):
    torch.save(contents, tmp_path / "f.pt")
    with pytest.raises(InputError, match=message):
        load_checkpoint(tmp_path / "f.pt")


def test_what_is_no_checkpoint_at_all_is_named(tmp_path):
    with pytest.raises(InputError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "missing.pt")
    with pytest.raises(InputError, match="is a folder"):
        load_checkpoint(tmp_path)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(InputError, match="damaged checkpoint"):
        load_checkpoint(tmp_path / "other.zip")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write(tmp_path / "c.pt")
    before = path.read_bytes()

    def fail(contents, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        write(path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["c.pt"]


def test_the_saver_removes_the_old_file_only_after_the_new_one_is_there(tmp_path, monkeypatch):
    """The order in which Ignite's Checkpoint calls: remove the old, save the new."""
    saver = DurableSaver(tmp_path)
    contents = {"model": {}, "record": {}}
    saver(contents, "one.pt")
    saver.remove("one.pt")
    assert (tmp_path / "one.pt").exists()
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.torch, "save", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            saver(contents, "two.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["one.pt"]
    saver(contents, "three.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["three.pt"]
    (tmp_path / "three.pt").unlink()
    saver.remove("three.pt")
    saver(contents, "four.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["four.pt"]


# --- The best of an experiment ------------------------------------------------------------------------------------


def publish(tmp_path, val_acc, run="2026", **data):
    source = write(tmp_path / "source.pth", val_acc, run, **data)
    return checkpoints.publish_best(source, tmp_path / "best" / "x_best.pth")


def published(tmp_path):
    return load_checkpoint(tmp_path / "best" / "x_best.pth")["record"].val_acc


def test_only_a_better_model_replaces_the_best(tmp_path):
    assert "is this run's" in publish(tmp_path, 0.5)
    assert "stays: run 2026 reached 50.00%" in publish(tmp_path, 0.5, run="2027")
    assert "stays" in publish(tmp_path, 0.4)
    assert "is this run's" in publish(tmp_path, 0.5)  # killed while it published, it publishes again
    assert published(tmp_path) == 0.5
    assert "is this run's" in publish(tmp_path, 0.6)
    assert published(tmp_path) == 0.6


def test_models_judged_on_other_images_are_not_compared(tmp_path):
    publish(tmp_path, 0.5)
    assert "other validation images" in publish(tmp_path, 0.9, source="synthetic")
    assert "other validation images" in publish(tmp_path, 0.9, split_seed=1)
    assert published(tmp_path) == 0.5


def test_an_unreadable_best_model_is_replaced(tmp_path, caplog):
    publish(tmp_path, 0.5)
    (tmp_path / "best" / "x_best.pth").write_bytes(b"rubbish")
    assert "is this run's" in publish(tmp_path, 0.1)
    assert "it is replaced" in caplog.text
    assert published(tmp_path) == 0.1


def test_models_without_validation_have_a_name_of_their_own(tmp_path):
    assert checkpoints.best_model_path(tmp_path, "se", selected=True).name == "se_best.pth"
    assert checkpoints.best_model_path(tmp_path, "se", selected=False).name == "se_val_acc_none_best.pth"
    publish(tmp_path, None)
    assert "is this run's" in publish(tmp_path, None)


def test_folders_are_unique(tmp_path):
    names = [create_unique_dir(tmp_path / "runs", "2026").name for _ in range(3)]
    assert names == ["2026", "2026_2", "2026_3"]


def test_only_old_leftovers_of_killed_processes_are_swept(tmp_path):
    for name, age in ((".best.pth.1.tmp", 7200), (".new.pth.2.tmp", 10), ("best.pth", 7200)):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    checkpoints.sweep_temporaries(tmp_path, older_than=3600)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new.pth.2.tmp", "best.pth"]
    checkpoints.sweep_temporaries(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["best.pth"]


def test_the_best_row_is_the_first_of_the_highest():
    history = [row(1, 0.3), row(2, 0.5), row(3, 0.5)]
    assert RunRecord("r", {}, [], history).best["epoch"] == 2
    assert RunRecord("r", {}, [], [row(1, None)]).best is None
    assert RunRecord("r", {}, []).best is None

"""The checks of the doctor command."""

import errno
import hashlib
import importlib.metadata
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from cifar_ignite import doctor
from cifar_ignite.data.cifar10 import CIFAR10_FILES
from tests.helpers import posix_only, snapshot, write_cifar100
from tests.helpers.images import write_photos


def parse_lines(out):
    """Return (status, text) by name of the check."""
    rows = [line.split(maxsplit=2) for line in out.splitlines()]
    return {name: (status, text) for status, name, text in rows}


def test_doctor_reports_all_checks_of_a_working_installation(command, cifar_root):
    status, out, err = command("doctor", "--set", f"data.root={cifar_root}")
    assert (status, err) == (0, "")
    results = parse_lines(out)
    assert list(results) == ["python", "torch", "packages", "onnx", "tensorboard", "device", "data", "disk"]
    for name in ("python", "torch", "packages", "onnx"):
        assert results[name][0] == "ok"
    assert importlib.metadata.version("torch") in results["torch"][1]
    # The tiny files of the tests.
    assert results["data"][0] == "warning"
    assert "not the official files: data_batch_1," in results["data"][1]


def test_doctor_reports_errors_and_warnings_with_hints(command, cifar_root, monkeypatch):
    (cifar_root / "cifar-10-batches-py" / "data_batch_3").unlink()
    version = importlib.metadata.version
    monkeypatch.setattr(doctor, "EXTRAS", {"onnx": ("no_such_package",), "tensorboard": ("json",)})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=5e8))
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "2.0.0+cpu" if name in ("torch", "json") else version(name)
    )
    monkeypatch.setattr(doctor, "PACKAGES", ("numpy", "no_such_module"))
    status, out, err = command("doctor", "--set", f"data.root={cifar_root}")
    assert status == 1
    assert err == "cifar_ignite: 3 of 8 checks failed, see above\n"
    results = parse_lines(out)
    for name, expected_status, text in (
        ("torch", "error", "are incompatible (torchvision requires torch"),
        ("torch", "error", "pip install --force-reinstall torch torchvision"),
        ("packages", "error", "no_such_module: No module named 'no_such_module'; pip install -e ."),
        ("onnx", "warning", "no_such_package not installed; optional: pip install -e '.[onnx]'"),
        ("data", "error", "cifar-10-batches-py: no file data_batch_3; "),
        ("disk", "warning", "0.5 GB free for outputs; 300 epochs need up to 2 GB"),
    ):
        assert results[name][0] == expected_status
        assert text in results[name][1]


def test_doctor_without_dataset_warns(command):
    status, out, _ = command("doctor", "--set", "data.root=missing")
    assert status == 0
    assert parse_lines(out)["data"][0] == "warning"
    assert "no CIFAR-10 in missing (missing does not exist); downloaded by the first training" in out


def test_check_torch_and_torchvision_reports_failed_import(monkeypatch):
    def fail(name):
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(doctor.importlib, "import_module", fail)
    result = doctor.check_torch_and_torchvision()
    assert result.status == "error"
    assert "are incompatible (operator torchvision::nms does not exist); install both" in str(result)


def test_check_dataset_with_broken_torchvision_refers_to_earlier_errors(tiny_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "cifar_ignite.data.cifar10", None)
    (result,) = doctor.check_dataset(tiny_config())
    assert result.status == "error"
    assert result.hint == doctor.EARLIER_ERRORS_HINT


@pytest.mark.parametrize("nesting", ["data", "data/cifar-10-batches-py", "."])
def test_check_dataset_finds_what_training_finds(tmp_path, cifar_root, tiny_config, nesting):
    (result,) = doctor.check_dataset(tiny_config(data={"root": str(tmp_path / nesting)}))
    assert result.status == "warning"
    assert f"{cifar_root / 'cifar-10-batches-py'}: not the official files" in result.message


@posix_only
def test_check_dataset_reports_what_training_refuses(tmp_path, cifar_root, tiny_config):
    directory = cifar_root / "cifar-10-batches-py"
    (directory / "data_batch_3").write_bytes(b"damaged")
    (result,) = doctor.check_dataset(tiny_config())
    assert (result.status, "data_batch_3: refused" in result.message) == ("error", True)
    shutil.rmtree(directory)
    directory.symlink_to("/mnt/gone")
    (result,) = doctor.check_dataset(tiny_config())
    assert (result.status, "which does not exist" in result.message) == ("error", True)
    (result,) = doctor.check_dataset(tiny_config(data={"root": "x" * 300}))
    assert (result.status, "cannot access this path" in result.message) == ("error", True)


def test_check_dataset_with_official_archive_is_ok(tmp_path, tiny_config, monkeypatch):
    (tmp_path / "root").mkdir()
    path = tmp_path / "root" / "cifar-10-python.tar.gz"
    path.write_bytes(b"x")
    config = tiny_config(data={"root": str(tmp_path / "root")})
    assert "is not the official archive" in doctor.check_dataset(config)[0].message
    monkeypatch.setattr(CIFAR10_FILES.source, "tgz_md5", hashlib.md5(b"x").hexdigest())
    (result,) = doctor.check_dataset(config)
    assert result.status == "ok"
    assert f"{path}: the official archive" in result.message


@posix_only
def test_check_disk_writes_and_deletes_probe_files(tmp_path, tiny_config, monkeypatch):
    def record(descriptor):
        written.add(os.path.dirname(os.readlink(f"/proc/self/fd/{descriptor}")))

    written = set()
    monkeypatch.setattr(doctor.os, "fsync", record)
    assert doctor.check_disk(tiny_config()).status in ("ok", "warning")
    assert written == {str(tmp_path)}
    for name in ("training_runs", "best_models"):
        (tmp_path / "outputs" / name).mkdir(parents=True)
    before, written = snapshot(tmp_path), set()
    doctor.check_disk(tiny_config())
    assert written == {str(tmp_path / "outputs" / name) for name in (".", "training_runs", "best_models")}
    assert snapshot(tmp_path) == before


def test_check_disk_reports_directory_that_cannot_be_written(tmp_path, tiny_config, monkeypatch):
    def fail(dir, **_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), f"{dir}/.probe-x")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", fail)
    result = doctor.check_disk(tiny_config())
    assert result.status == "error"
    assert f"cannot write to {tmp_path}" in result.message
    assert "Read-only file system" in result.message
    (result,) = doctor.check_dataset(tiny_config(data={"root": str(tmp_path / "new" / "data")}))
    assert result.status == "error"
    assert result.message == f"cannot write to {tmp_path}: Read-only file system"


@posix_only
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file", "Not a directory"),
        ("file/outputs", "Not a directory"),
        ("link", "No such file or directory"),
        ("link/outputs", "No such file or directory"),
        ("loop", "Too many levels of symbolic links"),
        ("x" * 300, "File name too long"),
    ],
)
def test_check_disk_with_unusable_path_names_it(tmp_path, tiny_config, name, reason):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("/mnt/gone/outputs")
    (tmp_path / "loop").symlink_to("loop")
    result = doctor.check_disk(tiny_config(output_dir=str(tmp_path / name)))
    assert result.status == "error"
    assert reason in result.message
    assert str(tmp_path / name).removesuffix("/outputs") in result.message


def test_check_device_reports_apple_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.backends.mps.get_name", lambda: "Apple M2")
    monkeypatch.setattr("torch.mps.recommended_max_memory", lambda: 12_000_000_000)
    result = doctor.check_device()
    assert (result.status, result.message) == ("ok", "Apple M2 (MPS), 12 GB usable, float32")


def test_check_device_warns_if_torch_cannot_use_apple_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_built", lambda: True)
    result = doctor.check_device()
    assert result.status == "warning"
    assert "torch finds no Apple GPU" in result.message


def test_check_device_has_no_side_effects(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    assert doctor.check_device().status in ("ok", "warning")
    assert not torch.backends.cudnn.deterministic


# --- Your own images ----------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos", {"train": 10, "test": 3})


def test_doctor_reports_classes_sizes_and_duplicates_of_a_folder(command, photos):
    status, out, _ = command("doctor", "--set", "data.dataset=folder", "--set", f"data.root={photos}")
    assert status == 0
    results = parse_lines(out)
    assert results["data"][0] == "ok"
    assert "3 classes; 27 train images (9 cat, 9 dog, 9 fish); 3 val images" in results["data"][1]
    assert "9 test images (3 cat, 3 dog, 3 fish)" in results["data"][1]
    assert results["sizes"][1].startswith("width x height smallest ")
    assert results["duplicates"][0] == "ok"


def test_doctor_warns_of_leakage_and_fails_for_unreadable_files(command, photos):
    shutil.copy(photos / "test" / "cat" / "001.jpg", photos / "train" / "dog" / "copy.jpg")
    (photos / "train" / "cat" / "notes.txt").write_text("no image")
    options = ("doctor", "--set", "data.dataset=folder", "--set", f"data.root={photos}")
    status, out, _ = command(*options)
    assert status == 1
    results = parse_lines(out)
    assert "train/cat/notes.txt: not an image" in out
    assert results["files"] == (
        "error", "unreadable files, listed above: 1 of train; remove them, or set data.max_unreadable=1"
    )  # fmt: skip
    lines = [line for line in out.splitlines() if line.startswith("warning  duplicates")]
    assert "1 images of test are in train too (train/dog/copy.jpg = test/cat/001.jpg)" in lines[0]
    assert "different labels" in lines[1]
    assert command(*options, "--set", "data.max_unreadable=1")[0] == 0


def test_doctor_without_test_set_warns(command, photos):
    shutil.rmtree(photos / "test")
    status, out, _ = command("doctor", "--set", "data.dataset=folder", "--set", f"data.root={photos}")
    assert status == 0
    assert parse_lines(out)["test"][0] == "warning"


def test_doctor_reports_folder_that_training_refuses(command, tmp_path):
    status, out, _ = command("doctor", "--set", "data.dataset=folder", "--set", f"data.root={tmp_path / 'none'}")
    assert status == 1
    assert "no directory train" in parse_lines(out)["data"][1]


def test_doctor_checks_official_files_of_cifar100(command, tmp_path):
    root = write_cifar100(tmp_path / "data", train=100, test=100)
    options = ("doctor", "--set", "data.dataset=cifar100", "--set", f"data.root={root}")
    status, out, _ = command(*options)
    assert status == 0
    assert parse_lines(out)["data"][0] == "warning"
    assert "cifar-100-python: not the official files: train, meta, test" in out
    (root / "cifar-100-python" / "meta").write_bytes(b"damaged")
    status, out, _ = command(*options)
    assert status == 1
    assert "meta: refused" in parse_lines(out)["data"][1]

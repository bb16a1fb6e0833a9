"""The checks of the doctor command."""

import importlib.metadata
import sys
from types import SimpleNamespace

import torch

from cifar_ignite import doctor


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
        ("data", "error", "missing files: data_batch_3; delete"),
        ("disk", "warning", "0.5 GB free for outputs; 300 epochs need up to 2 GB"),
    ):
        assert results[name][0] == expected_status
        assert text in results[name][1]


def test_doctor_without_dataset_warns(command):
    status, out, _ = command("doctor", "--set", "data.root=missing")
    assert status == 0
    assert parse_lines(out)["data"][0] == "warning"
    assert "no CIFAR-10 in missing/cifar-10-batches-py; downloaded by the first training" in out


def test_check_torch_and_torchvision_reports_failed_import(monkeypatch):
    def fail(name):
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(doctor.importlib, "import_module", fail)
    result = doctor.check_torch_and_torchvision()
    assert result.status == "error"
    assert "are incompatible (operator torchvision::nms does not exist); install both" in str(result)


def test_check_dataset_with_broken_torchvision_refers_to_earlier_errors(tiny_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "cifar_ignite.data.cifar10", None)
    result = doctor.check_dataset(tiny_config())
    assert result.status == "error"
    assert result.hint == doctor.EARLIER_ERRORS_HINT


def test_check_device_has_no_side_effects(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    assert doctor.check_device().status in ("ok", "warning")
    assert not torch.backends.cudnn.deterministic

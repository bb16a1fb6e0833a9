"""The table of all runs, and what the doctor finds."""

import importlib.metadata
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import the_run
from PIL import Image

from cifar_ignite import doctor


def test_all_runs_side_by_side(command, tiny_file, tmp_path):
    command("train", "--config", tiny_file, "--set", "train.epochs=3")
    first = the_run(tmp_path)
    command("evaluate")
    command("evaluate", "--tta", "flip")
    command("train", "--config", tiny_file, "--set", "experiment=all", "--set", "data.validation=0")
    runs = tmp_path / "outputs" / "training_runs"
    (second,) = set(runs.iterdir()) - {first}
    command("evaluate", "--model", "all", "--test-file", "none.pkl")  # refused: leaves no trace
    for name, text in (("0_begun", None), ("1_damaged", "no,metrics\n1,2\n")):
        shutil.copytree(first, runs / name)
        (runs / name / "logs" / "metrics.csv").unlink()
        if text:
            (runs / name / "logs" / "metrics.csv").write_text(text)
    foreign = tmp_path / "outputs" / "evaluations" / "foreign"
    foreign.mkdir()
    (foreign / "metrics.json").write_text('{"accuracy": 1}')

    status, out, err = command("compare")
    assert (status, err) == (0, "")
    assert "left out: 0_begun: no epoch is complete" in out
    assert f"left out: {(runs / '1_damaged').relative_to(tmp_path)}/logs/metrics.csv: not the metrics of a run" in out
    assert "foreign/metrics.json: not the metrics of an evaluation" in out
    table = pd.read_csv(tmp_path / "outputs" / "comparison.csv").set_index("run")
    assert table.index.tolist() == [first.name, second.name]
    histories = [pd.read_csv(run / "logs" / "metrics.csv") for run in (first, second)]
    row = table.loc[first.name]
    assert row[["experiment", "model", "epochs", "planned"]].tolist() == ["tiny", "hybrid_resnet", 3, 3]
    assert row["best_val_acc"] == histories[0]["val_acc"].max()
    assert row["images_per_second"] == histories[0]["images_per_second"].median()
    newest = max(
        (tmp_path / "outputs" / "evaluations").glob("tiny_*/metrics.json"), key=lambda path: path.stat().st_mtime
    )
    metrics = json.loads(newest.read_text())
    assert row["test_acc"] == metrics["accuracy"]
    assert row["test_acc_tta"] == metrics["tta"]["accuracy"]
    assert f"{row['best_val_acc']:.2%}" in out
    assert f"{row['parameters']:,}" in command("train", "--config", tiny_file)[1]
    assert table.loc[second.name][["best_val_acc", "test_acc"]].isna().all()
    assert table.loc[second.name, "experiment"] == "all"
    picture = np.asarray(Image.open(tmp_path / "outputs" / "comparison.png").convert("L"))
    assert (picture < 250).mean() > 0.03


@pytest.mark.parametrize("runs", [False, True])
def test_nothing_to_compare(command, tmp_path, runs):
    if runs:
        (tmp_path / "outputs" / "training_runs" / "begun").mkdir(parents=True)
    status, _, err = command("compare")
    assert status == 2
    assert err == "cifar_ignite: outputs/training_runs: no runs to compare; train one first: make train MODEL=se\n"


# --- The doctor ---------------------------------------------------------------------------------------------------


def lines(out):
    """State and text by what was looked at."""
    rows = [line.split(maxsplit=2) for line in out.splitlines()]
    return {what: (state, text) for state, what, text in rows}


def test_a_healthy_installation(command, cifar_root):
    status, out, err = command("doctor", "--set", f"data.root={cifar_root}")
    assert (status, err) == (0, "")
    found = lines(out)
    assert list(found) == ["python", "torch", "packages", "onnx", "tensorboard", "device", "data", "disk"]
    for what in ("python", "torch", "packages", "onnx"):
        assert found[what][0] == "ok"
    assert importlib.metadata.version("torch") in found["torch"][1]
    # Tiny files of ours.
    assert found["data"][0] == "note"
    assert "not the official files: data_batch_1," in found["data"][1]


def test_what_is_wrong_is_named_with_its_remedy(command, cifar_root, tmp_path, monkeypatch):
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
    assert err == "cifar_ignite: 3 of 8 things are wrong, see above\n"
    found = lines(out)
    for what, state, told in (
        ("torch", "wrong", "are no pair: it wants torch"),
        ("torch", "wrong", "pip install --force-reinstall torch torchvision"),
        ("packages", "wrong", "no_such_module: No module named 'no_such_module'; pip install -e ."),
        ("onnx", "note", "no_such_package not installed; if you want it: pip install -e '.[onnx]'"),
        ("data", "wrong", "lacks data_batch_3; remove"),
        ("disk", "note", "0.5 GB free for outputs; 300 epochs take up to 2 GB"),
    ):
        assert found[what][0] == state
        assert told in found[what][1]


def test_no_data_is_no_fault(command):
    status, out, _ = command("doctor", "--set", "data.root=nowhere")
    assert status == 0
    assert lines(out)["data"][0] == "note"
    assert "no CIFAR-10 at nowhere/cifar-10-batches-py; the first training downloads it" in out


def test_a_torchvision_that_does_not_import(monkeypatch):
    def fails(name):
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(doctor.importlib, "import_module", fails)
    finding = doctor.check_pair()
    assert finding.state == "wrong"
    assert "do not work together (operator torchvision::nms does not exist); install both" in str(finding)

"""The evaluate command on the tiny CIFAR-10."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from ignite.engine import Engine

from cifar_ignite.checkpointing.io import load_checkpoint
from cifar_ignite.data.cifar10 import CIFAR10_CLASSES
from cifar_ignite.evaluation import inference, report
from tests.evaluation.helpers import load_test_labels, only_evaluation, write_unlabeled_test_file
from tests.helpers import snapshot

pytestmark = pytest.mark.usefixtures("blank_figures")
SHAPES = (
    "experiment=shapes",
    "data.dataset=synthetic",
    "data.synthetic.train_size=120",
    "data.synthetic.test_size=60",
)
SYNTHETIC = ["--set", "data.dataset=synthetic", "--set", "data.synthetic.test_size=60"]


def test_evaluate_writes_predictions_and_metrics_of_best_model(command, trained_run, tmp_path, cifar_root):
    best_path = tmp_path / "outputs" / "best_models" / "tiny_best.pth"
    record = load_checkpoint(best_path)["record"]
    status, out, err = command("evaluate")
    assert (status, err) == (0, "")
    evaluation_dir = only_evaluation(tmp_path)
    assert evaluation_dir.name.startswith(f"tiny_val_acc_{100 * record.val_acc:.2f}_")
    assert sorted(path.name for path in evaluation_dir.iterdir()) == [
        "confusion_matrix.png", "coverage.png", "details.csv", "metrics.json", "mistakes.png", "model.pth",
        "predictions.csv", "reliability.png", "report.html",
    ]  # fmt: skip
    assert not os.path.isabs(os.readlink(evaluation_dir / "model.pth"))
    assert (evaluation_dir / "model.pth").resolve() == best_path.resolve()
    assert (evaluation_dir / "predictions.csv").read_text().startswith("ID,Labels\n0,")

    predictions = pd.read_csv(evaluation_dir / "predictions.csv")
    assert predictions["ID"].tolist() == list(range(30))
    accuracy = (predictions["Labels"] == load_test_labels(cifar_root)).mean()
    assert f"test accuracy {100 * accuracy:.2f}%" in out
    metrics = json.loads((evaluation_dir / "metrics.json").read_text())
    assert metrics.keys() == {
        "run", "epoch", "data", "images", "mean_confidence", "accuracy", "top2_accuracy", "loss",
        "expected_calibration_error", "classes", "environment", "temperature", "uncalibrated", "sure",
    }  # fmt: skip
    assert (metrics["run"], metrics["epoch"], metrics["images"]) == (trained_run.name, record.epoch, 30)
    assert metrics["accuracy"] == pytest.approx(accuracy)
    assert f"test loss {metrics['loss']:.4f}" in out
    for expected in ("sample predictions", "per-class metrics", "confidence: mean", evaluation_dir.name):
        assert expected in out


def test_evaluate_accepts_model_name_checkpoint_and_unlabeled_file(command, trained_run, tmp_path):
    test_file = write_unlabeled_test_file(tmp_path / "test file.pkl")
    status, out, _ = command("evaluate", "--model", "tiny", "--test-file", test_file)
    assert status == 0
    assert "test accuracy" not in out
    evaluation_dir = only_evaluation(tmp_path)
    assert pd.read_csv(evaluation_dir / "predictions.csv")["ID"].tolist() == list(range(11, -1, -1))
    assert sorted(path.name for path in evaluation_dir.iterdir()) == [
        "details.csv", "metrics.json", "model.pth", "predictions.csv", "report.html",
    ]  # fmt: skip
    metrics = json.loads((evaluation_dir / "metrics.json").read_text())
    assert metrics.keys() == {
        "run", "epoch", "data", "images", "mean_confidence", "environment", "temperature", "uncalibrated",
    }  # fmt: skip
    assert metrics["images"] == 12
    assert "unlabeled" in (evaluation_dir / "report.html").read_text()
    checkpoint = next((trained_run / "checkpoints").glob("latest_*.pt"))
    assert command("evaluate", "--checkpoint", checkpoint)[0] == 0


@pytest.mark.usefixtures("trained_run")
@pytest.mark.parametrize("tta", ["flip", "shift"])
def test_evaluate_with_tta_adds_its_metrics_to_the_plain_ones(command, tmp_path, cifar_root, drawn_figures, tta):
    command("evaluate")
    plain_dir = only_evaluation(tmp_path)
    plain_files = snapshot(plain_dir)
    status, out, _ = command("evaluate", "--tta", tta)
    assert status == 0
    (tta_dir,) = set((tmp_path / "outputs" / "evaluations").iterdir()) - {plain_dir}
    metrics = json.loads((tta_dir / "metrics.json").read_text())
    tta_metrics = metrics.pop("tta")
    assert metrics == json.loads((plain_dir / "metrics.json").read_text())
    predictions = pd.read_csv(tta_dir / f"predictions_tta_{tta}.csv")
    assert tta_metrics["name"] == tta
    assert tta_metrics["accuracy"] == pytest.approx((predictions["Labels"] == load_test_labels(cifar_root)).mean())
    assert tta_metrics["loss"] != metrics["loss"]
    assert f"test accuracy {100 * metrics['accuracy']:.2f}%, test loss {metrics['loss']:.4f}" in out
    accuracy, loss = 100 * tta_metrics["accuracy"], tta_metrics["loss"]
    assert f"with test-time augmentation ({tta}): accuracy {accuracy:.2f}%, loss {loss:.4f}" in out
    tta_files, changed = snapshot(tta_dir), {"metrics.json", "report.html"}
    assert all(tta_files[name] == content for name, content in plain_files.items() if name not in changed)


@pytest.fixture
def fixed_probabilities(monkeypatch):
    """Probabilities of the 30 test images that every evaluation predicts; the last class is never predicted."""
    probabilities = torch.from_numpy(np.random.default_rng(0).dirichlet(np.full(10, 0.3), 30)).float()
    probabilities[:, 9] = 0
    probabilities /= probabilities.sum(1, keepdim=True)

    def create_evaluator(model, forward):
        batches = iter(probabilities.log().clamp(min=-100).split(32))
        return Engine(lambda engine, batch: (next(batches), batch[1]))

    monkeypatch.setattr(inference, "create_evaluator", create_evaluator)
    return probabilities


def test_evaluate_logs_per_class_metrics_of_predictions(
    command, copy_run, cifar_root, monkeypatch, fixed_probabilities
):
    copy_run("data.val_size=0")  # without temperature
    labels, predicted = load_test_labels(cifar_root), fixed_probabilities.argmax(1).numpy()
    confidences = fixed_probabilities.amax(1).numpy()
    plotted = []
    monkeypatch.setattr(report, "plot_confusion_matrix", lambda matrix, *rest: plotted.append(matrix))
    out = command("evaluate")[1]
    matrix = np.zeros((10, 10), int)
    np.add.at(matrix, (labels, predicted), 1)
    assert np.array_equal(plotted[0], matrix)
    table = out.split("per-class metrics")[1].splitlines()
    for label, name in enumerate(CIFAR10_CLASSES):
        (row,) = [line.split() for line in table if line.split()[:1] == [name]]
        in_class, as_class = labels == label, predicted == label
        correct = (in_class & as_class).sum()
        recall, f1 = correct / in_class.sum(), 2 * correct / (in_class.sum() + as_class.sum())
        precision = f"{100 * correct / as_class.sum():.1f}%" if as_class.any() else "–"
        confidence = f"{100 * confidences[as_class].mean():.1f}%" if as_class.any() else "–"
        percentages = [f"{100 * recall:.1f}%", precision, f"{100 * f1:.1f}%"]
        share = f"{100 * as_class.mean():.1f}%"
        assert row == [name, str(in_class.sum()), *percentages, str(as_class.sum()), share, confidence]


def test_evaluate_logs_first_predictions_and_marks_errors(command, copy_run, cifar_root, fixed_probabilities):
    copy_run("data.val_size=0")  # without temperature
    labels, predicted = load_test_labels(cifar_root), fixed_probabilities.argmax(1).numpy()
    samples = command("evaluate")[1].split("sample predictions")[1].splitlines()[2:12]
    for index, line in enumerate(samples):
        words = line.split()
        assert words[:2] == [str(index), CIFAR10_CLASSES[predicted[index]]]
        assert words[2] == f"{100 * fixed_probabilities[index].max():.1f}%"
        assert words[3] == CIFAR10_CLASSES[labels[index]]
        assert words[4:] == ([] if labels[index] == predicted[index] else ["wrong"])


@pytest.fixture
def two_models(trained_run, train_once, tmp_path):
    """Best models of CIFAR-10 (tiny) and, later, of the synthetic dataset (shapes)."""
    shutil.copy(train_once(*SHAPES) / "best_models" / "shapes_best.pth", tmp_path / "outputs" / "best_models")
    for age, name in ((20, "tiny"), (10, "shapes")):
        path = tmp_path / "outputs" / "best_models" / f"{name}_best.pth"
        os.utime(path, (time.time() - age,) * 2)


@pytest.mark.usefixtures("two_models")
@pytest.mark.parametrize(
    ("options", "model", "skipped"),
    [
        ([], "shapes", None),
        (["--test-file", "test.pkl"], "tiny", "shapes"),
        (["--set", "data.dataset=cifar10"], "tiny", "shapes"),
        (["--set", "data.dataset=synthetic"], "shapes", None),
        (["--set", "data.dataset=synthetic", "--test-file", "test.pkl"], "tiny", "shapes"),
    ],
    ids=str,
)
def test_evaluate_chooses_latest_model_that_fits_the_data(command, tmp_path, options, model, skipped):
    write_unlabeled_test_file(tmp_path / "test.pkl")
    status, out, err = command("evaluate", *options)
    assert (status, err) == (0, "")
    assert only_evaluation(tmp_path).name.startswith(f"{model}_val_acc_")
    assert f"{model}_best.pth (hybrid_resnet" in out
    assert ("skipped" in out) == (skipped is not None)
    assert ("checkers" in out, "airplane" in out) == (model == "shapes", model != "shapes")
    if skipped:
        assert f"{skipped}_best.pth: trained on other data" in out


@pytest.mark.usefixtures("two_models")
@pytest.mark.parametrize(
    ("options", "model", "data"),
    [
        (["--model", "shapes", "--test-file", "test.pkl"], "shapes", "test.pkl"),
        (["--checkpoint", "outputs/best_models/shapes_best.pth", "--test-file", "test.pkl"], "shapes", "test.pkl"),
        (["--model", "shapes", "--set", "data.dataset=cifar10"], "shapes", "cifar10 test set"),
        (["--model", "tiny", *SYNTHETIC], "tiny", "synthetic test set"),
        (["--checkpoint", "outputs/best_models/tiny_best.pth", *SYNTHETIC], "tiny", "synthetic test set"),
    ],
    ids=str,
)
def test_evaluate_refuses_named_model_that_does_not_fit_the_data(command, tmp_path, options, model, data):
    write_unlabeled_test_file(tmp_path / "test.pkl")
    before = snapshot(tmp_path)
    status, _, err = command("evaluate", *options)
    assert status == 2
    assert err.count("\n") == 1
    for expected in (f"{model}_best.pth: ", data, "airplane, automobile", "stripes, checkers"):
        assert expected in err
    assert snapshot(tmp_path) == before


def test_evaluate_without_model_that_fits_is_refused(command, copy_run, tmp_path):
    copy_run(*SHAPES)
    status, _, err = command("evaluate", "--test-file", write_unlabeled_test_file(tmp_path / "test.pkl"))
    assert status == 2
    assert "shapes_best.pth: trained on the classes disk, " in err
    assert not (tmp_path / "outputs" / "evaluations").exists()


@pytest.mark.usefixtures("trained_run")
def test_evaluate_refuses_test_file_of_another_image_size(command, tmp_path):
    path = tmp_path / "outputs" / "best_models" / "tiny_best.pth"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["record"]["config"]["data"]["image_size"] = 64
    torch.save(checkpoint, path)
    status, _, err = command("evaluate", "--test-file", write_unlabeled_test_file(tmp_path / "test.pkl"))
    assert status == 2
    assert "tiny_best.pth: trained on images of 64 pixels" in err


@pytest.mark.usefixtures("trained_run")
def test_evaluate_compares_order_of_classes(command, tmp_path):
    path = tmp_path / "outputs" / "best_models" / "tiny_best.pth"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["record"]["class_names"] = checkpoint["record"]["class_names"][::-1]
    torch.save(checkpoint, path)
    status, _, err = command("evaluate")
    assert status == 2
    assert "truck, ship" in err


@pytest.mark.usefixtures("trained_run")
def test_evaluate_with_inaccessible_path_prints_one_line(command):
    for options in (
        ["--test-file", "x" * 300],
        ["--set", f"data.root={'x' * 300}"],
        ["--set", f"output_dir={'x' * 300}"],
        ["--set", "data.root=~nosuchuser/x"],
        ["--model", "x" * 300],
    ):
        status, _, err = command("evaluate", *options)
        assert status == 2
        assert err.startswith("cifar_ignite: ")
        assert err.count("\n") == 1


def test_evaluate_validates_overrides_with_the_configuration_of_the_checkpoint(command, copy_run):
    """cutmix_p + mixup_p would be above 1 with the default of cutmix_p."""
    copy_run("augment.cutmix_p=0")
    assert command("evaluate", "--set", "augment.mixup_p=0.5")[0] == 0


@pytest.mark.usefixtures("trained_run")
def test_evaluate_of_moved_outputs_works(command, tmp_path):
    command("evaluate")
    shutil.move(tmp_path / "outputs", tmp_path / "moved")
    (evaluation_dir,) = (tmp_path / "moved" / "evaluations").iterdir()
    assert load_checkpoint(evaluation_dir / "model.pth")["record"].config["experiment"] == "tiny"
    assert command("evaluate", "--set", f"output_dir={tmp_path / 'moved'}")[0] == 0


@pytest.mark.usefixtures("trained_run")
def test_evaluate_copies_checkpoint_without_symbolic_links(command, tmp_path, monkeypatch):
    def not_supported(*_):
        raise OSError("not supported")

    monkeypatch.setattr(Path, "symlink_to", not_supported)
    assert command("evaluate")[0] == 0
    model_path = only_evaluation(tmp_path) / "model.pth"
    assert not model_path.is_symlink()
    assert load_checkpoint(model_path)["record"].config["experiment"] == "tiny"


def test_evaluate_without_validation_names_directory_val_acc_none(command, copy_run, tmp_path):
    copy_run("data.val_size=0")
    assert command("evaluate", "--model", "tiny")[0] == 0
    assert only_evaluation(tmp_path).name.startswith("tiny_val_acc_none_")


@pytest.mark.usefixtures("trained_run")
def test_evaluate_to_unwritable_output_dir_prints_one_line(command, tmp_path):
    (tmp_path / "outputs" / "evaluations").write_text("a file, not a directory")
    status, _, err = command("evaluate")
    assert status == 2
    assert err.startswith("cifar_ignite: output_dir: cannot write to ")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("trained_run")
def test_evaluate_that_fails_leaves_no_directory(command, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "plot_confusion_matrix", fail)
    status, _, err = command("evaluate")
    assert status in (1, 2)
    assert "No space left on device" in err
    assert list((tmp_path / "outputs" / "evaluations").iterdir()) == []

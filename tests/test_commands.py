"""The whole path as a person types it, on tiny data in the real file format."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY, assert_same_training, snapshot, the_run
from ignite.engine import Engine
from PIL import Image
from torchvision.transforms.v2 import functional

from cifar_ignite import evaluate as evaluation
from cifar_ignite import report
from cifar_ignite.checkpoints import load_checkpoint
from cifar_ignite.config import load_config
from cifar_ignite.data import CIFAR10_CLASSES
from cifar_ignite.evaluate import average_views


def test_train_then_evaluate_then_read_everything_back(command, tiny_file, tmp_path, cifar_root):
    status, out, err = command("train", "--config", tiny_file, "--set", "train.epochs=5")
    assert (status, err) == (0, "")
    run_dir = the_run(tmp_path)
    for expected in ('experiment="tiny"', "parameters on cpu", "epoch 5/5", "best validation accuracy", str(run_dir)):
        assert expected in out

    assert load_config(run_dir / "config.json").experiment == "tiny"
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    # 100 training images in batches of 32: 4 iterations an epoch.
    assert [name for name in names if not name.startswith("best")] == [
        "epoch_0002.pt", "epoch_0004.pt", "latest_000000016.pt", "latest_000000020.pt",
    ]  # fmt: skip
    for name in names:
        assert load_checkpoint(run_dir / "checkpoints" / name)["record"].config["experiment"] == "tiny"

    table = pd.read_csv(run_dir / "logs" / "metrics.csv")
    assert table["epoch"].tolist() == [1, 2, 3, 4, 5]
    assert table.notna().all().all()
    assert table[["train_acc", "val_acc"]].stack().between(0, 1).all()
    assert (table["images_per_second"] * table["seconds"]).tolist() == pytest.approx([100] * 5)
    # lr is that of the last iteration of each epoch, of 20 in all.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=20, cycle_momentum=False)
    seen = []
    for _ in range(20):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step() if len(seen) < 20 else None
    assert table["lr"].tolist() == pytest.approx(seen[3::4], abs=1e-9)
    assert "epoch 5/5" in (run_dir / "logs" / "training.log").read_text()
    for name in ("loss", "accuracy", "learning_rate"):
        assert Image.open(run_dir / "logs" / "figures" / f"{name}.png").size[0] > 300
    events = b"".join(path.read_bytes() for path in (run_dir / "logs" / "tensorboard").iterdir())
    for tag in (b"train/loss", b"train/acc", b"val/loss", b"val/acc", b"lr"):
        assert tag in events

    best = load_checkpoint(tmp_path / "outputs" / "best_models" / "tiny_best.pth")
    assert best["record"].val_acc == table["val_acc"].max()
    assert best["record"].epoch == table["val_acc"].idxmax() + 1

    status, out, err = command("evaluate")
    assert (status, err) == (0, "")
    (folder,) = (tmp_path / "outputs" / "evaluations").iterdir()
    assert folder.name.startswith(f"tiny_val_acc_{100 * best['record'].val_acc:.2f}_")
    assert sorted(path.name for path in folder.iterdir()) == [
        "confusion_matrix.png", "details.csv", "metrics.json", "mistakes.png", "model.pth", "predictions.csv",
        "reliability.png", "report.html",
    ]  # fmt: skip
    assert not os.path.isabs(os.readlink(folder / "model.pth"))
    assert (folder / "model.pth").resolve() == (tmp_path / "outputs" / "best_models" / "tiny_best.pth").resolve()
    assert (folder / "predictions.csv").read_text().startswith("ID,Labels\n0,")

    predictions = pd.read_csv(folder / "predictions.csv")
    assert predictions["ID"].tolist() == list(range(30))
    with (cifar_root / "cifar-10-batches-py" / "test_batch").open("rb") as file:
        labels = pickle.load(file, encoding="bytes")[b"labels"]
    accuracy = (predictions["Labels"] == labels).mean()
    assert f"test accuracy {100 * accuracy:.2f}%" in out
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["run"], metrics["epoch"], metrics["images"]) == (run_dir.name, best["record"].epoch, 30)
    assert metrics["accuracy"] == pytest.approx(accuracy)
    assert f"test loss {metrics['loss']:.4f}" in out
    for expected in ("sample predictions", "by class", "confidence: mean", folder.name):
        assert expected in out


def unlabelled(path: Path) -> Path:
    rows = np.random.default_rng(0).integers(0, 256, (12, 3072), dtype=np.uint8)
    path.write_bytes(pickle.dumps({b"data": rows, b"ids": np.arange(12)[::-1].copy()}))
    return path


def test_evaluate_takes_a_checkpoint_a_model_and_an_unlabelled_file(command, tiny_file, tmp_path):
    command("train", "--config", tiny_file)
    test_file = unlabelled(tmp_path / "test file.pkl")
    status, out, _ = command("evaluate", "--model", "tiny", "--test-file", test_file)
    assert status == 0
    assert "test accuracy" not in out
    (folder,) = (tmp_path / "outputs" / "evaluations").iterdir()
    assert pd.read_csv(folder / "predictions.csv")["ID"].tolist() == list(range(11, -1, -1))
    assert sorted(path.name for path in folder.iterdir()) == [
        "details.csv", "metrics.json", "model.pth", "predictions.csv", "report.html",
    ]  # fmt: skip
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics.keys() == {"run", "epoch", "data", "images", "mean_confidence"}
    assert metrics["images"] == 12
    assert "not known" in (folder / "report.html").read_text()
    state = next((the_run(tmp_path) / "checkpoints").glob("latest_*.pt"))
    assert command("evaluate", "--checkpoint", state)[0] == 0


@pytest.mark.parametrize("tta", ["flip", "shift"])
def test_test_time_augmentation_stands_beside_the_plain_figure(command, tiny_file, tmp_path, cifar_root, tta):
    command("train", "--config", tiny_file)
    command("evaluate")
    (plain,) = (tmp_path / "outputs" / "evaluations").iterdir()
    before = snapshot(plain)
    status, out, _ = command("evaluate", "--tta", tta)
    assert status == 0
    (folder,) = set((tmp_path / "outputs" / "evaluations").iterdir()) - {plain}
    metrics = json.loads((folder / "metrics.json").read_text())
    averaged = metrics.pop("tta")
    assert metrics == json.loads((plain / "metrics.json").read_text())
    predictions = pd.read_csv(folder / f"predictions_tta_{tta}.csv")
    with (cifar_root / "cifar-10-batches-py" / "test_batch").open("rb") as file:
        labels = pickle.load(file, encoding="bytes")[b"labels"]
    assert averaged["name"] == tta
    assert averaged["accuracy"] == pytest.approx((predictions["Labels"] == labels).mean())
    assert averaged["loss"] != metrics["loss"]
    assert f"test accuracy {100 * metrics['accuracy']:.2f}%, test loss {metrics['loss']:.4f}" in out
    accuracy, loss = 100 * averaged["accuracy"], averaged["loss"]
    assert f"with test-time augmentation ({tta}): accuracy {accuracy:.2f}%, loss {loss:.4f}" in out
    after, told = snapshot(folder), ("metrics.json", "report.html")
    assert {name: after[name] for name in before if name not in told} == {
        name: content for name, content in before.items() if name not in told
    }


def test_views_are_weighted_means_of_what_torchvision_shows():
    """A linear model that sees each pixel differently."""
    torch.manual_seed(0)
    images, weights = torch.rand(4, 3, 32, 32), torch.randn(3 * 32 * 32, 10)

    def forward(batch):
        return batch.flatten(1) @ weights

    def both(batch):
        return (forward(batch) + forward(functional.horizontal_flip(batch))) / 2

    padded = functional.pad(images, [1], padding_mode="reflect")
    up_left, down_right = (functional.crop(padded, at, at, 32, 32) for at in (2, 0))
    assert torch.allclose(average_views(forward, "flip")(images), both(images), atol=1e-4)
    expected = 0.5 * both(images) + 0.25 * both(up_left) + 0.25 * both(down_right)
    assert torch.allclose(average_views(forward, "shift")(images), expected, atol=1e-4)


def test_statistics_are_those_of_the_predictions(command, tiny_file, tmp_path, cifar_root, monkeypatch):
    """Against figures computed here from a known table of probabilities."""
    command("train", "--config", tiny_file)
    rng = np.random.default_rng(0)
    probabilities = torch.from_numpy(rng.dirichlet(np.full(10, 0.3), 30)).float()
    probabilities[:, 9] = 0  # truck is never predicted
    probabilities /= probabilities.sum(1, keepdim=True)
    with (cifar_root / "cifar-10-batches-py" / "test_batch").open("rb") as file:
        labels = np.array(pickle.load(file, encoding="bytes")[b"labels"])
    predicted = probabilities.argmax(1).numpy()

    def perfect(model, forward):
        rows = iter(probabilities.log().clamp(min=-100).split(32))
        return Engine(lambda engine, batch: (next(rows), batch[1]))

    monkeypatch.setattr(evaluation, "create_evaluator", perfect)
    drawn = []
    monkeypatch.setattr(report, "draw_confusion_matrix", lambda matrix, *rest: drawn.append(matrix))
    out = command("evaluate")[1]
    matrix = np.zeros((10, 10), int)
    np.add.at(matrix, (labels, predicted), 1)
    assert np.array_equal(drawn[0], matrix)
    table = out.split("by class")[1].splitlines()
    for label, name in enumerate(CIFAR10_CLASSES):
        (row,) = [line.split() for line in table if line.split()[:1] == [name]]
        of_class, as_class = labels == label, predicted == label
        right = (of_class & as_class).sum()
        recall, precision = right / of_class.sum(), right / max(1, as_class.sum())
        f1 = 2 * right / (of_class.sum() + as_class.sum())
        confidence = f"{100 * probabilities.max(1).values.numpy()[as_class].mean():.1f}%" if as_class.any() else "–"
        shares = [f"{100 * value:.1f}%" for value in (recall, precision, f1)]
        expected = [
            name,
            str(of_class.sum()),
            *shares,
            str(as_class.sum()),
            f"{100 * as_class.mean():.1f}%",
            confidence,
        ]
        assert row == expected
    samples = out.split("sample predictions")[1].splitlines()[2:12]
    for number, line in enumerate(samples):
        words = line.split()
        assert words[:2] == [str(number), CIFAR10_CLASSES[predicted[number]]]
        assert words[2] == f"{100 * probabilities[number].max():.1f}%"
        assert words[3] == CIFAR10_CLASSES[labels[number]]
        assert words[4:] == ([] if labels[number] == predicted[number] else ["wrong"])


def test_classes_are_called_as_the_model_calls_them(command, tiny_file, tmp_path):
    options = ["--set", "data.source=synthetic", "--set", "data.synthetic.train_size=120"]
    command("train", "--config", tiny_file, *options)
    out = command("evaluate", "--test-file", unlabelled(tmp_path / "test.pkl"))[1]
    assert "checkers" in out
    assert "airplane" not in out


def test_overrides_of_evaluation_are_judged_beside_the_configuration_of_the_model(command, tiny_file):
    command("train", "--config", tiny_file, "--set", "augment.cutmix_p=0")
    assert command("evaluate", "--set", "augment.mixup_p=0.5")[0] == 0


def test_outputs_can_be_moved(command, tiny_file, tmp_path):
    command("train", "--config", tiny_file)
    command("evaluate")
    shutil.move(tmp_path / "outputs", tmp_path / "elsewhere")
    (folder,) = (tmp_path / "elsewhere" / "evaluations").iterdir()
    assert load_checkpoint(folder / "model.pth")["record"].config["experiment"] == "tiny"
    assert command("evaluate", "--set", f"output_dir={tmp_path / 'elsewhere'}")[0] == 0


def test_running_the_saved_configuration_reproduces_the_run(command, tiny_file, tmp_path):
    command("train", "--config", tiny_file, "--set", "seed=5")
    first = the_run(tmp_path)
    command("train", "--config", first / "config.json", "--set", f"output_dir={tmp_path / 'again'}")
    (second,) = (tmp_path / "again" / "training_runs").iterdir()
    assert_same_training(first, second)


def test_without_validation_the_last_model_is_kept_and_named_so(command, tiny_file, tmp_path):
    status, out, _ = command("train", "--config", tiny_file, "--set", "data.validation=0", "--set", "train.patience=1")
    assert status == 0
    assert "epoch 2/2" in out
    table = pd.read_csv(the_run(tmp_path) / "logs" / "metrics.csv")
    assert table["val_acc"].isna().all()
    command("evaluate", "--model", "tiny")
    (folder,) = (tmp_path / "outputs" / "evaluations").iterdir()
    assert folder.name.startswith("tiny_val_acc_none_")
    model = load_checkpoint(folder / "model.pth")
    last = load_checkpoint(max((the_run(tmp_path) / "checkpoints").glob("latest_*.pt")))
    assert all(torch.equal(model["model"][key], last["model"][key]) for key in last["model"])


def test_a_diverging_run_stops_with_status_1_and_keeps_what_was_good(command, tiny_file, tmp_path):
    """A learning rate that overflows: the message names the iteration, and what was saved before loads."""
    status, _, err = command("train", "--config", tiny_file, "--set", "optimizer.lr=1e30", "--set", "train.epochs=30")
    assert status == 1
    assert re.match(r"cifar_ignite: the (gradient|validation loss) is not finite at epoch \d+, iteration \d+", err)
    assert "newest state before it: " in err
    assert err.count("\n") == 1
    for path in (the_run(tmp_path) / "checkpoints").iterdir():
        weights = load_checkpoint(path)["model"]
        assert all(weight.isfinite().all() for weight in weights.values())


def test_models_and_help(command):
    assert "2,820,390" in command("models")[1]
    for arguments in (["--help"], ["train", "--help"], ["evaluate", "--help"]):
        status, out, err = command(*arguments)
        assert (status, err) == (0, "")
        assert "usage: cifar_ignite" in out


def test_a_torchvision_of_another_torch_is_explained(command, monkeypatch):
    def mismatch():
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("cifar_ignite.models.describe_models", mismatch)
    status, _, err = command("models")
    assert status == 1
    assert "torch and torchvision are no pair" in err
    assert err.count("\n") == 1


def test_without_links_the_model_is_copied(command, tiny_file, tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("not supported")

    command("train", "--config", tiny_file)
    monkeypatch.setattr(Path, "symlink_to", no_links)
    assert command("evaluate")[0] == 0
    (folder,) = (tmp_path / "outputs" / "evaluations").iterdir()
    assert not (folder / "model.pth").is_symlink()
    assert load_checkpoint(folder / "model.pth")["record"].config["experiment"] == "tiny"


def test_it_runs_as_a_module_without_make(tmp_path, tiny_file):
    """A real process: embedded data, a folder with a space and an umlaut in its name."""
    outputs = tmp_path / "Ausgänge 1"
    arguments = ["--config", tiny_file, "--set", "data.source=synthetic", "--set", "data.synthetic.train_size=120"]
    arguments += ["--set", f"output_dir={outputs}", "--set", "train.epochs=1"]
    done = subprocess.run(
        [sys.executable, "-m", "cifar_ignite", "train", *map(str, arguments)],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (outputs / "best_models" / "tiny_best.pth").exists()


# --- make ---------------------------------------------------------------------------------------------------------


def make(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_make_alone_explains_itself():
    out = make().stdout
    for target in ("demo", "test", "train", "evaluate", "predict", "export", "compare", "doctor", "lint"):
        assert f"make {target}" in out


def test_make_passes_what_was_typed_safely(tmp_path):
    """Paths with spaces and quotes arrive as one argument: the run that make starts writes there."""
    outputs = tmp_path / "it's here"
    done = make(
        "train", "MODEL=demo", "EPOCHS=1", "SEED=4", f"OUTPUT_DIR={outputs}", "VIRTUAL_ENV=" + sys.prefix,
        "SET=data.synthetic.train_size=80 data.validation=20 model.width=2 train.log_every=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run_dir,) = (outputs / "training_runs").iterdir()
    config = load_config(run_dir / "config.json")
    assert (config.train.epochs, config.seed, config.model.width) == (1, 4, 2)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (["train", "MODEL=stochastic"], "--config 'configs/stochastic.json'"),
        (["train", "MODEL=se", "RECIPE=fast"], "--config 'configs/se_fast.json'"),
        (["train", "DATA=synthetic"], "--set experiment='se_synthetic'"),
        (["evaluate", "RECIPE=fast"], "--model 'se_fast'"),
        (["evaluate", "TTA=1"], "evaluate --tta 'flip'"),
        (["evaluate", "TTA=shift"], "evaluate --tta 'shift'"),
        (["predict", "IMAGES=it's here/a b.png", "TTA=1"], r"predict --tta 'flip' -- 'it'\''s here/a b.png'"),
        (["predict", "IMAGES=-x", "MODEL=hybrid"], "predict --model 'hybrid' -- '-x'"),
        (["export", "MODEL=se", "RECIPE=best"], "export --model 'se_best'"),
        (["export", "CHECKPOINT=a b.pth"], "export --checkpoint 'a b.pth'"),
        (["compare", "OUTPUT_DIR=a b"], "compare --set output_dir='a b'"),
        (["doctor", "DATA_DIR=a b"], "doctor --set data.root='a b'"),
        (["tensorboard", "OUTPUT_DIR=a b"], "--logdir 'a b/training_runs'"),
        (["demo", "SET=data.validation=9"], "evaluate --model demo --set 'data.validation=9'"),
        (
            [".venv/.stamp", "TORCH_INDEX=https://a/b", "VIRTUAL_ENV=", "-B"],
            "--index-url 'https://a/b' torch torchvision",
        ),
        (["train", "DATA=cifar10"], "--set data.source='cifar10'"),
        (["train", "RESUME=latest"], "--resume 'latest'"),
        (["train", "DATA_DIR=/a b/it's"], r"--set data.root='/a b/it'\''s'"),
        (["train", "SET=optimizer.lr=0.1 augment.cutmix_p=0"], "--set 'optimizer.lr=0.1' --set 'augment.cutmix_p=0'"),
        (["evaluate", "MODEL=se", "DATA=synthetic"], "--model 'se_synthetic'"),
        (["evaluate", "CHECKPOINT=$(HOME)", "TEST_FILE=b c"], "--checkpoint '$(HOME)' --test-file 'b c'"),
    ],
)
def test_make_variables(variables, expected):
    out = make("-n", *variables).stdout
    assert expected in " ".join(out.replace("\\\n", " ").split())


def test_configurations_are_valid_json_that_people_can_read():
    for path in (REPOSITORY / "configs").glob("*.json"):
        assert json.loads(path.read_text())
        assert max(len(line) for line in path.read_text().splitlines()) < 250

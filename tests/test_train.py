"""The train command on the tiny CIFAR-10."""

import re

import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves

from cifar_ignite.checkpointing.io import load_checkpoint
from cifar_ignite.config_io import load_config
from tests.helpers import assert_same_training, only_run
from tests.helpers.runs import latest_checkpoint, set_options


def onecycle_lrs(max_lr, iterations):
    """Return the learning rate of each iteration by torch's own schedule."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=max_lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr, total_steps=iterations, cycle_momentum=False)
    lrs = schedule.get_last_lr()
    for _ in range(iterations - 1):
        optimizer.step()
        schedule.step()
        lrs += schedule.get_last_lr()
    return lrs


def test_train_writes_checkpoints_logs_and_best_model(command, tiny_file, tmp_path):
    status, out, err = command("train", "--config", tiny_file, *set_options({"train.epochs": 5}))
    assert (status, err) == (0, "")
    run_dir = only_run(tmp_path)
    for expected in ('experiment="tiny"', "device      cpu, ", "epoch 5/5", "best validation accuracy", str(run_dir)):
        assert expected in out
    assert load_config(run_dir / "config.json").experiment == "tiny"
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    # 100 training images in batches of 32: 4 iterations per epoch.
    assert [name for name in names if not name.startswith("best_epoch_")] == [
        "epoch_0002.pt", "epoch_0004.pt", "latest_000000016.pt", "latest_000000020.pt",
    ]  # fmt: skip
    for name in names:
        assert load_checkpoint(run_dir / "checkpoints" / name)["record"].config["experiment"] == "tiny"

    table = pd.read_csv(run_dir / "logs" / "metrics.csv")
    assert table["epoch"].tolist() == [1, 2, 3, 4, 5]
    assert table.notna().all().all()
    assert table[["train_acc", "val_acc"]].stack().between(0, 1).all()
    assert (table["images_per_second"] * table["seconds"]).tolist() == pytest.approx([100] * 5)
    # The learning rate is that of the last iteration of each epoch.
    assert table["lr"].tolist() == pytest.approx(onecycle_lrs(0.05, 20)[3::4], abs=1e-9)
    assert "epoch 5/5" in (run_dir / "logs" / "training.log").read_text()
    for name in ("loss", "accuracy", "learning_rate"):
        assert Image.open(run_dir / "logs" / "figures" / f"{name}.png").size[0] > 300
    events = b"".join(path.read_bytes() for path in (run_dir / "logs" / "tensorboard").iterdir())
    for tag in (b"train/loss", b"train/acc", b"val/loss", b"val/acc", b"lr"):
        assert tag in events

    best = load_checkpoint(tmp_path / "outputs" / "best_models" / "tiny_best.pth")["record"]
    assert best.val_acc == table["val_acc"].max()
    assert best.epoch == table["val_acc"].idxmax() + 1


@pytest.mark.usefixtures("blank_figures")
def test_training_with_saved_configuration_reproduces_run(command, copy_run, tmp_path):
    first = copy_run("seed=5")
    command("train", "--config", first / "config.json", *set_options({"output_dir": tmp_path / "again"}))
    (second,) = (tmp_path / "again" / "training_runs").iterdir()
    assert_same_training(first, second)


@pytest.mark.usefixtures("blank_figures")
def test_train_without_validation_keeps_last_model(command, tiny_file, tmp_path):
    """Early stopping is off, and the name of the best model contains val_acc_none."""
    status, out, _ = command("train", "--config", tiny_file, *set_options({"data.val_size": 0, "train.patience": 1}))
    assert status == 0
    assert "epoch 2/2" in out
    table = pd.read_csv(only_run(tmp_path) / "logs" / "metrics.csv")
    assert table["val_acc"].isna().all()
    best = load_checkpoint(tmp_path / "outputs" / "best_models" / "tiny_val_acc_none_best.pth")
    last = load_checkpoint(latest_checkpoint(only_run(tmp_path)))
    assert all(torch.equal(best["model"][name], weight) for name, weight in last["model"].items())


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("ema_decay", ["null", 0.5])
def test_diverging_run_exits_with_1_and_saves_finite_values_only(command, tiny_file, tmp_path, ema_decay):
    """With a learning rate that overflows, and a checkpoint after every iteration."""
    options = {"optimizer.lr": 1e30, "train.epochs": 30, "train.ema_decay": ema_decay, "train.save_every_seconds": 0}
    words = set_options(options)
    status, _, err = command("train", "--config", tiny_file, *words)
    assert status == 1
    assert re.match(r"cifar_ignite: the (gradient|validation loss) is not finite at epoch \d+, iteration \d+", err)
    assert "latest checkpoint before it: " in err
    assert err.count("\n") == 1
    paths = list((only_run(tmp_path) / "checkpoints").iterdir())
    assert paths
    for path in paths:
        leaves = tree_leaves(torch.load(path, weights_only=True))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        assert all(tensor.isfinite().all() for tensor in tensors), path

"""The figure of the first training batch."""

import numpy as np
import torch
from PIL import Image

from cifar_ignite.augment.elementwise import normalize
from cifar_ignite.config import AugmentConfig
from cifar_ignite.training.batch_figure import to_uint8
from tests.helpers import only_run
from tests.helpers.runs import latest_checkpoint


def test_to_uint8_undoes_normalization():
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    normalized = normalize(images / 255, *AugmentConfig().normalization)
    assert torch.equal(to_uint8(normalized, AugmentConfig()), images.permute(0, 2, 3, 1))


def test_run_draws_first_batch_and_trains_the_same_without(command, tiny_file, tmp_path, monkeypatch):
    assert command("train", "--config", tiny_file)[0] == 0
    first = only_run(tmp_path)
    figure = first / "logs" / "figures" / "train_batch.png"
    assert (np.asarray(Image.open(figure).convert("L")) < 250).mean() > 0.2
    monkeypatch.setattr("cifar_ignite.training.state.attach_batch_figure", lambda *arguments: None)
    assert command("train", "--config", tiny_file)[0] == 0
    (second,) = set(first.parent.iterdir()) - {first}
    assert not (second / "logs" / "figures" / "train_batch.png").exists()
    weights, others = (torch.load(latest_checkpoint(run), weights_only=True)["model"] for run in (first, second))
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_resumed_run_keeps_figure_of_its_first_batch(command, tiny_file, tmp_path):
    assert command("train", "--config", tiny_file, "--set", "train.epochs=1")[0] == 0
    figure = only_run(tmp_path) / "logs" / "figures" / "train_batch.png"
    before = figure.read_bytes(), figure.stat().st_mtime_ns
    assert command("train", "--config", tiny_file, "--resume", "latest", "--set", "train.epochs=2")[0] == 0
    assert (figure.read_bytes(), figure.stat().st_mtime_ns) == before


def test_figure_that_cannot_be_drawn_is_a_warning(command, tiny_file, monkeypatch):
    def fail(*_):
        raise OSError("no fonts")

    monkeypatch.setattr("cifar_ignite.image_plots.plot_train_batch", fail)
    status, out, _ = command("train", "--config", tiny_file)
    assert status == 0
    assert "cannot write train_batch.png (no fonts); training continues without it" in out

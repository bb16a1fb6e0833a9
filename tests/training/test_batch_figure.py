"""The figure of the first training batch."""

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_ignite.augment.elementwise import normalize
from cifar_ignite.config import AugmentConfig
from cifar_ignite.train import train
from cifar_ignite.training.batch_figure import to_uint8
from tests.helpers import assert_same_training, only_run
from tests.helpers.runs import Stop, call_at_iteration, stop


def test_to_uint8_undoes_normalization():
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    normalized = normalize(images / 255, *AugmentConfig().normalization)
    assert torch.equal(to_uint8(normalized, AugmentConfig()), images.permute(0, 2, 3, 1))


def figure_of(run_dir):
    return run_dir / "logs" / "figures" / "train_batch.png"


def test_first_batch_is_drawn(tiny_config, tmp_path):
    with pytest.raises(Stop):
        train(tiny_config(), attach=call_at_iteration(1, stop))
    assert (np.asarray(Image.open(figure_of(only_run(tmp_path))).convert("L")) < 250).mean() > 0.2


@pytest.mark.usefixtures("blank_figures")
def test_run_with_figure_of_its_first_batch_trains_the_same_as_without(trained_run, tiny_config, tmp_path, monkeypatch):
    assert figure_of(trained_run).exists()
    monkeypatch.setattr("cifar_ignite.training.state.attach_batch_figure", lambda *arguments: None)
    other = train(tiny_config(), overrides=[f"output_dir={tmp_path / 'other'}"]).run_dir
    assert not figure_of(other).exists()
    assert_same_training(trained_run, other)


@pytest.mark.usefixtures("blank_figures")
def test_resumed_run_keeps_figure_of_its_first_batch(trained_run, tiny_config):
    figure_of(trained_run).write_bytes(b"kept")
    train(tiny_config(), resume=trained_run, overrides=["train.epochs=3"])
    assert figure_of(trained_run).read_bytes() == b"kept"


@pytest.mark.usefixtures("blank_figures")
def test_figure_that_cannot_be_drawn_is_a_warning(command, tiny_file, monkeypatch):
    def fail(*_):
        raise OSError("no fonts")

    monkeypatch.setattr("cifar_ignite.image_plots.plot_train_batch", fail)
    status, out, _ = command("train", "--config", tiny_file)
    assert status == 0
    assert "cannot write train_batch.png (no fonts); training continues without it" in out

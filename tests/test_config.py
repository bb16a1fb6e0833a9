"""The configuration schema: markers on fields, and every key has an effect."""

import copy
import json

import pandas as pd
import pytest
import torch
from ignite.engine import Events

from cifar_ignite.checkpointing.io import load_checkpoint
from cifar_ignite.config import OPTIMIZER_LAYOUT_KEYS, RESOLVED_KEYS, RESUME_SAFE_KEYS, Config
from cifar_ignite.config_fields import Section
from cifar_ignite.config_io import flatten_dict, parse_config
from cifar_ignite.evaluate import evaluate
from cifar_ignite.train import train
from tests.helpers.images import write_photos
from tests.helpers.runs import Stop, latest_checkpoint, stop

pytestmark = pytest.mark.usefixtures("blank_figures")
KEYS = set(flatten_dict(Config().model_dump(mode="json")))


def test_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 1


def test_resume_safe_keys_are_those_marked():
    assert set(RESUME_SAFE_KEYS) == {
        "experiment",
        "output_dir",
        "device",
        "compile",
        "data.root",
        "train.checkpoint_every",
        "train.save_every_seconds",
        "train.max_save_failures",
        "train.log_every",
        "unsure_below",
    }


def test_optimizer_layout_keys_are_those_marked():
    assert set(OPTIMIZER_LAYOUT_KEYS) == {"optimizer.name"}


def test_resolved_keys_are_those_marked():
    assert set(RESOLVED_KEYS) == {"data.val_size", "augment.mean", "augment.std"}


# --- Every key has an effect --------------------------------------------------------------------------------------

# A value of each key that changes a short training: its batches, its weights or its files.
EFFECTS = {
    "seed": 1,
    "data.batch_size": 25,
    "data.val_size": 30,
    "data.split_seed": 1,
    "data.dataset": "synthetic",
    "augment.flip_p": 0.0,
    "augment.flip_mode": "alternating",
    "augment.crop_padding": 4,
    "augment.rotation_degrees": 5.0,
    "augment.perspective_p": 0.0,
    "augment.distortion_scale": 0.5,
    "augment.brightness": 0.0,
    "augment.contrast": 0.0,
    "augment.saturation": 0.0,
    "augment.hue": 0.0,
    "augment.trivial_augment": "wide",
    "augment.strong_off_fraction": 0.5,
    "augment.erasing_p": 1.0,
    "augment.erasing_scale": [0.3, 0.4],
    "augment.erasing_ratio": [1.0, 1.1],
    "augment.cutout_size": 8,
    "augment.cutmix_p": 0.0,
    "augment.cutmix_alpha": 0.1,
    "augment.mean": [0.5, 0.5, 0.5],
    "augment.std": [0.3, 0.3, 0.3],
    "model.name": "stochastic_resnet",
    "model.width": 3,
    "model.dropout": 0.0,
    "model.zero_init_residual": True,
    "model.se_reduction": 1,
    "model.drop_path_rate": 0.5,
    "optimizer.name": "muon",
    "optimizer.lr": 0.1,
    "optimizer.momentum": 0.5,
    "optimizer.nesterov": True,
    "optimizer.weight_decay": 0.1,
    "schedule.name": "cosine",
    "schedule.warmup_fraction": 0.6,
    "schedule.div_factor": 5.0,
    "schedule.final_div_factor": 2.0,
    "train.epochs": 1,
    "train.label_smoothing": 0.0,
    "train.clip_grad_norm": 0.01,
    "train.ema_decay": 0.5,
    "train.drop_path_decay_fraction": 1.0,
    "train.checkpoint_every": 1,
    "train.save_every_seconds": 0,
}
# The same, with overrides without which the key has no effect.
EFFECTS_WITH_OVERRIDES = {
    "optimizer.decay_norm_and_bias": (False, ["optimizer.weight_decay=0.1"]),
    "optimizer.muon_lr": (0.3, ["optimizer.name=muon"]),
    "optimizer.muon_momentum": (0.9, ["optimizer.name=muon"]),
    "augment.padding_mode": ("constant", ["augment.crop_padding=8"]),
    "augment.mixup_p": (0.9, ["augment.cutmix_p=0"]),
    "augment.mixup_alpha": (5.0, ["augment.cutmix_p=0", "augment.mixup_p=1"]),
    "data.synthetic.train_size": (100, ["data.dataset=synthetic", "data.synthetic.train_size=120"]),
    "data.synthetic.seed": (5, ["data.dataset=synthetic", "data.synthetic.train_size=120"]),
    "data.image_size": (16, ["data.dataset=synthetic", "data.synthetic.train_size=120"]),
    "precision": ("bf16", ["precision=fp32"]),
    "train.patience": (1, ["train.epochs=4", "optimizer.lr=1e-9"]),
}
# Keys that change where and how a run is made but not what it learns: for these, a test records that they are read.
READ_KEYS = {
    "experiment",
    "output_dir",
    "unsure_below",
    "device",
    "compile",
    "data.root",
    "data.max_unreadable",
    "data.synthetic.test_size",
    "train.log_every",
    "train.sync_batch_norm",
    "train.max_save_failures",
}


# Keys whose effect needs a complete run, of the epochs after the first or of what is saved.
RUN_KEYS = {
    "train.epochs",
    "train.ema_decay",
    "train.drop_path_decay_fraction",
    "train.checkpoint_every",
    "train.save_every_seconds",
    "train.patience",
}
ITERATIONS = 4  # the lowest learning rate counts once the rate falls


def capture_batches(config):
    """Return the first training batch of each of two epochs and all validation batches of a run."""
    captured = []

    def capture(state):
        for epoch in range(2):
            state.train_loader.iteration = epoch * len(state.train_loader)
            captured.extend(state.train_loader.peek())
        captured.extend(tensor for batch in state.val_loader for tensor in batch)
        raise Stop

    with pytest.raises(Stop):
        train(config, attach=capture)
    return captured


def capture_weights(config):
    """Return the weights after a few iterations of a run."""
    captured = []

    def attach(state):
        @state.trainer.on(Events.ITERATION_COMPLETED(once=ITERATIONS))
        def capture():
            captured.extend(tensor.clone() for tensor in state.model.state_dict().values())
            raise Stop

    with pytest.raises(Stop):
        train(config, attach=attach)
    return captured


def capture_run(config):
    """Return the weights of the latest checkpoint and the best model, the metrics and the file names of a run."""
    run_dir = train(config).run_dir
    paths = latest_checkpoint(run_dir), next((run_dir / "checkpoints").glob("best*"))
    weights = [weight for path in paths for weight in load_checkpoint(path)["model"].values()]
    table = pd.read_csv(run_dir / "logs" / "metrics.csv").drop(columns=["seconds", "images_per_second"])
    return [*weights, table.to_csv(), sorted(path.name for path in (run_dir / "checkpoints").iterdir())]


def capture_for(key):
    """Return the function that captures the least of a run that shows the effect of a key."""
    if key in RUN_KEYS:
        return capture_run
    return capture_batches if key.startswith(("data.", "augment.")) else capture_weights


def is_equal(value, other):
    return torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def is_same(captured, other):
    return len(captured) == len(other) and all(map(is_equal, captured, other))


@pytest.fixture(scope="module")
def references():
    """What is captured of the runs without a changed key, by function and overrides."""
    return {}


def test_every_key_is_in_one_table():
    tables = [EFFECTS.keys(), EFFECTS_WITH_OVERRIDES.keys(), READ_KEYS]
    assert set().union(*tables) == KEYS
    assert sum(map(len, tables)) == len(KEYS)
    assert RUN_KEYS <= KEYS - READ_KEYS


@pytest.mark.parametrize("capture", [capture_batches, capture_weights, capture_run])
def test_captured_values_of_equal_runs_are_the_same(tiny_config, capture):
    """Otherwise every key would seem to have an effect."""
    assert is_same(capture(tiny_config()), capture(tiny_config()))


@pytest.mark.parametrize("key", [*EFFECTS, *EFFECTS_WITH_OVERRIDES])
def test_key_changes_training(key, tiny_tree, references):
    value, required = EFFECTS_WITH_OVERRIDES.get(key, (EFFECTS.get(key), []))
    capture = capture_for(key)

    def capture_with(*overrides):
        # With a low div_factor, a run of few iterations moves far enough to differ from another one.
        common = ["schedule.div_factor=2", "data.synthetic.train_size=120", *required]
        return capture(parse_config(copy.deepcopy(tiny_tree), "test", [*common, *overrides]))

    reference = (capture, *required)
    if reference not in references:
        references[reference] = capture_with()
    text = value if isinstance(value, str) else json.dumps(value)
    assert not is_same(capture_with(f"{key}={text}"), references[reference])


def test_remaining_keys_are_read(tiny_config, tmp_path, monkeypatch):
    read = set()
    original = Section.__getattribute__

    def record(self, name):
        if name in type(self).model_fields:
            read.add((type(self).__name__, name))
        return original(self, name)

    monkeypatch.setattr(Section, "__getattribute__", record)
    synthetic = {"dataset": "synthetic", "synthetic": {"train_size": 60, "test_size": 20}}
    config = tiny_config(experiment="other", data=synthetic, train={"epochs": 1})
    train(config)
    photos = write_photos(tmp_path / "photos", {"train": 10})
    (photos / "train" / "cat" / "notes.txt").write_text("no image")
    with pytest.raises(Stop):
        train(tiny_config(data={"dataset": "folder", "root": str(photos), "max_unreadable": 1}), attach=stop)
    evaluate(model_name="other", overrides=[f"output_dir={config.output_dir}"])
    classes = {"data.synthetic": "SyntheticConfig", "data": "DataConfig", "train": "TrainConfig", "": "Config"}
    for key in READ_KEYS:
        section, _, name = key.rpartition(".")
        assert (classes[section], name) in read, key

"""The configuration schema: markers on fields, and every key has an effect."""

import copy
import json

import pandas as pd
import pytest
import torch

from cifar_ignite.checkpointing.io import load_checkpoint
from cifar_ignite.config import OPTIMIZER_LAYOUT_KEYS, RESOLVED_KEYS, RESUME_SAFE_KEYS, Config
from cifar_ignite.config_fields import Section
from cifar_ignite.config_io import flatten_dict, parse_config
from cifar_ignite.evaluate import evaluate
from cifar_ignite.train import train
from tests.helpers.images import write_photos
from tests.helpers.runs import latest_checkpoint

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

# A value of each key that changes what a short training does.
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
    "train.patience": (1, ["train.epochs=6", "optimizer.lr=1e-9"]),
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


def fingerprint(config):
    """Train; return all weights of the latest checkpoint and the best model, the metrics, and the file names."""
    run_dir = train(config).run_dir
    paths = latest_checkpoint(run_dir), next((run_dir / "checkpoints").glob("best*"))
    weights = [weight.flatten().double() for path in paths for weight in load_checkpoint(path)["model"].values()]
    table = pd.read_csv(run_dir / "logs" / "metrics.csv").drop(columns=["seconds", "images_per_second"])
    return torch.cat(weights), table, sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def is_same(fingerprint, other):
    weights, table, names = fingerprint
    other_weights, other_table, other_names = other
    return torch.equal(weights, other_weights) and table.equals(other_table) and names == other_names


@pytest.fixture(scope="module")
def references():
    """Fingerprints of the runs without a changed key, by their overrides."""
    return {}


def test_every_key_is_in_one_table():
    tables = [EFFECTS.keys(), EFFECTS_WITH_OVERRIDES.keys(), READ_KEYS]
    assert set().union(*tables) == KEYS
    assert sum(map(len, tables)) == len(KEYS)


@pytest.mark.parametrize("key", [*EFFECTS, *EFFECTS_WITH_OVERRIDES])
def test_key_changes_training(key, tiny_tree, references):
    value, required = EFFECTS_WITH_OVERRIDES.get(key, (EFFECTS.get(key), []))

    def train_with(*overrides):
        # With a low div_factor, a run of eight iterations moves far enough to differ from another one.
        common = ["schedule.div_factor=2", "data.synthetic.train_size=120", *required]
        return fingerprint(parse_config(copy.deepcopy(tiny_tree), "test", [*common, *overrides]))

    if tuple(required) not in references:
        references[tuple(required)] = train_with()
    text = value if isinstance(value, str) else json.dumps(value)
    assert not is_same(train_with(f"{key}={text}"), references[tuple(required)])


def test_remaining_keys_are_read(tiny_config, tmp_path, monkeypatch):
    read = set()
    original = Section.__getattribute__

    def record(self, name):
        if name in type(self).model_fields:
            read.add((type(self).__name__, name))
        return original(self, name)

    monkeypatch.setattr(Section, "__getattribute__", record)
    synthetic = {"dataset": "synthetic", "synthetic": {"train_size": 60, "test_size": 20}}
    config = tiny_config(experiment="other", data=synthetic)
    train(tiny_config())
    train(config)
    photos = write_photos(tmp_path / "photos", {"train": 10})
    (photos / "train" / "cat" / "notes.txt").write_text("no image")
    train(tiny_config(data={"dataset": "folder", "root": str(photos), "val_size": 3, "max_unreadable": 1}))
    evaluate(model_name="other", overrides=[f"output_dir={config.output_dir}"])
    classes = {"data.synthetic": "SyntheticConfig", "data": "DataConfig", "train": "TrainConfig", "": "Config"}
    for key in READ_KEYS:
        section, _, name = key.rpartition(".")
        assert (classes[section], name) in read, key

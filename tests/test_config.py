"""The configuration: validated, complete, and every key of it does something."""

import copy
import json
import re

import jsonschema
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY

from cifar_ignite.checkpoints import load_checkpoint
from cifar_ignite.config import Config, InputError, Section, flatten, load_config, parse_config
from cifar_ignite.evaluate import evaluate
from cifar_ignite.models import create_model
from cifar_ignite.train import train

SCHEMA = REPOSITORY / "configs" / "schema.json"
SHIPPED = sorted(set((REPOSITORY / "configs").glob("*.json")) - {SCHEMA})
KEYS = set(flatten(Config().model_dump(mode="json")))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_are_complete_and_build_their_model(path):
    config = load_config(path)
    assert flatten(json.loads(path.read_text())).keys() == KEYS | {"$schema"}
    assert config.experiment == path.stem
    create_model(num_classes=10, **config.model.model_dump())


@pytest.mark.parametrize("recipe", ["", "_fast", "_best"])
def test_the_models_are_trained_by_one_recipe(recipe):
    """Only stochastic depth has a ramp."""
    trees = [
        json.loads((REPOSITORY / "configs" / f"{name}{recipe}.json").read_text())
        for name in ("se", "stochastic", "hybrid")
    ]
    for tree in trees:
        del tree["model"], tree["experiment"], tree["train"]["drop_path_ramp"]
    assert trees[0] == trees[1] == trees[2]


def test_the_resolved_configuration_reads_back_as_itself(tmp_path):
    config = load_config(REPOSITORY / "configs" / "stochastic.json", ["seed=3", "schedule.name=cosine", "output_dir=1"])
    again = tmp_path / "config.json"
    again.write_text(json.dumps(config.model_dump(mode="json")))
    assert load_config(again) == config
    assert config.seed == 3
    assert str(config.output_dir) == "1"


def test_the_schema_for_editors_is_current(command):
    """make schema writes it."""
    assert json.loads(SCHEMA.read_text()) == json.loads(command("schema")[1])


def test_editors_find_the_schema_and_see_by_it_what_is_wrong():
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    for path in SHIPPED:
        tree = json.loads(path.read_text())
        assert (path.parent / tree["$schema"]).resolve() == SCHEMA
        assert list(validator.iter_errors(tree)) == []
    wrong = {"optimizer": {"lr": 0, "momentun": 0.9}, "seed": "1", "augment": {"erasing_scale": [0.1]}}
    found = {".".join(map(str, error.path)) for error in validator.iter_errors(wrong)}
    assert found == {"optimizer.lr", "optimizer", "seed", "augment.erasing_scale"}


def test_editors_and_readme_give_every_key_the_same_meaning():
    schema = json.loads(SCHEMA.read_text())

    def meanings(node, prefix=""):
        for name, field in node["properties"].items():
            if "$ref" in field:
                yield from meanings(schema["$defs"][field["$ref"].rpartition("/")[2]], f"{prefix}{name}.")
            elif name != "$schema":
                yield f"{prefix}{name}", " ".join(field["description"].split())

    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \| `.+?` \|$", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    assert dict(meanings(schema)) == dict(rows)


def test_configurations_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 1


def test_a_byte_order_mark_is_harmless(tmp_path):
    path = tmp_path / "bom.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"seed": 4}')
    assert load_config(path).seed == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("augment.cutmix_P=0", "unknown key augment.cutmix_P: did you mean cutmix_p?"),
        ("optimiser.lr=1", "unknown key optimiser: did you mean optimizer?"),
        ("zzz=1", "unknown key zzz: known: augment, compile, data, device"),
        ("data.synthetic.sed=1", "unknown key data.synthetic.sed: did you mean seed?"),
        ("optimizer.lr=-1", "optimizer.lr: Input should be greater than 0, got -1"),
        ("optimizer.lr=fast", "optimizer.lr: Input should be a valid number, got 'fast'"),
        ("optimizer.lr=NaN", "optimizer.lr: Input should be a finite number"),
        ("data.batch_size=1.5", "data.batch_size: Input should be a valid integer"),
        ("seed=true", "seed: Input should be a valid integer"),
        ("data.split_seed=18446744073709551616", "data.split_seed: Input should be less than"),
        pytest.param("seed=" + "9" * 5000, "seed: Input should be a valid integer", id="seed of 5000 digits"),
        ("train.epochs=1e25", "train.epochs: "),
        pytest.param("experiment=" + "x" * 300, "experiment: String should have at most 100", id="long name"),
        ("augment.perspective_distortion=0.99", "augment.perspective_distortion: Input should be less than or equal"),
        ("experiment=../x", "experiment: String should match pattern"),
        ("schedule.name=step", "schedule.name: Input should be 'onecycle', 'cosine' or 'linear'"),
        ("optimizer.name=adam", "optimizer.name: Input should be 'sgd' or 'muon'"),
        ("optimizer.momentum=0 optimizer.nesterov=true", "optimizer: nesterov: needs a momentum above 0"),
        ("compile=on train.drop_path_ramp=0.5", "compile: on would compile anew each epoch"),
        ("compile=on train.sync_batch_norm=true", "compile: on cannot be had with train.sync_batch_norm"),
        ("augment.erasing_scale=[0.5,0.1]", "augment: erasing_scale: the lower bound 0.5 is above the upper bound 0.1"),
        ("augment.mixup_p=0.5", "augment: cutmix_p + mixup_p = 1.2 is above 1"),
        ("optimizer.lr", "--set optimizer.lr: expected section.key=value"),
        ("seed.x=1", "seed"),
        ("data=3", "data: "),
    ],
)
def test_bad_values_are_named(override, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse_config({}, "test", override.split())


def test_all_problems_are_told_at_once():
    with pytest.raises(InputError, match=r"seed: .*; unknown key tran"):
        parse_config({"seed": -1, "tran": {}}, "test")


# --- Every key does something -----------------------------------------------------------------------------------

# Another value of each key that must change what a short training does.
EFFECTS = {
    "seed": 1,
    "data.batch_size": 25,
    "data.validation": 30,
    "data.split_seed": 1,
    "data.source": "synthetic",
    "augment.flip_p": 0.0,
    "augment.flip_mode": "alternating",
    "augment.crop_padding": 4,
    "augment.rotation_degrees": 5.0,
    "augment.perspective_p": 0.0,
    "augment.perspective_distortion": 0.5,
    "augment.brightness": 0.0,
    "augment.contrast": 0.0,
    "augment.saturation": 0.0,
    "augment.hue": 0.0,
    "augment.trivial_augment": "wide",
    "augment.off_fraction": 0.5,
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
    "train.whiten_stem": True,
    "train.drop_path_ramp": 1.0,
    "train.checkpoint_every": 1,
    "train.save_every_seconds": 0,
}
# Keys that matter beside another one.
BESIDE = {
    "optimizer.decay_norm_and_bias": (False, ["optimizer.weight_decay=0.1"]),
    "optimizer.muon_lr": (0.3, ["optimizer.name=muon"]),
    "optimizer.muon_momentum": (0.9, ["optimizer.name=muon"]),
    "augment.crop_mode": ("constant", ["augment.crop_padding=8"]),
    "augment.mixup_p": (0.9, ["augment.cutmix_p=0"]),
    "augment.mixup_alpha": (5.0, ["augment.cutmix_p=0", "augment.mixup_p=1"]),
    "data.synthetic.train_size": (100, ["data.source=synthetic", "data.synthetic.train_size=120"]),
    "data.synthetic.seed": (5, ["data.source=synthetic", "data.synthetic.train_size=120"]),
    "precision": ("bf16", ["precision=fp32"]),
    "train.patience": (1, ["train.epochs=6", "optimizer.lr=1e-9"]),
}
# Keys that change where and how a run goes, not what it learns: below, reading them is recorded.
READ = {
    "experiment",
    "output_dir",
    "device",
    "compile",
    "data.root",
    "data.synthetic.test_size",
    "train.log_every",
    "train.sync_batch_norm",
    "train.save_failures_allowed",
}


def fingerprint(config):
    """What a run learnt and left: weights, metrics, names of checkpoints."""
    run_dir = train(config)
    state = load_checkpoint(max((run_dir / "checkpoints").glob("latest_*.pt")))
    table = pd.read_csv(run_dir / "logs" / "metrics.csv").drop(columns=["seconds", "images_per_second"])
    best = load_checkpoint(next((run_dir / "checkpoints").glob("best*")))
    weights = torch.cat([w.flatten().double() for one in (state, best) for w in one["model"].values()])
    return weights, table, sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def unchanged():
    """Fingerprints of the runs that the changed ones are compared with, by their overrides."""
    return {}


def test_every_key_is_proved_below():
    assert EFFECTS.keys() | BESIDE.keys() | READ == KEYS


@pytest.mark.parametrize("key", [*EFFECTS, *BESIDE])
def test_every_key_changes_the_training(key, tiny_tree, unchanged):
    value, beside = BESIDE.get(key, (EFFECTS.get(key), []))
    # A low div_factor lets a run of eight iterations move far enough to tell two runs apart.
    overrides = ["schedule.div_factor=2", "data.synthetic.train_size=120", *beside]
    if tuple(beside) not in unchanged:
        unchanged[tuple(beside)] = fingerprint(parse_config(copy.deepcopy(tiny_tree), "test", overrides))
    overrides.append(f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    before = unchanged[tuple(beside)]
    after = fingerprint(parse_config(copy.deepcopy(tiny_tree), "test", overrides))
    same_weights = before[0].shape == after[0].shape and torch.equal(before[0], after[0])
    assert not (same_weights and before[1].equals(after[1]) and before[2] == after[2])


def test_the_other_keys_are_read(tiny_config, monkeypatch):
    read = set()
    original = Section.__getattribute__

    def recording(self, name):
        if name in type(self).model_fields:
            read.add((type(self).__name__, name))
        return original(self, name)

    monkeypatch.setattr(Section, "__getattribute__", recording)
    train(tiny_config())
    config = tiny_config(
        experiment="other", data={"source": "synthetic", "synthetic": {"train_size": 60, "test_size": 20}}
    )
    train(config)
    evaluate(model_name="other", overrides=[f"output_dir={config.output_dir}"])
    where = {"data.synthetic": "SyntheticConfig", "data": "DataConfig", "train": "TrainConfig", "": "Config"}
    for key in READ:
        group, _, name = key.rpartition(".")
        assert (where[group], name) in read, key

"""Configuration files: "extends", overrides, error messages, and the generated schema and documentation."""

import json
import re

import jsonschema
import pytest

from cifar_ignite.config import RESUME_SAFE_KEYS, Config
from cifar_ignite.config_io import RENAMED_KEYS, flatten_dict, load_config, parse_config
from cifar_ignite.errors import InputError
from cifar_ignite.models import create_model
from tests.helpers import REPOSITORY, only_run

CONFIGS = REPOSITORY / "configs"
SCHEMA = CONFIGS / "schema.json"
SHIPPED = sorted(set(CONFIGS.glob("*.json")) - {SCHEMA})


@pytest.fixture
def write(tmp_path):
    """A function that writes a configuration file and returns its path."""

    def write_file(name, tree):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(tree))
        return path

    return write_file


# --- Reading ------------------------------------------------------------------------------------------------------


def test_resolved_configuration_reads_back_as_itself(write):
    config = load_config(CONFIGS / "stochastic.json", ["seed=3", "schedule.name=cosine", "output_dir=1"])
    assert load_config(write("config.json", config.model_dump(mode="json"))) == config
    assert config.seed == 3
    assert str(config.output_dir) == "1"


def test_load_config_ignores_byte_order_mark(tmp_path):
    path = tmp_path / "bom.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"seed": 4}')
    assert load_config(path).seed == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("augment.cutmix_P=0", "unknown key augment.cutmix_P: did you mean cutmix_p?"),
        ("optimiser.lr=1", "unknown key optimiser: did you mean optimizer?"),
        ("zzz=1", "unknown key zzz: known: augment, compile, data, device"),
        ("data.synthetic.sed=1", "unknown key data.synthetic.sed: did you mean seed?"),
        ("optimizer.lr=-1", "optimizer.lr: Input should be greater than 0, got -1"),
        ("augment.mean=[125.3,123,113.9]", "augment.mean.0: Input should be less than or equal to 1"),
        ("augment.std=[63,62,66]", "augment.std.0: Input should be less than or equal to 1"),
        ("optimizer.lr=fast", "optimizer.lr: Input should be a valid number, got 'fast'"),
        ("optimizer.lr=NaN", "optimizer.lr: Input should be a finite number"),
        ("data.batch_size=1.5", "data.batch_size: Input should be a valid integer"),
        ("seed=true", "seed: Input should be a valid integer"),
        ("data.split_seed=18446744073709551616", "data.split_seed: Input should be less than"),
        pytest.param("seed=" + "9" * 5000, "seed: Input should be a valid integer", id="seed of 5000 digits"),
        ("train.epochs=1e25", "train.epochs: "),
        pytest.param("experiment=" + "x" * 300, "experiment: String should have at most 100", id="long name"),
        ("augment.distortion_scale=0.99", "augment.distortion_scale: Input should be less than or equal"),
        ("experiment=../x", "experiment: String should match pattern"),
        ("schedule.name=step", "schedule.name: Input should be 'onecycle', 'cosine' or 'linear'"),
        ("optimizer.name=adam", "optimizer.name: Input should be 'sgd' or 'muon'"),
        ("optimizer.momentum=0 optimizer.nesterov=true", "optimizer: nesterov: requires momentum above 0"),
        ("compile=on train.drop_path_decay_fraction=0.5", 'test: compile="on" is incompatible with train.drop_path'),
        ("compile=on train.sync_batch_norm=true", 'test: compile="on" is incompatible with train.sync_batch_norm'),
        ("augment.erasing_scale=[0.5,0.1]", "augment: erasing_scale: the lower bound 0.5 is above the upper bound 0.1"),
        ("augment.mixup_p=0.5", "augment: cutmix_p + mixup_p = 1.2 is above 1"),
        ("optimizer.lr", "--set optimizer.lr: expected section.key=value"),
        ("seed.x=1", "seed"),
        ("data=3", "data: "),
    ],
)
def test_invalid_value_is_named(overrides, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse_config({}, "test", overrides.split())


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_renamed_key_names_the_new_one(old, new):
    with pytest.raises(InputError, match=rf"unknown key {re.escape(old)}: it is now {re.escape(new)}$"):
        parse_config({}, "test", [f"{old}=x"])
    assert new in flatten_dict(Config().model_dump(mode="json"))


def test_all_problems_are_reported_at_once():
    with pytest.raises(InputError, match=r"seed: .*; unknown key tran"):
        parse_config({"seed": -1, "tran": {}}, "test")


# --- "extends" ----------------------------------------------------------------------------------------------------


def test_extends_merges_chain_of_files_relative_to_each(write):
    """Keys of nested sections are merged one by one; each path is relative to the file that contains it."""
    write("base.json", {"$schema": "x", "seed": 1, "data": {"batch_size": 64, "synthetic": {"seed": 5}}})
    write("recipes/middle.json", {"extends": "../base.json", "seed": 2, "data": {"synthetic": {"train_size": 7}}})
    path = write("leaf.json", {"extends": "recipes/middle.json", "data": {"val_size": 3}})
    config = load_config(path, ["data.batch_size=16"])
    assert (config.seed, config.data.batch_size, config.data.val_size) == (2, 16, 3)
    assert (config.data.synthetic.seed, config.data.synthetic.train_size) == (5, 7)
    assert config.data.synthetic.test_size == Config().data.synthetic.test_size


@pytest.mark.parametrize(
    ("parent", "message"),
    [
        ("leaf.json", "cycle"),
        ("./../{directory}/leaf.json", "cycle"),
        ("other.json", "cycle"),
        ("missing.json", "no such file"),
        ("", "no such file"),
        ("list.json", "list.json: expected a JSON object"),
        ("{path}/base.json", "or a path relative to this file"),
        (None, "or a path relative to this file"),
        (["base.json"], "or a path relative to this file"),
    ],
    ids=str,
)
def test_invalid_extends_is_refused(write, tmp_path, parent, message):
    write("base.json", {})
    write("list.json", [])
    write("other.json", {"extends": "leaf.json"})
    if isinstance(parent, str):
        parent = parent.format(directory=tmp_path.name, path=tmp_path)
    path = write("leaf.json", {"extends": parent})
    with pytest.raises(InputError, match=rf"\.json: extends: .*{re.escape(message)}"):
        load_config(path)


def test_configuration_of_run_is_resolved(command, tiny_tree, write, tmp_path):
    write("base.json", tiny_tree)
    path = write("leaf.json", {"extends": "base.json", "seed": 3})
    assert command("train", "--config", path, "--set", "train.epochs=1")[0] == 0
    saved = json.loads((only_run(tmp_path) / "config.json").read_text())
    assert flatten_dict(saved).keys() == flatten_dict(Config().model_dump(mode="json")).keys()
    assert (saved["seed"], saved["experiment"]) == (3, "tiny")


# --- Shipped configurations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configuration_contains_only_what_differs(path):
    """From the file that it extends, otherwise from the defaults; and it is readable."""
    tree = json.loads(path.read_text())
    assert (path.parent / tree.pop("$schema")).resolve() == SCHEMA
    base = load_config(path.parent / tree.pop("extends")) if "extends" in tree else Config()
    config, base_values = load_config(path), flatten_dict(base.model_dump(mode="json"))
    assert config.experiment == path.stem
    repeated = {key for key, value in flatten_dict(tree).items() if value == base_values[key]}
    assert repeated <= {"experiment"}
    assert max(len(line) for line in path.read_text().splitlines()) <= 120
    create_model(num_classes=10, **config.model.model_dump())


@pytest.mark.parametrize("recipe", ["", "_fast", "_best"])
def test_shipped_models_share_one_recipe(recipe):
    """Except for the model itself, and the decay of stochastic depth."""
    trees = [load_config(CONFIGS / f"{name}{recipe}.json").model_dump() for name in ("se", "stochastic", "hybrid")]
    for tree in trees:
        del tree["model"], tree["experiment"], tree["train"]["drop_path_decay_fraction"]
    assert trees[0] == trees[1] == trees[2]


# --- Generated files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path"), [("schema", "configs/schema.json"), ("config-reference", "docs/configuration.md")]
)
def test_generated_file_is_current(command, name, path):
    """`make docs` writes it."""
    status, out, _ = command(name)
    assert status == 0
    assert (REPOSITORY / path).read_text() == out


def test_schema_accepts_shipped_configurations_and_finds_errors():
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    for path in SHIPPED:
        assert list(validator.iter_errors(json.loads(path.read_text()))) == []
    invalid = {
        "extends": 1,
        "optimizer": {"lr": 0, "momentun": 0.9},
        "seed": "1",
        "augment": {"erasing_scale": [0.1]},
    }
    found = {".".join(map(str, error.path)) for error in validator.iter_errors(invalid)}
    assert found == {"extends", "optimizer.lr", "optimizer", "seed", "augment.erasing_scale"}


def test_reference_has_every_key_with_meaning_default_and_resume_mark():
    schema = json.loads(SCHEMA.read_text())

    def descriptions(node, prefix=""):
        for name, field in node["properties"].items():
            if "$ref" in field:
                yield from descriptions(schema["$defs"][field["$ref"].rpartition("/")[2]], f"{prefix}{name}.")
            elif name not in ("$schema", "extends"):
                yield f"{prefix}{name}", " ".join(field["description"].split())

    text = (REPOSITORY / "docs" / "configuration.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \| `(.+?)` \| (yes)?\s*\|$", text, re.MULTILINE)
    assert {key: meaning for key, meaning, _, _ in rows} == dict(descriptions(schema))
    defaults = flatten_dict(Config().model_dump(mode="json"))
    assert {key: json.loads(default) for key, _, default, _ in rows} == defaults
    assert {key for key, *_, mark in rows if mark} == RESUME_SAFE_KEYS

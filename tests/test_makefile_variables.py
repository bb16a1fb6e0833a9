"""Variables of make: lists with spaces, and names that the environment has for other programs."""

import pytest

from tests.helpers.make import make


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("seed=1", "--set 'seed=1'"),
        ("augment.erasing_scale=[0.02, 0.2]", "--set 'augment.erasing_scale=[0.02, 0.2]'"),
        ("seed=1 augment.mean=[ 0.5, 0.5, 0.5 ] train.epochs=2",
         "--set 'seed=1' --set 'augment.mean=[ 0.5, 0.5, 0.5 ]' --set 'train.epochs=2'"),
        (" seed=1   train.epochs=2 ", "--set 'seed=1' --set 'train.epochs=2'"),
        ("output_dir=/my directory/it's", r"--set 'output_dir=/my directory/it'\''s'"),
        ("output_dir=a'b c' --set 'seed=1", r"--set 'output_dir=a'\''b c'\'' --set' --set ''\''seed=1'"),
        ("data.root=$(HOME) seed=`x`", "--set 'data.root=$(HOME)' --set 'seed=`x`'"),
        ("experiment", "--set 'experiment'"),
    ],
)  # fmt: skip
def test_set_is_split_before_keys(value, expected):
    for target in ("compare", "train"):
        assert make("-n", target, f"SET={value}").stdout.rstrip().endswith(f" {expected}")


def test_empty_set_is_no_option():
    assert "--set" not in make("-n", "compare", "SET= ").stdout


@pytest.mark.parametrize(
    ("target", "name", "value"),
    [
        ("train", "MODEL", "hybrid"), ("train", "RECIPE", "fast"), ("train", "DATA", "synthetic"),
        ("train", "SEED", "1"),
        ("train", "SET", "seed=1"), ("train", "EPOCHS", "1"), ("train", "RESUME", "latest"), ("train", "NPROC", "2"),
        ("train", "DATA_DIR", "/x"), ("compare", "OUTPUT_DIR", "/x"), ("evaluate", "CHECKPOINT", "x"),
        ("evaluate", "TEST_FILE", "x"), ("evaluate", "TTA", "1"), ("accuracy", "SEEDS", "2"), ("bench", "OUT", "x"),
        ("tensorboard", "OUTPUT_DIR", "/x"), ("train", "MODEL", "$(shell exit)"),
    ],
)  # fmt: skip
def test_variable_of_environment_is_reported_and_ignored(target, name, value):
    plain, done = make("-n", target), make("-n", target, **{name: value})
    assert done.stdout == plain.stdout
    assert f"{name}: exported in the environment" in done.stderr
    assert f"make {target} {name}=..." in done.stderr
    assert "exported in the environment" not in plain.stderr


def test_predict_does_not_take_images_from_environment():
    done = make("predict", IMAGES="x")
    assert done.returncode == 2
    assert "IMAGES: name an image" in done.stderr


def test_variable_of_command_line_is_used_although_the_environment_has_it():
    done = make("-n", "train", "MODEL=hybrid", MODEL="other")
    assert "--config 'hybrid'" in done.stdout
    assert "exported" not in done.stderr


def test_unknown_variable_is_refused():
    done = make("-n", "train", "MODLE=hybrid", "EPOCH=5")
    assert done.returncode == 2
    assert "EPOCH MODLE: no such variable" in done.stderr
    assert done.stdout == ""


def test_make_docs_does_not_depend_on_encoding_and_optimization():
    out = make("-n", "docs").stdout
    assert out.count("PYTHONIOENCODING=utf-8 PYTHONOPTIMIZE= ") == 2

"""The command line. Invalid input: exit status 2, one line on stderr, no traceback, nothing created or changed."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from urllib.error import URLError

import pytest
import torch

from cifar_ignite.data import cifar_files
from cifar_ignite.data.cifar10 import CIFAR10_CLASSES
from tests.helpers import REPOSITORY, only_run
from tests.helpers.runs import latest_checkpoint, set_options


class Payload:
    """Creates a file when it is unpickled by the standard unpickler."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def trained(trained_run):
    """The latest full checkpoint of a run."""
    return latest_checkpoint(trained_run)


@pytest.fixture
def assert_checkpoint_refused(refused, tiny_file):
    """A function that asserts that evaluate and --resume both refuse a checkpoint with a message."""

    def check(path, message):
        for words in (["evaluate", "--checkpoint"], ["train", "--config", tiny_file, "--resume"]):
            assert message in refused(*words, path)

    return check


# --- Commands -----------------------------------------------------------------------------------------------------


def test_models_lists_parameters(command):
    status, out, err = command("models")
    assert (status, err) == (0, "")
    assert "2,820,390" in out


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["evaluate", "--help"]], ids=" ".join)
def test_help_prints_usage(command, words):
    status, out, err = command(*words)
    assert (status, err) == (0, "")
    assert "usage: cifar_ignite" in out


def test_module_trains_in_a_real_process_with_closed_stdout(tmp_path, tiny_file):
    """Into a directory with a space and an umlaut in its name; `| head` closes stdout too."""
    output_dir = tmp_path / "Ausgänge 1"
    options = {"data.dataset": "synthetic", "data.synthetic.train_size": 120, "output_dir": output_dir}
    words = ["train", "--config", tiny_file, *set_options({**options, "train.epochs": 1})]
    process = subprocess.Popen(
        [sys.executable, "-m", "cifar_ignite", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY
    )
    process.stdout.close()
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, b"")
    assert (output_dir / "best_models" / "tiny_best.pth").exists()


def test_incompatible_torchvision_is_explained_in_one_line(command, monkeypatch):
    def fail():
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("cifar_ignite.list_models.list_models", fail)
    status, _, err = command("models")
    assert status == 1
    assert "torch and torchvision are incompatible" in err
    assert "pip install --force-reinstall torch torchvision" in err
    assert err.count("\n") == 1


# --- Options and configuration ------------------------------------------------------------------------------------


def test_invalid_options_are_refused(refused, tiny_file):
    assert "unrecognized arguments: --lr 1 (see cifar_ignite" in refused("train", "--config", tiny_file, "--lr", 1)
    assert "not allowed with" in refused("evaluate", "--checkpoint", "x", "--model", "y")
    assert "expected section.key=value" in refused("train", "--config", tiny_file, "--set", "seed")
    assert "required" in refused()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"seed": 1,\n  "augment": {"cutmix_P": 0}}', "unknown key augment.cutmix_P: did you mean cutmix_p?"),
        ('{"data": {"source": "synthetic"}}', "unknown key data.source: it is now data.dataset"),
        ('{"extends": "bad.json"}', "bad.json: extends: bad.json"),
        ('{"seed": 1,\n  "train": }', "line 2, column 12: not valid JSON"),
        ("", "line 1, column 1: not valid JSON"),
        ("[]", "expected a JSON object"),
        pytest.param(100_000 * '{"data": ' + "1" + 100_000 * "}", "maximum recursion depth exceeded", id="deep"),
        ('{"seed": 1, "seed": 2}', "key 'seed' appears twice"),
        ('{"data": {"batch_size": 0}}', "data.batch_size: Input should be greater than or equal to 1, got 0"),
        ('{"data": {"batch_size": "12"}}', "data.batch_size: Input should be a valid integer, got '12'"),
        ('{"optimizer": {"lr": NaN}}', "optimizer.lr: "),
        ('{"model": {"name": "resnet50"}}', "model.name: unknown model 'resnet50'; known: hybrid_resnet, se_resnet"),
        ('{"model": {"name": "se_resnet", "drop_path_rate": 0.1}}', "model.drop_path_rate: se_resnet has no such"),
        ('{"train": {"drop_path_decay_fraction": 0.5}}', "train.drop_path_decay_fraction: se_resnet has no stochastic"),
        ('{"data": {"dataset": "mnist"}}', "data.dataset: unknown dataset 'mnist'"),
    ],
)
def test_invalid_configuration_is_refused(refused, tmp_path, text, message):
    """Before the dataset is downloaded."""
    path = tmp_path / "bad.json"
    path.write_text(text)
    assert message in refused("train", "--config", path)


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["train", "--config", "tiny.json", "--resume", ""], "resume"),
        (["evaluate", "--checkpoint", ""], "checkpoint"),
        (["evaluate", "--model", ""], "model_name"),
        (["evaluate", "--test-file", ""], "test_file"),
        (["predict", ""], "paths"),
        (["predict", ".", ""], "paths"),
        (["predict", "--checkpoint", "", "."], "checkpoint"),
        (["export", "--model", ""], "model_name"),
    ],
)
@pytest.mark.usefixtures("tiny_file")
def test_empty_name_as_of_an_unset_variable_is_refused(refused, words, name):
    assert refused(*words).startswith(f"cifar_ignite: {name}: ")


def test_unreadable_configuration_is_refused(refused, tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    assert "none.json: cannot read the configuration: No such file" in refused("train", "--config", "none.json")
    assert "x.json: cannot read the configuration" in refused("train", "--config", "x.json")


def test_values_that_do_not_fit_machine_or_data_are_refused(refused, tiny_file, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "occupied").touch()
    for override, message in {
        "device=cuda": "device: torch finds no CUDA GPU",
        "output_dir=occupied": "output_dir: cannot write",
        "data.val_size=5000": "data.val_size: 5000 of 120",
    }.items():
        assert message in refused("train", "--config", tiny_file, "--set", override)


# --- Data files ---------------------------------------------------------------------------------------------------


def test_missing_truncated_and_malicious_data_files_are_refused(refused, tiny_file, tmp_path, cifar_root):
    path, marker = cifar_root / "cifar-10-batches-py" / "data_batch_2", tmp_path / "marker"
    path.write_bytes(path.read_bytes()[:-100])
    assert "data_batch_2: refused: not a valid pickle" in refused("train", "--config", tiny_file)
    path.write_bytes(pickle.dumps({b"data": Payload(marker)}))
    assert "data_batch_2: refused" in refused("train", "--config", tiny_file)
    assert not marker.exists()
    path.unlink()
    err = refused("train", "--config", tiny_file)
    assert f"{path.parent}: no file data_batch_2" in err
    assert "delete" not in err


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("is_malicious", [True, False])
def test_commands_never_read_batches_meta(command, tiny_file, tmp_path, cifar_root, is_malicious):
    marker = tmp_path / "marker"
    contents = Payload(marker) if is_malicious else {b"label_names": [name.encode() for name in CIFAR10_CLASSES[::-1]]}
    (cifar_root / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps(contents))
    assert command("train", "--config", tiny_file, "--set", "train.epochs=1")[0] == 0
    assert command("evaluate")[0] == 0
    assert json.loads((only_run(tmp_path) / "classes.json").read_text()) == list(CIFAR10_CLASSES)
    assert not marker.exists()


def test_failed_download_is_refused_with_alternatives(refused, tiny_file, cifar_root, monkeypatch):
    def fail(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr(cifar_files, "download_and_extract_archive", fail)
    shutil.rmtree(cifar_root)
    err = refused("train", "--config", tiny_file)
    assert str(cifar_root) in err
    assert "DATA=synthetic" in err


@pytest.mark.usefixtures("trained")
def test_invalid_unlabeled_test_file_is_refused(refused, tmp_path):
    path, marker = tmp_path / "test.pkl", tmp_path / "marker"
    for contents, message in (
        (b"", "refused"),
        (pickle.dumps(Payload(marker)), "refused"),
        (pickle.dumps({b"data": [1]}), "uint8 array"),
    ):
        path.write_bytes(contents)
        assert message in refused("evaluate", "--test-file", path)
    assert not marker.exists()
    assert refused("evaluate", "--test-file", "none.pkl") == "cifar_ignite: none.pkl: no such file\n"


# --- Checkpoints --------------------------------------------------------------------------------------------------


def test_evaluate_without_best_model_is_refused(refused):
    assert "no best model; train one first" in refused("evaluate")


def test_missing_truncated_foreign_and_malicious_checkpoints_are_refused(trained, assert_checkpoint_refused, tmp_path):
    marker, truncated = tmp_path / "marker", tmp_path / "truncated.pt"
    truncated.write_bytes(trained.read_bytes()[:-500])
    torch.save({"weight": torch.zeros(1)}, tmp_path / "foreign.pt")
    torch.save({"model": Payload(marker), "record": {}}, tmp_path / "malicious.pt")
    assert_checkpoint_refused("none.pt", "none.pt: no such checkpoint")
    assert_checkpoint_refused(truncated, "truncated.pt: not a checkpoint, or truncated")
    assert_checkpoint_refused("foreign.pt", "foreign.pt: not a checkpoint of cifar_ignite")
    assert_checkpoint_refused("malicious.pt", "malicious.pt: refused")
    assert not marker.exists()


def test_checkpoint_of_format_1_is_refused_with_its_format(trained, assert_checkpoint_refused, tmp_path):
    """Written before configuration keys were renamed."""
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["record"]["format"] = 1
    config = checkpoint["record"]["config"]["data"]
    config["source"], config["validation"] = config.pop("dataset"), config.pop("val_size")
    torch.save(checkpoint, tmp_path / "old.pt")
    assert_checkpoint_refused("old.pt", "old.pt: checkpoint format 1")


def test_checkpoint_with_invalid_content_is_refused(trained, assert_checkpoint_refused, tmp_path):
    checkpoint = torch.load(trained, weights_only=True)
    for key, value in (
        ("record", {"history": "abc"}),
        ("record", {"history": [{"epoch": 1}]}),
        ("record", {"config": []}),
        ("record", {"config": {"data": torch.zeros(1)}}),
        ("record", {"format": 99}),
        ("model", []),
        ("model", {1: torch.zeros(1)}),
    ):
        changed = checkpoint["record"] | value if key == "record" else value
        torch.save(checkpoint | {key: changed}, tmp_path / "invalid.pt")
        assert_checkpoint_refused("invalid.pt", "invalid.pt: not a checkpoint of")


def test_checkpoint_that_is_not_a_full_one_cannot_be_resumed(trained, refused, tiny_file, tmp_path):
    resume = ["train", "--config", tiny_file, "--resume"]
    best = tmp_path / "outputs" / "best_models" / "tiny_best.pth"
    assert "not a full checkpoint (it lacks metrics, optimizer, timer, trainer)" in refused(*resume, best)
    checkpoint = torch.load(trained, weights_only=True)
    for changes in ({"optimizer": {}}, {"trainer": 3}, {"timer": 1}, {"trainer": {"iteration": "x"}}):
        torch.save(checkpoint | changes, tmp_path / "invalid.pt")
        assert "invalid.pt: not a full checkpoint" in refused(*resume, "invalid.pt")


@pytest.mark.usefixtures("trained")
def test_resume_without_such_run_is_refused(refused, tiny_file, tmp_path):
    words = ["train", "--config", tiny_file, "--resume"]
    assert "no run of experiment 'other' to resume" in refused(*words, "latest", "--set", "experiment=other")
    assert "not a run directory" in refused(*words, tmp_path)


def test_checkpoint_of_another_model_or_configuration_is_refused(trained, refused, tiny_file):
    changes = set_options({"model.name": "se_resnet", "optimizer.lr": 0.1})
    err = refused("train", "--config", tiny_file, "--resume", trained, *changes)
    assert 'model.name was "hybrid_resnet", now "se_resnet"' in err
    assert "optimizer.lr was 0.05, now 0.1" in err
    assert "hybrid_resnet" in refused("evaluate", "--checkpoint", trained, "--set", "model.width=4")
    assert "no best model of experiment 'se'; available: tiny" in refused("evaluate", "--model", "se")

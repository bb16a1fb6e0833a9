"""Bad input: exit status 2, one line on stderr, no traceback, nothing created or changed."""

import pickle
import shutil
from urllib.error import URLError

import pytest
import torch
from conftest import snapshot, the_run
from test_checkpoints import Payload

from cifar_ignite import data


@pytest.fixture
def refused(command, tmp_path):
    """Run a command that must be refused; returns its one line."""

    def run(*arguments):
        before = snapshot(tmp_path)
        status, _, err = command(*arguments)
        assert status == 2, err
        assert err.count("\n") == 1
        assert "Traceback" not in err
        assert err.startswith("cifar_ignite")
        assert snapshot(tmp_path) == before
        return err

    return run


@pytest.fixture
def trained(command, tiny_file):
    assert command("train", "--config", tiny_file)[0] == 0


# --- Configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"seed": 1,\n  "augment": {"cutmix_P": 0}}', "unknown key augment.cutmix_P: did you mean cutmix_p?"),
        ('{"seed": 1,\n  "train": }', "line 2, column 12: not valid JSON"),
        ("", "line 1, column 1: not valid JSON"),
        ("[]", "expected a JSON object"),
        (100_000 * '{"data": ' + "1" + 100_000 * "}", "maximum recursion depth exceeded"),
        ('{"seed": 1, "seed": 2}', "key 'seed' is given twice"),
        ('{"data": {"batch_size": 0}}', "data.batch_size: Input should be greater than or equal to 1, got 0"),
        ('{"data": {"batch_size": "12"}}', "data.batch_size: Input should be a valid integer, got '12'"),
        ('{"optimizer": {"lr": NaN}}', "optimizer.lr: "),
        ('{"model": {"name": "resnet50"}}', "no model 'resnet50'; there are hybrid_resnet, se_resnet"),
        ('{"model": {"name": "se_resnet", "drop_path_rate": 0.1}}', "se_resnet has no such option"),
    ],
)
def test_configuration(refused, tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    assert message in refused("train", "--config", path)


def test_a_missing_configuration(refused):
    assert "none.json: cannot read the configuration: No such file" in refused("train", "--config", "none.json")


def test_a_configuration_that_is_no_text(refused, tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    assert "cannot read the configuration" in refused("train", "--config", "x.json")


def test_wrong_options(refused, tiny_file):
    assert "unrecognized arguments: --lr 1 (see cifar_ignite" in refused("train", "--config", tiny_file, "--lr", 1)
    assert "not allowed with" in refused("evaluate", "--checkpoint", "x", "--model", "y")
    assert "expected section.key=value" in refused("train", "--config", tiny_file, "--set", "seed")
    assert "required" in refused()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(refused, tiny_file):
    assert "no CUDA GPU" in refused("train", "--config", tiny_file, "--set", "device=cuda")


def test_an_output_folder_that_is_a_file(refused, tiny_file, tmp_path):
    (tmp_path / "occupied").write_text("")
    assert "output_dir: cannot write" in refused("train", "--config", tiny_file, "--set", "output_dir=occupied")


# --- Data ---------------------------------------------------------------------------------------------------------


def test_a_missing_truncated_or_hostile_data_file(refused, tiny_file, tmp_path, cifar_root):
    path = cifar_root / "cifar-10-batches-py" / "data_batch_2"
    whole, marker = path.read_bytes(), tmp_path / "marker"
    path.write_bytes(whole[:-100])
    assert "data_batch_2: refused: not a whole pickle" in refused("train", "--config", tiny_file)
    path.write_bytes(pickle.dumps({b"data": Payload(marker)}))
    assert "data_batch_2: refused" in refused("train", "--config", tiny_file)
    assert not marker.exists()
    path.unlink()
    advice = f"data_batch_2: no such file; remove {path.parent} to have CIFAR-10 downloaded anew"
    assert advice in refused("train", "--config", tiny_file)


def test_batches_meta_is_never_read(command, tiny_file, tmp_path, cifar_root):
    marker = tmp_path / "marker"
    (cifar_root / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps(Payload(marker)))
    assert command("train", "--config", tiny_file)[0] == 0
    assert command("evaluate")[0] == 0
    assert not marker.exists()


def test_no_network_for_the_download(refused, tiny_file, cifar_root, monkeypatch):
    def offline(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr(data, "download_and_extract_archive", offline)
    shutil.rmtree(cifar_root)
    line = refused("train", "--config", tiny_file)
    assert "cannot be downloaded" in line
    assert "put the official files into" in line
    assert "DATA=synthetic" in line


def test_more_validation_images_than_there_are(refused, tiny_file):
    assert "data.validation: 5000 of 120" in refused("train", "--config", tiny_file, "--set", "data.validation=5000")


@pytest.mark.usefixtures("trained")
def test_a_bad_competition_file(refused, tmp_path):
    marker = tmp_path / "marker"
    for contents, message in (
        (b"", "refused"),
        (pickle.dumps(Payload(marker)), "refused"),
        (pickle.dumps({b"data": [1]}), "uint8 array"),
    ):
        (tmp_path / "test.pkl").write_bytes(contents)
        assert message in refused("evaluate", "--test-file", "test.pkl")
    assert not marker.exists()
    assert refused("evaluate", "--test-file", "none.pkl") == "cifar_ignite: none.pkl: no such file\n"


# --- Checkpoints --------------------------------------------------------------------------------------------------


def test_no_model_yet(refused):
    assert "no best model there; train one first" in refused("evaluate")


@pytest.mark.usefixtures("trained")
def test_an_unknown_experiment(refused):
    assert "no best model of 'se' there; there are tiny" in refused("evaluate", "--model", "se")


@pytest.mark.usefixtures("trained")
def test_missing_truncated_foreign_and_hostile_checkpoints(refused, tmp_path, tiny_file):
    state = max((the_run(tmp_path) / "checkpoints").glob("latest_*.pt"))
    broken, marker = tmp_path / "broken.pt", tmp_path / "marker"
    torch.save({"weight": torch.zeros(1)}, tmp_path / "foreign.pt")
    torch.save({"model": Payload(marker), "record": {}}, tmp_path / "hostile.pt")
    broken.write_bytes(state.read_bytes()[:-500])
    for options in (["evaluate", "--checkpoint"], ["train", "--config", tiny_file, "--resume"]):
        assert "none.pt: no such checkpoint" in refused(*options, "none.pt")
        assert "broken.pt: not a checkpoint, or truncated" in refused(*options, broken)
        assert "not a checkpoint of cifar_ignite" in refused(*options, "foreign.pt")
        assert "hostile.pt: refused" in refused(*options, "hostile.pt")
    assert not marker.exists()


@pytest.mark.usefixtures("trained")
def test_a_checkpoint_of_another_model_or_configuration(refused, tmp_path, tiny_file):
    state = max((the_run(tmp_path) / "checkpoints").glob("latest_*.pt"))
    resume = ["train", "--config", tiny_file, "--resume", state]
    line = refused(*resume, "--set", "model.name=se_resnet", "--set", "optimizer.lr=0.1")
    assert 'model.name was "hybrid_resnet", now "se_resnet"' in line
    assert "optimizer.lr was 0.05, now 0.1" in line
    assert "its weights are not those of a hybrid_resnet" in refused(
        "evaluate", "--checkpoint", state, "--set", "model.width=4"
    )


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    "changes",
    [
        {"record": {"history": "abc"}},
        {"record": {"history": [{"epoch": 1}]}},
        {"record": {"config": []}},
        {"record": {"config": {"data": torch.zeros(1)}}},
        {"record": {"format": 99}},
        {"model": []},
        {"model": {1: torch.zeros(1)}},
    ],
    ids=str,
)
def test_checkpoints_that_hold_something_else_inside(refused, tmp_path, tiny_file, changes):
    checkpoint = torch.load(max((the_run(tmp_path) / "checkpoints").glob("latest_*.pt")), weights_only=True)
    for key, value in changes.items():
        checkpoint[key] = checkpoint[key] | value if key == "record" else value
    torch.save(checkpoint, tmp_path / "odd.pt")
    for options in (["evaluate", "--checkpoint"], ["train", "--config", tiny_file, "--resume"]):
        assert "odd.pt: not a checkpoint of" in refused(*options, "odd.pt")


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    "changes", [{"optimizer": {}}, {"trainer": 3}, {"timer": 1}, {"trainer": {"iteration": "x"}}], ids=str
)
def test_training_states_that_hold_something_else_inside(refused, tmp_path, tiny_file, changes):
    checkpoint = torch.load(max((the_run(tmp_path) / "checkpoints").glob("latest_*.pt")), weights_only=True)
    torch.save(checkpoint | changes, tmp_path / "odd.pt")
    assert "not a training state" in refused("train", "--config", tiny_file, "--resume", "odd.pt")


@pytest.mark.usefixtures("trained")
def test_nothing_to_resume(refused, tmp_path, tiny_file):
    best = tmp_path / "outputs" / "best_models" / "tiny_best.pth"
    assert "not a training state (no metrics, optimizer, timer, trainer in it)" in refused(
        "train", "--config", tiny_file, "--resume", best
    )
    line = refused("train", "--config", tiny_file, "--set", "experiment=other", "--resume", "latest")
    assert "no run of experiment 'other' to resume" in line
    assert "not a run folder" in refused("train", "--config", tiny_file, "--resume", tmp_path)


def test_another_network_than_the_state_has(refused, trained, tiny_file):
    """Also the configuration of the run is as it was."""
    more = ["--set", "train.epochs=9", "--allow-changes"]
    err = refused("train", "--config", tiny_file, "--resume", "latest", *more, "--set", "model.width=3")
    assert "not the configured network: head.3.weight is (10, 16) in the state and (10, 24) in the network" in err

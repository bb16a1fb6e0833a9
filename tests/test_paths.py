"""Every path that a user can name: one line and exit status 2 if it cannot be used; the cause and the file at fault."""

import errno
import os
import resource

import pytest
import torch
from torch import nn

from cifar_ignite import doctor
from cifar_ignite.config_io import load_config, parse_config
from cifar_ignite.errors import InputError
from cifar_ignite.evaluation import report
from cifar_ignite.evaluation.trained_model import load_trained_model
from cifar_ignite.export import export_program, save_pt2
from cifar_ignite.files import translate_write_errors

LONG = 300 * "a"


@pytest.fixture
def unusable(tmp_path):
    """Paths that cannot be used, by a name for each kind."""
    (tmp_path / "occupied").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "locked").mkdir(mode=0)
    return {
        "long": tmp_path / LONG, "below a long name": tmp_path / LONG / "x", "loop": tmp_path / "loop",
        "below a file": tmp_path / "occupied" / "x", "unknown user": "~nosuchuser/x",
        "locked": tmp_path / "locked" / "x",
    }  # fmt: skip


KINDS = [
    "long", "below a long name", "loop", "below a file", "unknown user",
    pytest.param("locked", marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_unusable_input_path_is_refused(refused, tiny_file, unusable, kind):
    path = unusable[kind]
    for words in (["train", "--config"], ["evaluate", "--checkpoint"], ["train", "--config", tiny_file, "--resume"]):
        assert f"{path}: " in refused(*words, path)
    assert "extends: " in refused("train", "--config", write_config(tiny_file.with_name("child.json"), path))


def write_config(path, parent):
    path.write_text(f'{{"extends": "{os.path.basename(parent)}"}}')
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_unusable_output_dir_is_refused(refused, tiny_file, unusable, kind):
    for words in (["train", "--config", tiny_file], ["train", "--config", tiny_file, "--resume", "latest"], ["compare"],
                  ["evaluate"], ["evaluate", "--model", LONG], ["export"], ["predict", tiny_file]):  # fmt: skip
        refused(*words, "--set", f"output_dir={unusable[kind]}")


def test_output_dir_that_is_a_file_is_named_with_its_cause(refused, tmp_path, tiny_file):
    (tmp_path / "occupied").touch()
    for words in (["compare"], ["evaluate"], ["train", "--config", tiny_file, "--resume", "latest"]):
        assert "occupied/" in (err := refused(*words, "--set", "output_dir=occupied"))
        assert "Not a directory" in err


@pytest.mark.parametrize("key", ["output_dir", "data.root"])
@pytest.mark.parametrize(
    ("value", "message"),
    [("~nosuchuser/x", "~nosuchuser"), ("a\0b", "null character"), ("a\udcffb", "not valid UTF-8")],
)
def test_directory_that_no_system_accepts_is_refused(key, value, message):
    with pytest.raises(InputError, match=message):
        parse_config({}, "test", [f"{key}={value}"])


def test_home_directory_that_is_not_known_is_refused(monkeypatch):
    """A container with a user id that has no entry in /etc/passwd."""

    def fail(_):
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", fail)
    with pytest.raises(InputError, match="output_dir: the home directory of ~ is not known"):
        parse_config({}, "test", ["output_dir=~/x"])


def test_null_character_in_path_is_refused(tmp_path):
    for load in (
        lambda: load_config(tmp_path / "a\0b"),
        lambda: load_trained_model(tmp_path / "a\0b", None),
        lambda: load_trained_model(None, "a\0b", [f"output_dir={tmp_path}"]),
    ):
        with pytest.raises(InputError):
            load()


# --- The file at fault --------------------------------------------------------------------------------------------


def test_translate_write_errors_names_file_that_failed(tmp_path):
    with (
        pytest.raises(InputError, match=rf"output_dir: cannot write to {tmp_path}/a/b: "),
        translate_write_errors(tmp_path),
    ):
        (tmp_path / "a" / "b").write_text("x")
    with pytest.raises(InputError, match=rf"cannot write to {tmp_path}: No space"), translate_write_errors(tmp_path):
        raise OSError(28, "No space left on device")
    (tmp_path / "occupied").touch()
    directory = tmp_path / "occupied" / "runs"
    with pytest.raises(InputError, match=r"occupied/runs: Not a directory"), translate_write_errors(directory / "deep"):
        directory.mkdir(parents=True)


def test_translate_write_errors_lets_errors_about_other_files_through(tmp_path):
    for path in (tmp_path / "template", tmp_path / "outputs2" / "x"):
        with pytest.raises(FileNotFoundError), translate_write_errors(tmp_path / "outputs"):
            path.read_text()


@pytest.mark.usefixtures("trained_run")
def test_missing_template_is_named(command, monkeypatch):
    monkeypatch.setattr(report, "TEMPLATE", "missing.html.j2")
    status, _, err = command("evaluate")
    assert status == 1
    assert "missing.html.j2" in err
    assert "output_dir" not in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("trained_run")
def test_evaluate_needs_no_directory_for_temporary_files(command, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/nonexistent")
    assert command("evaluate")[0] == 0


def test_system_error_is_one_line_with_its_file(command, monkeypatch):
    def fail(overrides):
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr(doctor, "run_checks", fail)
    status, _, err = command("doctor")
    assert (status, err) == (1, "cifar_ignite: /some/file: Permission denied\n")


def small_program():
    return export_program(nn.Linear(100, 100), torch.zeros(2, 100))


def test_export_to_full_disk_raises(tmp_path):
    """A file of limited size, in a process of its own, which torch's writer would end."""
    program, pid = small_program(), os.fork()
    if not pid:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            save_pt2(program, tmp_path / "a.pt2", {})
        except OSError as error:
            status = error.errno
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == errno.EFBIG


def test_save_pt2_returns_the_saved_program(tmp_path):
    program, inputs = small_program(), torch.ones(3, 100)
    loaded = save_pt2(program, tmp_path / "a.pt2", {})
    assert torch.equal(loaded(inputs), program.module()(inputs))

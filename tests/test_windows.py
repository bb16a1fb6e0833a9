"""Rules of Windows, imitated: no Windows was available. Every command that writes runs without what Windows lacks."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path, PureWindowsPath

import pytest

from cifar_ignite import config_fields, files
from cifar_ignite.config_io import load_config, parse_config
from cifar_ignite.data import cifar_files
from cifar_ignite.data.cifar10 import CIFAR10_FILES
from cifar_ignite.errors import InputError
from cifar_ignite.evaluate import link_checkpoint
from cifar_ignite.files import (
    atomic_write,
    check_portable_name,
    check_windows_path,
    delete,
    fsync_directory,
    replace,
    write_text,
)
from tests.helpers import REPOSITORY, only_run
from tests.helpers.fake_windows import ACCESS_DENIED, PRIVILEGE_NOT_HELD, SHARING_VIOLATION, windows_error

PROGRAM = REPOSITORY / "tests" / "helpers" / "fake_windows.py"
OUTPUT = ("--set", "output_dir=outputs")


@pytest.fixture
def run_on_windows(tmp_path):
    """A function that runs commands as on Windows, with a console in its code page, and returns status and output."""

    def run(*words):
        environ = os.environ | {
            "PYTHONIOENCODING": "cp1252",
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONWARNDEFAULTENCODING": "1",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run([sys.executable, PROGRAM, *words], cwd=tmp_path, env=environ, capture_output=True)
        return done.returncode, done.stdout.decode("cp1252"), done.stderr.decode("cp1252")

    return run


# --- Commands -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="an imitation, of what Windows lacks")
def test_commands_work_without_what_windows_lacks(run_on_windows, tmp_path, tiny_file):
    words = ["train", "--config", tiny_file.name, *OUTPUT, "--set", "data.root=data"]
    status, out, err = run_on_windows(
        *words, "--", *words, "--set", "train.epochs=3", "--resume", "latest",
        "--", "evaluate", *OUTPUT, "--tta", "flip", "--", "compare", *OUTPUT, "--", "doctor", *OUTPUT,
    )  # fmt: skip
    assert status == 0, out + err
    assert "Traceback" not in err
    assert "done after epoch 3" in out
    (evaluation_dir,) = (tmp_path / "outputs" / "evaluations").iterdir()
    link = evaluation_dir / "model.pth"
    assert not link.is_symlink()
    assert link.samefile(tmp_path / "outputs" / "best_models" / "tiny_best.pth")
    for path in [*(only_run(tmp_path) / "logs").glob("*.csv"), *evaluation_dir.glob("*.*s*")]:
        assert b"\r" not in path.read_bytes()
    names = {path.name for path in (only_run(tmp_path) / "checkpoints").iterdir()}
    assert len(names) == 2 + 1 + 1  # the latest two, one that is kept, and the best model; nothing temporary


# --- Files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def waits(monkeypatch):
    """Seconds that were waited for a file to become free."""
    seconds = []
    monkeypatch.setattr(files.time, "sleep", seconds.append)
    return seconds


def fail_times(count, number, call):
    """Return a function that raises an error of Windows `count` times, and then calls another one."""
    left = [count]

    def refused(*args, **kwargs):
        left[0] -= 1
        if left[0] >= 0:
            raise windows_error(number, args[0])
        return call(*args, **kwargs)

    return refused


@pytest.mark.parametrize("number", [ACCESS_DENIED, SHARING_VIOLATION])
def test_atomic_write_retries_while_file_is_in_use(tmp_path, monkeypatch, waits, number):
    path = tmp_path / "file"
    path.write_bytes(b"previous")
    monkeypatch.setattr(os, "replace", fail_times(3, number, os.replace))
    with atomic_write(path) as temp_path:
        temp_path.write_bytes(b"new")
    assert path.read_bytes() == b"new"
    assert waits == list(files.RETRY_DELAYS[:3])


def test_atomic_write_gives_up_on_file_that_stays_in_use(tmp_path, monkeypatch, waits):
    path = tmp_path / "file"
    path.write_bytes(b"previous")
    monkeypatch.setattr(os, "replace", fail_times(99, SHARING_VIOLATION, os.replace))
    with pytest.raises(PermissionError), atomic_write(path) as temp_path:
        temp_path.write_bytes(b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"previous"
    assert len(waits) == len(files.RETRY_DELAYS)


def test_replace_does_not_wait_for_permission_that_never_comes(tmp_path, monkeypatch, waits):
    """On other platforms, the error means that the directory is not writable."""
    monkeypatch.setattr(os, "replace", fail_times(1, None, os.replace))
    with pytest.raises(PermissionError):
        replace(tmp_path / "a", tmp_path / "b")
    assert waits == []


def test_delete_leaves_file_that_stays_in_use(tmp_path, monkeypatch, waits, caplog):
    path = tmp_path / "file"
    path.write_bytes(b"x")
    monkeypatch.setattr(os, "unlink", fail_times(99, SHARING_VIOLATION, os.unlink))
    delete(path)
    assert path.exists()
    assert "file: not deleted" in caplog.text
    assert len(waits) == len(files.RETRY_DELAYS)


def test_fsync_directory_opens_no_directory_on_windows(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_DIRECTORY", raising=False)
    opened = []
    monkeypatch.setattr(os, "open", lambda *arguments: opened.append(arguments))
    fsync_directory(tmp_path)
    assert opened == []


def test_download_replaces_empty_directory(tmp_path, monkeypatch):
    """Windows does not replace a directory, not even an empty one."""

    def refuse_existing(source, target, rename=os.replace):
        if os.path.lexists(target):
            raise windows_error(ACCESS_DENIED, target)
        rename(source, target)

    def extract(url, root, **options):
        (Path(root) / CIFAR10_FILES.directory).mkdir()
        (Path(root) / CIFAR10_FILES.directory / "test_batch").write_bytes(b"x")

    monkeypatch.setattr(os, "replace", refuse_existing)
    monkeypatch.setattr(cifar_files, "download_and_extract_archive", extract)
    (tmp_path / CIFAR10_FILES.directory).mkdir()
    cifar_files.download_files(CIFAR10_FILES, tmp_path)
    assert (tmp_path / CIFAR10_FILES.directory / "test_batch").exists()


def test_write_text_writes_same_bytes_on_all_platforms(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "linesep", "\r\n")
    write_text(tmp_path / "file", "é\n\udcff\n")
    assert (tmp_path / "file").read_bytes() == "é\n?\n".encode()


@pytest.mark.parametrize("error", [windows_error(PRIVILEGE_NOT_HELD, "link"), ValueError("path is on mount 'D:'")])
@pytest.mark.parametrize("has_hard_links", [True, False])
def test_link_checkpoint_without_symbolic_links_makes_hard_link_or_copy(tmp_path, monkeypatch, error, has_hard_links):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(os, "symlink", fail)
    if not has_hard_links:
        monkeypatch.setattr(os, "link", lambda *args, **kwargs: fail_times(1, ACCESS_DENIED, None)(*args))
    (tmp_path / "best.pth").write_bytes(b"weights")
    link_checkpoint(tmp_path / "best.pth", tmp_path / "model.pth")
    assert (tmp_path / "model.pth").read_bytes() == b"weights"
    assert (tmp_path / "model.pth").samefile(tmp_path / "best.pth") == has_hard_links


def check_encodings(*paths):
    """Return what ruff finds: calls that read or write text in the encoding of the platform."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--preview", "--select=PLW1514", "--no-cache"]
    return subprocess.run([*command, *map(str, paths)], capture_output=True, encoding="utf-8")


def test_text_files_have_an_encoding(tmp_path):
    assert check_encodings(REPOSITORY / "cifar_ignite", REPOSITORY / "benchmarks").returncode == 0
    fault = tmp_path / "fault.py"
    write_text(fault, "from pathlib import Path\n\nPath('x').read_text()\n")
    assert "fault.py" in check_encodings(fault).stdout


def tables_without_line_end(source):
    """Return the lines that write a CSV file with the line end of the platform."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    tables = (call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "to_csv")
    return [call.lineno for call in tables if "lineterminator" not in {keyword.arg for keyword in call.keywords}]


def test_csv_files_are_the_same_on_all_platforms():
    sources = [path.read_text(encoding="utf-8") for path in (REPOSITORY / "cifar_ignite").rglob("*.py")]
    assert sum(source.count("to_csv(") for source in sources) == 6
    assert [line for source in sources for line in tables_without_line_end(source)] == []
    assert tables_without_line_end("a.to_csv(b, lineterminator='x')\nc.to_csv(d, index=False)") == [2]


def test_config_with_windows_line_ends_is_read(tmp_path):
    for name in ("se.json", "se_fast.json"):
        text = (REPOSITORY / "configs" / name).read_bytes().replace(b"\n", b"\r\n")
        (tmp_path / name).write_bytes(text)
    assert load_config(tmp_path / "se_fast.json") == load_config(REPOSITORY / "configs" / "se_fast.json")


# --- Names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["con", "NUL", "aux.v2", "Com1", "lpt9.a.b", "run.", "run ", "a:b", "a?", 'a"b', "a\n"]
)
def test_check_portable_name_refuses_what_windows_does(name):
    with pytest.raises(ValueError, match=name.split("\n")[0].rstrip(" ?")):
        check_portable_name(name)


@pytest.mark.parametrize("name", ["se", "console", "com10", "nul_2", "a.con", ".hidden", "résumé", "a b"])
def test_check_portable_name_accepts_others(name):
    assert check_portable_name(name) == name


@pytest.mark.parametrize("name", ["con", "nul.v2", "run."])
def test_experiment_with_name_of_windows_is_refused(refused, tiny_file, name):
    """On every platform, so that runs can be moved."""
    assert refused("train", "--config", tiny_file, "--set", f"experiment={name}").count("experiment: ") == 1


@pytest.mark.parametrize("path", [r"runs:1", r"C:\data\aux", r"D:\a.\b", "C:/runs/a*", r"\\host\share\nul.txt"])
def test_check_windows_path_refuses_names(path):
    with pytest.raises(ValueError, match="rename it|choose another name"):
        check_windows_path(PureWindowsPath(path))


@pytest.mark.parametrize(
    "path", [r"C:\Users\Jürgen Müller\data", "C:/data", r"..\outputs", ".", r"\\host\share\x", "C:"]
)
def test_check_windows_path_accepts_drives_and_parents(path):
    check_windows_path(PureWindowsPath(path))


@pytest.mark.skipif(os.name == "nt", reason="other platforms accept these paths")
def test_directories_are_checked_on_windows_only(monkeypatch):
    path = Path("runs:1")
    assert config_fields._expand_user(path) == path
    with monkeypatch.context() as patched:
        patched.setattr("os.name", "nt")
        with pytest.raises(ValueError, match="runs:1"):
            config_fields._expand_user(path)


def test_directories_are_saved_with_forward_slashes():
    config = parse_config({}, "test").model_copy(update={"output_dir": PureWindowsPath(r"C:\runs\a")})
    assert json.loads(config.model_dump_json())["output_dir"] == "C:/runs/a"


def test_path_of_other_platform_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"^test: output_dir: "):
        parse_config({"output_dir": "a\0b"}, "test")

"""Finding, verifying, unpacking and downloading the official files of CIFAR."""

import gzip
import hashlib
import logging
import shutil
import tarfile
from http.client import IncompleteRead
from pathlib import Path
from urllib.error import URLError

import pytest

from cifar_ignite.data import cifar_files
from cifar_ignite.data.cifar10 import CIFAR10_FILES
from cifar_ignite.data.cifar_files import find_files, install_files, mismatched_files, missing_files
from cifar_ignite.errors import InputError
from tests.data.helpers import CIFAR10_DIR, load_cifar10, md5s_of, use_official
from tests.helpers import posix_only, snapshot, write_batch

ARCHIVE = CIFAR10_FILES.source.filename
OFFICIAL_MD5S = CIFAR10_FILES.all


def find_cifar10(root, md5s=OFFICIAL_MD5S):
    return find_files(CIFAR10_FILES, root, md5s)


@pytest.fixture
def offline(monkeypatch):
    """Have every download fail; return the calls."""
    calls = []

    def fail(*arguments, **_):
        calls.append(arguments)
        raise URLError("no route to host")

    monkeypatch.setattr(cifar_files, "download_and_extract_archive", fail)
    return calls


def write_archive(path, directory, monkeypatch):
    """Write an archive of a directory whose md5 counts as the official one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        archive.add(directory, CIFAR10_DIR)
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    use_official(monkeypatch, tgz_md5=md5)
    return path


# --- Finding and verifying ----------------------------------------------------------------------------------------


def test_missing_and_mismatched_files_are_listed(cifar_root):
    directory = cifar_root / CIFAR10_DIR
    assert list(OFFICIAL_MD5S) == [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    assert missing_files(directory, OFFICIAL_MD5S) == []
    assert mismatched_files(directory, OFFICIAL_MD5S) == list(OFFICIAL_MD5S)
    md5s = md5s_of(directory, "data_batch_1", "data_batch_2", "test_batch")
    assert mismatched_files(directory, md5s) == []
    (directory / "data_batch_2").write_bytes(b"")
    assert mismatched_files(directory, md5s) == ["data_batch_2"]
    (directory / "data_batch_2").unlink()
    assert missing_files(directory, OFFICIAL_MD5S) == missing_files(directory, md5s) == ["data_batch_2"]


@pytest.mark.parametrize(
    ("root", "place"),
    [
        ("x", "x/C"),
        ("x", "x"),
        ("x/C", "x/C"),
        ("x", "x/C/C"),
        ("x/C", "x/C/C"),
        ("x", "x/cifar-10-python/C"),
        ("x", "x/cifar10"),
        ("x/empty", "x/C"),
    ],
)
def test_load_cifar10_finds_files_one_level_up_or_down(tmp_path, cifar_root, caplog, offline, root, place):
    caplog.set_level(logging.INFO)
    root, place = (tmp_path / path.replace("C", CIFAR10_DIR) for path in (root, place))
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(cifar_root / CIFAR10_DIR, place)
    before = snapshot(tmp_path)
    assert find_cifar10(root) == place
    assert len(load_cifar10(root, train=True)) == 120
    assert (f"CIFAR-10 is in {place}" in caplog.text) == (place != root / CIFAR10_DIR)
    assert snapshot(tmp_path) == before
    assert not offline


def test_find_cifar10_prefers_place_of_download_then_complete_files(tmp_path, cifar_root):
    usual, nested = cifar_root / CIFAR10_DIR, cifar_root / CIFAR10_DIR / CIFAR10_DIR
    shutil.copytree(usual, nested)
    assert find_cifar10(cifar_root) == usual
    (usual / "test_batch").unlink()
    assert find_cifar10(cifar_root, CIFAR10_FILES.required(train=True)) == usual
    assert find_cifar10(cifar_root) == nested
    (nested / "test_batch").unlink()
    assert find_cifar10(cifar_root) == usual


def test_find_cifar10_ignores_hidden_and_incomplete_directories(tmp_path, cifar_root):
    for name in (".download-x", "old"):
        shutil.copytree(cifar_root / CIFAR10_DIR, tmp_path / "root" / name / CIFAR10_DIR)
    (tmp_path / "root" / "old" / CIFAR10_DIR / "data_batch_4").unlink()
    assert find_cifar10(tmp_path / "root") is None


@posix_only
def test_find_cifar10_with_several_copies_below_names_them(tmp_path, cifar_root):
    (tmp_path / "root").mkdir()
    for name in ("a", "b"):
        shutil.copytree(cifar_root, tmp_path / "root" / name)
    with pytest.raises(InputError, match=f"a/{CIFAR10_DIR}, .*b/{CIFAR10_DIR}.*DATA_DIR="):
        find_cifar10(tmp_path / "root")
    shutil.rmtree(tmp_path / "root" / "b")
    (tmp_path / "root" / "b").symlink_to("a")
    assert find_cifar10(tmp_path / "root").resolve() == tmp_path / "root" / "a" / CIFAR10_DIR


@posix_only
@pytest.mark.parametrize("name", ["x" * 300, "x\0y", "loop"], ids=["long", "null", "loop"])
def test_load_cifar10_from_inaccessible_path_names_it(tmp_path, offline, name):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="cannot access this path"):
        load_cifar10(tmp_path / name, train=True)
    assert not offline


# --- What else is there -------------------------------------------------------------------------------------------


def gzip_batches(root):
    for path in (root / CIFAR10_DIR).iterdir():
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(b"x"))
        path.unlink()


def replace_by_dangling_link(root):
    shutil.rmtree(root / CIFAR10_DIR)
    (root / CIFAR10_DIR).symlink_to("/mnt/gone")


def replace_by_file(root):
    shutil.rmtree(root / CIFAR10_DIR)
    (root / CIFAR10_DIR).write_text("")


def replace_root_by_file(root):
    shutil.rmtree(root)
    root.write_text("")


def remove_one(root):
    (root / CIFAR10_DIR / "data_batch_3").unlink()


def keep_meta_only(root):
    for name in OFFICIAL_MD5S:
        (root / CIFAR10_DIR / name).unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (gzip_batches, "data_batch_1.gz is gzipped: gunzip it"),
        (replace_by_dangling_link, f"{CIFAR10_DIR}: links to /mnt/gone, which does not exist"),
        (replace_by_file, f"{CIFAR10_DIR}: is a file"),
        (replace_root_by_file, "data: is a file"),
        (remove_one, f"{CIFAR10_DIR}: no file data_batch_3; "),
        (keep_meta_only, f"{CIFAR10_DIR} contains batches.meta"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_load_cifar10_with_something_else_in_its_place_names_it(cifar_root, tmp_path, offline, change, message):
    change(cifar_root)
    before = snapshot(tmp_path)
    with pytest.raises(InputError) as raised:
        load_cifar10(cifar_root, train=True)
    line = str(raised.value)
    assert message in line
    assert "DATA_DIR=" in line
    assert "\n" not in line
    assert not any(word in line for word in ("delete", "remove", "rm "))
    assert snapshot(tmp_path) == before
    assert not offline


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("cifar-10-batches-bin/data_batch_1.bin", "cifar-10-batches-bin is the binary version"),
        ("data_batch_1.bin", "data_batch_1.bin is of the binary version"),
        ("cifar-10-batches-mat/data_batch_1.mat", "cifar-10-batches-mat is the Matlab version"),
        ("trainLabels.csv", "trainLabels.csv is of Kaggle's PNG version"),
        ("data_batch_1.gz", "data_batch_1.gz is gzipped"),
        (ARCHIVE, f"{ARCHIVE} is not the official archive"),
        ("cifar-10-python (1).tar.gz", "cifar-10-python (1).tar.gz is not the official archive"),
        ("cifar-10-python.tar", "cifar-10-python.tar is not the official archive"),
        ("train/frog/1.png", "contains train"),
        (".DS_Store", "contains nothing"),
    ],
)
def test_failed_download_names_what_is_there_instead(tmp_path, caplog, offline, name, description):
    caplog.set_level(logging.INFO)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("x")
    before = snapshot(tmp_path)
    with pytest.raises(InputError) as raised:
        load_cifar10(tmp_path, train=True)
    assert description in str(raised.value)
    assert description in caplog.text
    assert snapshot(tmp_path) == before
    assert len(offline) == 1


# --- The archive --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [ARCHIVE, f"{CIFAR10_DIR}/{ARCHIVE}"])
def test_official_archive_is_unpacked_instead_of_a_download(tmp_path, cifar_root, monkeypatch, offline, place):
    root = tmp_path / "root"
    archive = write_archive(root / place, cifar_root / CIFAR10_DIR, monkeypatch)
    before = archive.read_bytes()
    assert len(load_cifar10(root, train=True)) == 120
    assert len(load_cifar10(root, train=False)) == 30
    assert archive.read_bytes() == before
    assert sorted(path.name for path in archive.parent.iterdir()) == [CIFAR10_DIR, ARCHIVE]
    assert not offline


def test_unpacking_that_fails_leaves_nothing_and_names_cause(tmp_path, cifar_root, monkeypatch, offline):
    archive = write_archive(tmp_path / "root" / ARCHIVE, cifar_root / CIFAR10_DIR, monkeypatch)

    def fail(archive, directory):
        (Path(directory) / CIFAR10_DIR).mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cifar_files, "extract_archive", fail)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=f"{ARCHIVE}: cannot unpack it in .*No space left on device"):
        load_cifar10(archive.parent, train=True)
    assert snapshot(tmp_path) == before


def test_archive_is_not_unpacked_over_other_files(tmp_path, cifar_root, monkeypatch, offline):
    root = write_archive(tmp_path / "root" / ARCHIVE, cifar_root / CIFAR10_DIR, monkeypatch).parent
    (root / CIFAR10_DIR).mkdir()
    (root / CIFAR10_DIR / "notes.txt").write_text("x")
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="cannot unpack it"):
        load_cifar10(root, train=True)
    assert snapshot(tmp_path) == before


# --- Download -----------------------------------------------------------------------------------------------------


def test_download_without_network_gives_advice_and_leaves_nothing(tmp_path, offline):
    with pytest.raises(InputError, match=r"no route to host.*put the official files into.*DATA=synthetic") as raised:
        load_cifar10(tmp_path / "a" / "b" / "data", train=True)
    assert "data.dataset=synthetic" in str(raised.value)
    assert not snapshot(tmp_path)


def test_download_to_path_below_a_file_gives_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="Not a directory"):
        install_files(CIFAR10_FILES, tmp_path / "file" / "a" / "data")


def test_download_that_breaks_off_gives_one_line(tmp_path, monkeypatch):
    def break_off(*_, **__):
        raise IncompleteRead(b"x", 10)

    monkeypatch.setattr(cifar_files, "download_and_extract_archive", break_off)
    with pytest.raises(InputError, match="IncompleteRead"):
        load_cifar10(tmp_path / "data", train=True)
    assert not snapshot(tmp_path)


@pytest.mark.parametrize("is_empty", [False, True])
def test_download_appears_only_when_complete(tmp_path, monkeypatch, is_empty):
    directory = tmp_path / "data" / CIFAR10_DIR
    if is_empty:
        directory.mkdir(parents=True)

    def download(url, root, filename, md5):
        assert md5 == CIFAR10_FILES.source.tgz_md5
        staged = Path(root) / CIFAR10_DIR
        staged.mkdir()
        for number in range(1, 6):
            assert missing_files(directory, OFFICIAL_MD5S) == list(OFFICIAL_MD5S)
            write_batch(staged / f"data_batch_{number}", 10, number)

    monkeypatch.setattr(cifar_files, "download_and_extract_archive", download)
    assert len(load_cifar10(tmp_path / "data", train=True)) == 50
    assert [path.name for path in (tmp_path / "data").iterdir()] == [CIFAR10_DIR]


def test_download_finished_by_another_process_is_used(tmp_path, monkeypatch):
    def download(url, root, filename, md5):
        for directory in (Path(root), tmp_path / "data"):
            (directory / CIFAR10_DIR).mkdir()
            write_batch(directory / CIFAR10_DIR / "test_batch", 10, 1)

    monkeypatch.setattr(cifar_files, "download_and_extract_archive", download)
    assert len(load_cifar10(tmp_path / "data", train=False)) == 10

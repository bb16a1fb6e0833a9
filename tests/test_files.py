"""Atomic writes, stale temporary files, the latest file, unique directories."""

import contextlib
import errno
import os
import re
import sys
import threading
import time

import pytest

from cifar_ignite import files
from cifar_ignite.errors import InputError
from cifar_ignite.files import lock_file
from tests.checkpointing.helpers import names_in
from tests.helpers import posix_only


@posix_only
def test_path_predicates_report_what_is_there(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("/mnt/gone")
    for name, exists, is_dir in (
        (".", True, True),
        ("file", True, False),
        ("none", False, False),
        ("file/none", False, False),
        ("link", False, False),
    ):
        assert files.path_exists(tmp_path / name) == exists
        assert files.is_directory(tmp_path / name) == is_dir


def assert_predicates_refuse(path):
    for predicate in (files.stat_path, files.path_exists, files.is_directory):
        with pytest.raises(InputError, match="cannot access this path: .") as raised:
            predicate(path)
        assert str(raised.value).startswith(str(path))


@posix_only
@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "loop"], ids=["long", "null", "loop"])
def test_path_predicates_with_invalid_path_name_it(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    assert_predicates_refuse(tmp_path / name)


@posix_only
def test_path_predicates_without_permission_name_path(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # nothing is closed to root
    try:
        assert_predicates_refuse(tmp_path / "closed" / "x")
    finally:
        os.seteuid(user)


def test_atomic_write_replaces_file_at_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_text("previous")
    with files.atomic_write(path) as temp_path:
        temp_path.write_text("new")
        assert temp_path.parent == tmp_path
        assert path.read_text() == "previous"
    assert path.read_text() == "new"
    assert names_in(tmp_path) == ["file"]


def test_atomic_writes_of_one_path_at_once_do_not_mix(tmp_path):
    """As in two containers that share a directory, whose process ids are equal."""
    path = tmp_path / "x"
    with files.atomic_write(path) as first, files.atomic_write(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert [child.name for child in tmp_path.iterdir()] == ["x"]


def test_failed_atomic_write_keeps_previous_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("previous")

    def fail():
        with files.atomic_write(path) as temp_path:
            temp_path.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "previous"
    assert names_in(tmp_path) == ["file"]


def test_remove_stale_temp_files_finds_those_of_atomic_write(tmp_path):
    with contextlib.suppress(FileNotFoundError), files.atomic_write(tmp_path / "file") as temp_path:
        temp_path.write_text("half")
        files.remove_stale_temp_files(tmp_path)
        assert names_in(tmp_path) == []


def test_remove_stale_temp_files_deletes_old_ones_only(tmp_path):
    for name, age in ((".best.pth.1.tmp", 7200), (".new.pth.2.tmp", 10), ("best.pth", 7200)):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    files.remove_stale_temp_files(tmp_path, older_than=3600)
    assert names_in(tmp_path) == [".new.pth.2.tmp", "best.pth"]
    files.remove_stale_temp_files(tmp_path)
    assert names_in(tmp_path) == ["best.pth"]


def test_remove_stale_temp_files_accepts_missing_directory(tmp_path):
    files.remove_stale_temp_files(tmp_path / "missing")
    assert names_in(tmp_path) == []


@posix_only
def test_lock_file_is_held_once(tmp_path):
    path = tmp_path / "log"
    path.write_text("kept")
    for _ in range(2):  # the first block has removed its lock
        with lock_file(path) as is_locked, lock_file(path) as is_locked_again:
            assert (is_locked, is_locked_again) == (True, False)
    assert path.read_text() == "kept"


def test_lock_file_tolerates_what_cannot_be_locked(tmp_path, monkeypatch):
    with lock_file(tmp_path / "missing" / "log") as is_locked:
        assert is_locked
    monkeypatch.delitem(sys.modules, "fcntl", raising=False)  # as on Windows
    with lock_file(tmp_path / "log"), lock_file(tmp_path / "log") as is_locked:
        assert is_locked


def test_fsync_flushes_file_and_directory(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    (tmp_path / "file").write_text("x")
    files.fsync_file(tmp_path / "file")
    files.fsync_directory(tmp_path)
    assert flushed == [(tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino]


@pytest.mark.parametrize("function", ["open", "fsync"])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_fsync_directory_tolerates_file_systems_without_it(tmp_path, monkeypatch, caplog, function, number):
    """CIFS, FUSE and WSL refuse to flush a directory, Windows refuses to open one; it is logged once per directory."""

    def refuse(*_):
        raise OSError(number, "not supported")

    caplog.set_level("INFO")
    monkeypatch.setattr(os, function, refuse)
    files.fsync_directory(tmp_path)
    files.fsync_directory(tmp_path)
    assert len([message for message in caplog.messages if str(tmp_path) in message]) == 1


def test_fsync_directory_reports_failing_disk(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        files.fsync_directory(tmp_path)


def test_latest_file_is_last_written_then_last_by_name(tmp_path):
    for name, modified in (("b", 100), ("a", 200), ("c", 200)):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (modified, modified))
    assert files.latest_file(sorted(tmp_path.iterdir())) == tmp_path / "c"
    assert files.latest_file([]) is None


def test_create_unique_dir_numbers_names(tmp_path):
    names = [files.create_unique_dir(tmp_path / "runs", "2026").name for _ in range(3)]
    assert names == ["2026", "2026_2", "2026_3"]


def test_create_unique_dir_from_threads_returns_different_directories(tmp_path):
    created, barrier = [], threading.Barrier(8)

    def create():
        barrier.wait()
        created.append(files.create_unique_dir(tmp_path, "run"))

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(created)) == 8


def test_timestamp_is_sortable_and_safe_in_file_names():
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", files.timestamp())


def test_translate_write_errors_names_directory_and_reason(tmp_path):
    with pytest.raises(InputError, match=r"^output_dir: ") as raised, files.translate_write_errors(tmp_path):
        (tmp_path / "missing" / "file").write_text("x")
    assert str(tmp_path) in str(raised.value)
    assert "No such file or directory" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_translate_write_errors_lets_other_errors_through(tmp_path):
    with pytest.raises(ZeroDivisionError), files.translate_write_errors(tmp_path):
        raise ZeroDivisionError

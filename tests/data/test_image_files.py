"""Finding image files below directories, and loading many of them."""

import os
from unittest.mock import Mock

import pytest
from PIL import Image

from cifar_ignite.data import image_files, image_reading
from cifar_ignite.data.image_files import find_images, load_images, printable
from cifar_ignite.errors import InputError
from tests.helpers import posix_only
from tests.helpers.images import smooth_image

# --- Finding ------------------------------------------------------------------------------------------------------


def create_files(directory, *names):
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).touch()


def find_names(directory, *paths):
    """Return what `find_images` finds, relative to a directory."""
    return [path.relative_to(directory).as_posix() for path in find_images(paths or [directory])]


def test_find_images_returns_all_files_below_directories_and_named_files(tmp_path):
    """Whatever their extension: loading shows what is an image."""
    create_files(tmp_path, "b.PNG", "a/c.jpeg", "a/no_extension", "a/photo.jpg_large", "IMG_1.HEIC", ".named.png")
    expected = ["IMG_1.HEIC", "a/c.jpeg", "a/no_extension", "a/photo.jpg_large", "b.PNG", ".named.png"]
    assert find_names(tmp_path, tmp_path, tmp_path / ".named.png") == expected


def test_find_images_counts_hidden_and_system_entries_in_one_line(tmp_path, caplog):
    create_files(tmp_path, "a.png", "._a.png", ".DS_Store", "b/Thumbs.db", "desktop.ini", ".hidden/b.png")
    create_files(tmp_path, "__MACOSX/._a.png", "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg")
    with caplog.at_level("INFO", "cifar_ignite"):
        assert find_names(tmp_path) == ["a.png"]
    (line,) = caplog.messages
    assert f"{tmp_path}: skipped 7 hidden or system entries (.DS_Store, ._a.png, .hidden)" in line


@posix_only
def test_find_images_follows_links_and_reads_each_directory_once(tmp_path):
    create_files(tmp_path, "root/a.png", "root/real/b.png", "elsewhere/c.png", "elsewhere/deep/d.png", "outside.png")
    links = {
        "root/1": "real",
        "root/cats": "../elsewhere",
        "root/loop": ".",
        "root/up": "..",
        "elsewhere/back": "../root",
    }
    for link, target in {**links, "elsewhere/deep/again": "..", "root/dangling.png": "none"}.items():
        (tmp_path / link).symlink_to(target)
    expected = ["a.png", "cats/c.png", "cats/deep/d.png", "dangling.png", "real/b.png"]
    assert find_names(tmp_path / "root") == expected
    (tmp_path / "link").symlink_to("root")
    assert find_names(tmp_path / "link") == expected


def test_find_images_logs_directory_that_cannot_be_listed(tmp_path, monkeypatch, caplog):
    create_files(tmp_path, "a.png", "private/b.png")
    scandir = os.scandir

    def deny(path):
        if str(path).endswith("private"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    assert find_names(tmp_path) == ["a.png"]
    assert caplog.messages == [f"{tmp_path}/private: cannot list this directory (Permission denied)"]
    with pytest.raises(InputError, match="private: cannot list"):
        find_images([tmp_path / "private"])


@posix_only
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.png", "No such file"),
        (300 * "x", "name too long"),
        ("a\0b.png", r"a\?b\.png: embedded null"),
        ("file.png/x", "Not a directory"),
        ("~nosuchuser/x", "No such file"),
        ("empty", "no images"),
        ("loop", "symbolic links"),
    ],
)
def test_find_images_rejects_path_that_cannot_be_read(tmp_path, name, message):
    create_files(tmp_path, "file.png", "empty/.hidden.png")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match=message) as caught:
        find_images([tmp_path / name])
    assert "\n" not in str(caught.value)


@posix_only
@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="requires POSIX permissions")
def test_find_images_rejects_path_without_permission(tmp_path):
    create_files(tmp_path, "private/a.png")
    (tmp_path / "private").chmod(0)
    user = os.geteuid()
    try:
        if user == 0:  # root may read everything
            os.seteuid(65534)
        with pytest.raises(InputError, match="Permission denied"):
            find_images([tmp_path / "private" / "a.png"])
    finally:
        os.seteuid(user)


# --- Loading ------------------------------------------------------------------------------------------------------


def test_load_images_without_files_returns_empty_tensor():
    images, unreadable = load_images([], 32)
    assert unreadable == {}
    assert images.shape == (0, 3, 32, 32)


@posix_only
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="requires named pipes")
def test_load_images_does_not_wait_for_named_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    images, unreadable = load_images(find_images([tmp_path]), 32)
    assert len(images) == 0
    assert unreadable == {tmp_path / "pipe": "not a regular file"}


@posix_only
@pytest.mark.parametrize("size", [32, 48])
def test_load_images_decides_by_content(tmp_path, size):
    """Images without an extension or with a wrong one are read; what is none gets a line."""
    image = Image.fromarray(smooth_image(40, 40))
    image.save(tmp_path / "image", "JPEG")
    image.save(tmp_path / "image.txt", "PNG")
    (tmp_path / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500))
    (tmp_path / "b.png").write_text("text")
    (tmp_path / "c.png").symlink_to("none")
    images, unreadable = load_images(find_images([tmp_path]), size)
    assert images.shape == (2, 3, size, size)
    assert [path.name for path in unreadable] == ["a.HEIC", "b.png", "c.png"]
    assert all(reason and "\n" not in reason for reason in unreadable.values())


@pytest.mark.parametrize("error", [MemoryError(), OSError("broken data stream")])  # libjpeg reports it as damage
def test_load_images_reports_lack_of_memory(tmp_path, monkeypatch, error):
    Image.fromarray(smooth_image(40, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(image_reading, "to_rgb", Mock(side_effect=error))
    monkeypatch.setattr(image_files, "can_allocate", lambda size: False)
    _, unreadable = load_images([tmp_path / "a.png"], 32)
    assert "not enough memory" in unreadable[tmp_path / "a.png"]


@posix_only
def test_printable_replaces_what_does_not_fit_in_a_line():
    assert printable("a\nb\x1b\udce9é\u202f.png") == "a?b??é\u202f.png"

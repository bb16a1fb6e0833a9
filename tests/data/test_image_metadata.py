"""Images with malformed metadata: read as if they had none."""

import zlib

import pytest
import torch
from PIL import Image

from tests.data.image_bytes import insert_jpeg_segment, insert_png_chunk, png_chunk
from tests.helpers.images import load_image, smooth_image

ORIENTATION_6 = b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
MALFORMED_RESOLUTION = b"\x1a\x01\x05\0\x02\0\0\0\x08\0\0\0"
EXIF_6 = b"II*\0\x08\0\0\0\x01\0" + ORIENTATION_6 + bytes(4)
EXIF_6_AND_MALFORMED = b"II*\0\x08\0\0\0\x02\0" + ORIENTATION_6 + MALFORMED_RESOLUTION + bytes(4)
MALFORMED_EXIF = [b"\0\x08\0\x02\x01\x12\0\x03", b"II*\0\x08\0", b"Exif\0\0", b"MM\0*\xff\xff\xff\xff"]


@pytest.fixture
def image():
    return Image.fromarray(smooth_image(48, 64))


def assert_same_image(path, reference):
    """Assert that a file is loaded like an image of the same format without metadata."""
    assert torch.equal(load_image(path), load_image(reference))


@pytest.mark.parametrize("exif", MALFORMED_EXIF)
@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
def test_load_image_ignores_malformed_exif(tmp_path, image, extension, exif):
    path, reference = tmp_path / f"a.{extension}", tmp_path / f"b.{extension}"
    for file in (path, reference):
        image.save(file, **({"exif": exif} if extension == "webp" and file == path else {}))
    if extension == "png":
        insert_png_chunk(path, png_chunk(b"eXIf", exif))
    elif extension == "jpg":
        insert_jpeg_segment(path, 0xE1, b"Exif\0\0" + exif)
    assert_same_image(path, reference)


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n      8\n45xz")),
        png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**22))),
        png_chunk(b"zTXt", b"Comment\0\0not compressed"),
        png_chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta tiff:Orientation="6'),
        png_chunk(b"tEXt", b"Comment\0text")[:-4] + b"bad!",
        png_chunk(b"cHRM", b"short"),
        png_chunk(b"iCCP", b"\0"),
    ],
    ids=["raw profile", "large text", "damaged text", "XMP", "checksum", "chromaticities", "color profile"],
)
def test_load_image_ignores_malformed_png_chunks(tmp_path, image, chunk):
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.png")
    insert_png_chunk(tmp_path / "a.png", chunk)
    if b'tiff:Orientation="6' in chunk:  # readable for Pillow, although the XML is not complete
        image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "b.png")
    assert_same_image(tmp_path / "a.png", tmp_path / "b.png")


@pytest.mark.parametrize(
    ("marker", "content"),
    [
        (0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\x10" + bytes(7)),
        (0xE0, b"JFIF\0\x01"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
        (0xE1, b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="'),
    ],
    ids=["Photoshop", "JFIF", "ICC", "MPF", "XMP"],
)
def test_load_image_ignores_malformed_jpeg_segments(tmp_path, image, marker, content):
    image.save(tmp_path / "a.jpg")
    image.save(tmp_path / "b.jpg")
    insert_jpeg_segment(tmp_path / "a.jpg", marker, content)
    assert_same_image(tmp_path / "a.jpg", tmp_path / "b.jpg")


def test_load_image_keeps_orientation_beside_malformed_metadata(tmp_path, image):
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "b.png")
    image.save(tmp_path / "a.png")
    insert_png_chunk(tmp_path / "a.png", png_chunk(b"eXIf", EXIF_6_AND_MALFORMED))
    assert_same_image(tmp_path / "a.png", tmp_path / "b.png")
    upright, turned = tmp_path / "upright.jpg", tmp_path / "turned.jpg"
    image.save(upright)
    image.save(turned)
    insert_jpeg_segment(turned, 0xE1, b"Exif\0\0" + EXIF_6)
    insert_jpeg_segment(turned, 0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\x10" + bytes(7))
    difference = load_image(turned).int() - torch.rot90(load_image(upright).int(), -1, (1, 2))
    assert difference.abs().max() <= 1


def test_load_image_ignores_malformed_tiff_tag(tmp_path, image):
    """Pillow stops at a tag that it cannot read, and misses those behind it."""
    image.save(tmp_path / "b.tiff", description="a text of some length")
    content = (tmp_path / "b.tiff").read_bytes()
    entry = content.index(b"\x0e\x01\x02\0")  # tag 270, a string
    (tmp_path / "a.tiff").write_bytes(content[: entry + 8] + b"\xff" * 4 + content[entry + 12 :])
    assert_same_image(tmp_path / "a.tiff", tmp_path / "b.tiff")


def test_load_image_reads_file_without_orientation_if_it_is_malformed(tmp_path, image):
    image.save(tmp_path / "b.jpg")
    for name, entry in (("text", b"\x12\x01\x02\0\x02\0\0\x006\0\0\0"), ("9", ORIENTATION_6.replace(b"\6", b"\t"))):
        image.save(tmp_path / f"{name}.jpg")
        insert_jpeg_segment(tmp_path / f"{name}.jpg", 0xE1, b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + bytes(4))
        assert_same_image(tmp_path / f"{name}.jpg", tmp_path / "b.jpg")


def test_load_image_still_refuses_damaged_pixels(tmp_path, image):
    """Files are read again without metadata only to find what is damaged."""
    for extension in ("png", "jpg", "tiff"):
        image.save(tmp_path / f"a.{extension}")
        content = (tmp_path / f"a.{extension}").read_bytes()
        (tmp_path / f"a.{extension}").write_bytes(content[: len(content) // 2])
        with pytest.raises(Exception, match="(?i)truncated"):
            load_image(tmp_path / f"a.{extension}")

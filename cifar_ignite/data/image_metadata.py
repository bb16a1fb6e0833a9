"""Metadata of image files: the orientation, and files that can be read only without their metadata."""

from pathlib import Path
from typing import Literal

from PIL import ExifTags, Image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"
# APP0, APP2 to APP13, APP15 and comments; not APP1, which holds the orientation, and Adobe's color transform in APP14.
JPEG_METADATA_MARKERS = (0xE0, *range(0xE2, 0xEE), 0xEF, 0xFE)
JPEG_END_OF_HEADER = (b"\xda", b"\xff", b"")  # start of scan, fill byte, end of file
TIFF_SIGNATURES: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}
# Names, texts, orientation, resolution, dates; and all above REFERENCE_BLACK_WHITE: XMP, EXIF, GPS, color profiles, ...
TIFF_METADATA_TAGS = (269, 270, 271, 272, 274, 282, 283, 285, 286, 287, 296, 297, 305, 306, 315, 316)
TIFF_LAST_PIXEL_TAG = 532
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def apply_orientation(image: Image.Image) -> Image.Image:
    """Return a decoded image upright, as its EXIF or XMP orientation says; as it is if that cannot be read.

    `ImageOps.exif_transpose` also writes the other tags again, which fails if one of them is malformed.
    """
    try:
        method = ORIENTATIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # malformed metadata raises almost anything: SyntaxError, ValueError, TypeError, struct.error
        return image
    return image if method is None else image.transpose(method)


def read_without_metadata(file: Path) -> bytes | None:
    """Return the content of a PNG, JPEG or TIFF file without its metadata, or None if it is another file.

    Pillow refuses these files if their metadata is malformed; viewers ignore it.
    """
    with file.open("rb") as opened:
        signature = opened.read(len(PNG_SIGNATURE))
        if signature == PNG_SIGNATURE:
            return _strip_png(signature + opened.read())
        if signature[:4] in TIFF_SIGNATURES:
            return _strip_tiff(bytearray(signature + opened.read()), TIFF_SIGNATURES[signature[:4]])
        return _strip_jpeg(signature + opened.read()) if signature.startswith(JPEG_SIGNATURE) else None


def _strip_png(data: bytes) -> bytes:
    """Drop the chunks that are not required for decoding, whose names start with a lowercase letter, except tRNS."""
    kept, position = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while name := data[position + 4 : position + 8]:
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if name == b"tRNS" or name[:1].isupper():
            kept.append(data[position:end])
        position = end
    return b"".join(kept)


def _strip_jpeg(data: bytes) -> bytes:
    """Drop the segments of metadata up to the first one that is none, or is malformed; APP1 holds the orientation."""
    kept, position = [data[:2]], 2
    while data[position : position + 1] == b"\xff" and data[position + 1 : position + 2] not in JPEG_END_OF_HEADER:
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if data[position + 1] not in JPEG_METADATA_MARKERS:
            kept.append(data[position:end])
        position = end
    return b"".join(kept) + data[position:]


def _strip_tiff(data: bytearray, byte_order: Literal["little", "big"]) -> bytes:
    """Replace the values of metadata in the first directory by a single byte, 1."""
    directory = int.from_bytes(data[4:8], byte_order)
    num_entries = int.from_bytes(data[directory : directory + 2], byte_order)
    for entry in range(directory + 2, min(directory + 2 + 12 * num_entries, len(data) - 11), 12):
        tag = int.from_bytes(data[entry : entry + 2], byte_order)
        if tag in TIFF_METADATA_TAGS or tag > TIFF_LAST_PIXEL_TAG:
            byte_type, count = (1).to_bytes(2, byte_order), (1).to_bytes(4, byte_order)
            data[entry + 2 : entry + 12] = byte_type + count + b"\1\0\0\0"
    return bytes(data)

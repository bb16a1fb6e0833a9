"""Writers of PNG and TIFF files that Pillow cannot write: pixel types, transparent values and malformed metadata."""

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
GRAY, RGB, GRAY_ALPHA = 0, 2, 4  # color types of PNG


def png_chunk(name: bytes, content: bytes) -> bytes:
    """Return one chunk of a PNG file."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def write_png(path: Path, rows: list[bytes], header: tuple[int, int, int], transparent: bytes = b"") -> Path:
    """Write a PNG file; return `path`.

    Args:
        path: File to write.
        rows: Packed samples of each row.
        header: Width, bits per sample and color type.
        transparent: Content of tRNS.
    """
    width, bits, color_type = header
    start = struct.pack(">IIBBBBB", width, len(rows), bits, color_type, 0, 0, 0)
    key = png_chunk(b"tRNS", transparent) if transparent else b""
    pixels = png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    path.write_bytes(PNG_SIGNATURE + png_chunk(b"IHDR", start) + key + pixels + png_chunk(b"IEND", b""))
    return path


def insert_png_chunk(path: Path, chunk: bytes) -> None:
    """Insert a chunk in front of the pixels of a PNG file."""
    content = path.read_bytes()
    path.write_bytes(content[:33] + chunk + content[33:])


def insert_jpeg_segment(path: Path, marker: int, content: bytes) -> None:
    """Insert a segment at the start of a JPEG file."""
    image = path.read_bytes()
    path.write_bytes(image[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + image[2:])


def write_tiff(path: Path, pixels: bytes, tags: Mapping[int, tuple[int, ...]]) -> Path:
    """Write an uncompressed 32x32 TIFF file with the pixels in one strip; return `path`.

    Args:
        path: File to write.
        pixels: Packed samples.
        tags: Values of further tags, such as 258 (bits per sample) and 262 (0: zero is white, 1: zero is black).
    """
    entries = {256: (32,), 257: (32,), 259: (1,), 273: (8,), 278: (32,), 279: (len(pixels),), 277: (1,), **tags}
    directory, values = struct.pack("<H", len(entries)), b""
    values_start = 8 + len(pixels) + 2 + 12 * len(entries) + 4
    for tag, value in sorted(entries.items()):
        packed = struct.pack(f"<{len(value)}H", *value).ljust(4, b"\0")
        if len(packed) > 4:
            values, packed = values + packed, struct.pack("<I", values_start + len(values))
        directory += struct.pack("<HHI", tag, 3, len(value)) + packed
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory + bytes(4) + values)
    return path


def pack_12_bits(values: np.ndarray) -> bytes:
    """Return an even number of 12-bit values, two in three bytes."""
    first, second = values.reshape(-1, 2).astype(int).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8).tobytes()

"""All 16 bits of a PNG file in colour or with transparency; Pillow keeps only 8.

Pillow's decoder undoes filters and interlacing. It runs twice, for the high byte of each value and
for the low byte.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from typing import BinaryIO

_HEADER = struct.Struct(">8x4x4s8xBB2xB")  # chunk name, bits, colour type, interlacing
_COLOUR, _GREY_ALPHA, _COLOUR_ALPHA = 2, 4, 6


def is_deep(file: BinaryIO) -> bool:
    """Whether `file` is a 16-bit PNG in colour or with alpha; the file position is restored."""
    place = file.tell()
    file.seek(0)
    head = file.read(_HEADER.size)
    file.seek(place)
    if len(head) < _HEADER.size:
        return False
    name, bits, colour, _ = _HEADER.unpack(head)
    return name == b"IHDR" and bits == 16 and colour in (_COLOUR, _GREY_ALPHA, _COLOUR_ALPHA)


def _packed(file: BinaryIO) -> bytes:
    """The compressed pixels: the contents of the IDAT chunks."""
    file.seek(8)
    parts = []
    while len(start := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", start)
        if name == b"IEND":
            break
        if name != b"IDAT":
            file.seek(length + 4, 1)
            continue
        data, check = file.read(length), file.read(4)
        if len(data) < length or check != struct.pack(">I", zlib.crc32(name + data)):
            raise ValueError("an IDAT chunk is cut short or damaged")
        parts.append(data)
    return b"".join(parts)


def deep_values(file: BinaryIO, size: tuple[int, int]) -> np.ndarray:
    """The values of a file with `is_deep`, of (width, height) `size`, without alpha.

    Returns [height, width] (grey) or [height, width, 3] uint16. Raises ValueError for damaged data.
    """
    from PIL import Image

    file.seek(0)
    _, _, colour, interlaced = _HEADER.unpack(file.read(_HEADER.size))
    packed = _packed(file)

    def decoded(mode: str, layout: str) -> np.ndarray:
        image = Image.frombytes(mode, size, packed, "zip", layout, interlaced)
        return np.asarray(image)

    if colour == _GREY_ALPHA:  # four bytes per pixel: high, low, two of alpha
        bytes_ = decoded("RGBA", "RGBA")
        high, low = bytes_[..., 0], bytes_[..., 1]
    else:
        mode = "RGB" if colour == _COLOUR else "RGBA"
        high = decoded(mode, f"{mode};16B")[..., :3]
        low = decoded(mode, f"{mode};16L")[..., :3]  # the second byte of each pair
    values = high.astype(np.uint16)
    values <<= 8
    values |= low
    return values

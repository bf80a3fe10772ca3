"""Radiographs from disk or memory as 8-bit RGB; files are untrusted.

JPEG, PNG and DICOM, 8 and 16 bit, grey and colour, rotated by their EXIF tag. Values of more than 8
bits, grey or colour, are scaled from their minimum and maximum to 0..255 (DICOM: by the window),
since 12-bit radiographs in 16-bit files would be black otherwise. Every failure of an image is a
RecordError with a constant reason; an image is never replaced by another.
"""

from __future__ import annotations

import io
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cpo_fast.data.deep_png import deep_values, is_deep
from cpo_fast.data.dicom import dicom_image, dicom_size, is_dicom
from cpo_fast.data.files import NotAFile, open_regular
from cpo_fast.errors import RecordError
from cpo_fast.types import ImageRef

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from PIL import Image

MAX_DECODED_PIXELS = 64_000_000
"""Larger images are refused before decoding; a large radiograph has 16 million pixels."""

MAX_FILE_BYTES = 256_000_000

FILES = "files"
"""The only folder of a root that can be a link out of it: clusters often store the files/ of
MIMIC-CXR on another disk than its tables."""

_FORMATS = ("JPEG", "PNG")
_MAX_MESSAGE = 300
_QUOTED = re.compile(
    r"""(?<!\w)[bu]?'(?:\\.|[^'\\])*(?:'|$)|(?<!\w)[bu]?"(?:\\.|[^"\\])*(?:"|$)|<[^>]*(?:>|$)""",
    re.DOTALL,
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+://")


def _name(ref: ImageRef) -> str:
    """The path for messages; a value too long for a path is not repeated, since it can be any
    text."""
    return ref.path if len(ref.path) <= 300 else f"a path of {len(ref.path)} characters"


def resolve(ref: ImageRef) -> str:
    """The absolute path of `ref`, links resolved; below its root or the target of `FILES` in it.

    Raises RecordError "image-missing" (no path), "image-remote" (a URL) or "path-outside-root".
    """
    if not ref.path or "\0" in ref.path:
        raise RecordError("image-missing", "the record has no usable path")
    if _URL.match(ref.path):
        raise RecordError(
            "image-remote", "images are read from disk: download them and give their paths"
        )
    if not ref.root:
        return str(Path(ref.path).resolve())
    root = Path(ref.root).resolve()
    path = (root / ref.path).resolve()
    if not path.is_relative_to(root) and not path.is_relative_to((root / FILES).resolve()):
        raise RecordError(
            "path-outside-root",
            f"{_name(ref)} leaves {ref.root}; set image_root to a common parent folder",
        )
    return str(path)


def add_path(ref: ImageRef, error: RecordError) -> RecordError:
    """The error with the image's path in its detail."""
    if not ref.path or _name(ref) in error.detail:
        return error
    return RecordError(error.reason, f"{_name(ref)}: {error.detail}")


@contextmanager
def _open(ref: ImageRef) -> Iterator[tuple[BinaryIO, str]]:
    """The bytes of `ref` as a file, and its name for messages. Raises RecordError."""
    if ref.data is not None:
        name = _name(ref) or "image in the record"
        if not ref.data:
            raise RecordError("image-empty", name)
        yield io.BytesIO(ref.data), name
        return
    path = resolve(ref)
    try:
        file = open_regular(path)
    except FileNotFoundError:
        raise RecordError(
            "image-missing", f"{_name(ref)} is not in {ref.root or 'the current folder'}"
        ) from None
    except NotAFile as error:
        raise RecordError("image-not-a-file", f"{_name(ref)} {error.strerror}") from None
    except OSError as error:
        raise RecordError("image-unreadable", f"{_name(ref)}: {error.strerror}") from None
    with file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise RecordError("image-empty", _name(ref))
        if size > MAX_FILE_BYTES:
            raise RecordError(
                "image-too-large", f"{_name(ref)}: {size} bytes, at most {MAX_FILE_BYTES}"
            )
        yield file, _name(ref)


def _decoder_message(error: Exception) -> str:
    """The decoder's message in one line, without quoted values: they come from the file and can
    identify a patient."""
    message = " ".join(_QUOTED.sub("...", str(error)).split())
    return f"while decoding: {message[:_MAX_MESSAGE]}" if message else "while decoding"


@contextmanager
def _open_for_decoding(ref: ImageRef, max_pixels: int) -> Iterator[tuple[BinaryIO, str]]:
    """The file of `ref` and its name; decoder errors become RecordErrors."""
    from PIL import Image

    with _open(ref) as (file, name):
        try:
            yield file, name
        except (RecordError, MemoryError):
            raise
        except Image.DecompressionBombError:
            raise RecordError("image-too-large", f"{name}: more than {max_pixels} pixels") from None
        except Exception as error:  # decoders raise anything on malformed bytes
            raise RecordError(
                "image-unreadable", f"{name}: {type(error).__name__} {_decoder_message(error)}"
            ) from None


@contextmanager
def _open_picture(file: BinaryIO, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """A JPEG or PNG opened by its header and checked for size."""
    from PIL import Image

    with Image.open(file, formats=_FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise RecordError(
                "image-too-large", f"{name}: {width} x {height}, at most {max_pixels} pixels"
            )
        yield image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8, if it precedes the pixels, where `image_size` can read it too."""
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return 1
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # a damaged tag is ignored; the pixels are usable
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _stretch(values: np.ndarray) -> Image.Image:
    """Values of more than 8 bits, [height, width] or [height, width, 3] -> 8 bits, mode L or RGB.
    The minimum of all channels maps to 0 and their maximum to 255."""
    from PIL import Image

    low, high = float(values.min()), float(values.max())
    if not np.isfinite(high - low):
        raise ValueError("not finite")
    scale = 255.0 / (high - low) if high > low else 0.0
    if values.dtype == np.uint16:
        table = (np.arange(1 << 16, dtype=np.float32) - low) * scale + 0.5
        return Image.fromarray(np.clip(table, 0.0, 255.0).astype(np.uint8)[values])
    return Image.fromarray(((values.astype(np.float32) - low) * scale + 0.5).astype(np.uint8))


def image_size(ref: ImageRef, *, max_pixels: int = MAX_DECODED_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels of the image that `load_image` returns, read from the header only.

    Raises RecordError as `load_image`, except for errors found by decoding only (truncated data).
    """
    with _open_for_decoding(ref, max_pixels) as (file, name):
        if is_dicom(file):
            return dicom_size(file, name, max_pixels)
        with _open_picture(file, name, max_pixels) as image:
            width, height = image.size
            return (height, width) if _orientation(image) >= 5 else (width, height)


def load_image(ref: ImageRef, *, max_pixels: int = MAX_DECODED_PIXELS) -> Image.Image:
    """`ref` as a PIL image in mode RGB, 8 bits, upright. Raises RecordError as `load_shades`."""
    image = load_shades(ref, max_pixels=max_pixels)
    return image.convert("RGB") if image.mode != "RGB" else image


def load_shades(ref: ImageRef, *, max_pixels: int = MAX_DECODED_PIXELS) -> Image.Image:
    """`ref` as a PIL image, 8 bits, upright, in mode L if the file is grey, else RGB.

    Raises RecordError: "image-missing", "image-empty", "image-unreadable" (not an image, truncated,
    another format), "image-too-large" (pixels or bytes), "image-not-a-file" (folder, device, pipe),
    "image-remote", "path-outside-root", "image-needs-pydicom" (DICOM without pydicom),
    "no-decoder" (a DICOM transfer syntax that needs a missing package; the detail names it).
    """
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    with _open_for_decoding(ref, max_pixels) as (file, name):
        if is_dicom(file):
            return dicom_image(file, name, max_pixels)
        with _open_picture(file, name, max_pixels) as image:
            turn = turns.get(_orientation(image))
            if is_deep(file):
                scaled = _stretch(deep_values(file, image.size))
            elif image.mode.startswith(("I", "F")):
                scaled = _stretch(np.asarray(image))
            else:
                image.load()
                scaled = image
            upright = scaled.transpose(turn) if turn is not None else scaled
            return upright.copy() if upright.mode in ("L", "RGB") else upright.convert("RGB")

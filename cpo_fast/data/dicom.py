"""DICOM radiographs as 8-bit grey or RGB, through pydicom (an optional extra).

Stored values are mapped by the modality's rescale and the file's first valid window (without one:
by its VOI lookup table, else from their minimum to their maximum). MONOCHROME1 is inverted, padding
is black (PS3.3 C.7.5.1.1.2, C.7.6.3, C.11.1, C.11.2). Sizes are read before pixels, and a deflated
data set, which could unpack without bound, is refused.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from cpo_fast.errors import RecordError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from PIL import Image

_PREAMBLE = 128
_MAGIC = b"DICM"
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
_RULES = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
_HEADER_BYTES = 1 << 16

# Only these tags are read, so that pydicom reports no patient names or dates.
_TAGS = [
    "BitsAllocated", "BitsStored", "Columns", "HighBit", "ModalityLUTSequence", "NumberOfFrames",
    "PhotometricInterpretation", "PixelPaddingRangeLimit", "PixelPaddingValue",
    "PixelRepresentation", "PlanarConfiguration", "RescaleIntercept", "RescaleSlope", "Rows",
    "SamplesPerPixel", "VOILUTFunction", "VOILUTSequence", "WindowCenter", "WindowWidth",
]  # fmt: skip


def is_dicom(file: BinaryIO) -> bool:
    """Whether `file` starts like a DICOM file; the file position is reset to the start."""
    head = file.read(_PREAMBLE + len(_MAGIC))
    file.seek(0)
    return head.endswith(_MAGIC) and len(head) == _PREAMBLE + len(_MAGIC)


@contextmanager
def _without_validation(name: str) -> Iterator[None]:
    """Without pydicom's validation, which quotes values that can identify a patient."""
    try:
        from pydicom import config
    except ImportError:
        raise RecordError(
            "image-needs-pydicom", f"{name} is DICOM; `pip install pydicom` to read it"
        ) from None
    with config.disable_value_validation():
        yield


def _check_decoder(found: Any) -> None:
    """Raises RecordError "no-decoder", with the packages that pydicom supports, if none is
    installed for the transfer syntax of `found`."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import JPEGExtended12Bit

    syntax = found.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        known, missing = False, []
    else:
        known, missing = decoder.is_available, decoder.missing_dependencies
    if syntax == JPEGExtended12Bit and found.get("BitsStored") != 8:
        # pillow and gdcm decode only 8 of the up to 12 bits of this syntax
        known = known and "pylibjpeg" in decoder.available_plugins
        missing = [packages for packages in missing if packages.startswith("pylibjpeg")]
    if known:
        return
    # "gdcm - requires gdcm>=3.0.10" -> "python-gdcm", the PyPI name
    packages = [re.sub(r"[<>=]=?[\d.]+", "", one.partition(" requires ")[2]) for one in missing]
    packages = ["python-gdcm" if one == "gdcm" else one for one in packages]
    remedy = (
        f"install {'; or '.join(sorted(packages))}"
        if packages
        else "convert the file to Explicit VR Little Endian"
    )
    raise RecordError(
        "no-decoder", f"No decoder for this transfer syntax ({syntax.name}, {syntax}): {remedy}"
    )


def _read(file: BinaryIO, name: str, max_pixels: int, *, header: bool) -> Any:
    """The data set of `file`; size and decoder are checked before the pixels are read."""
    from pydicom import dcmread

    if _DEFLATED in file.read(_HEADER_BYTES):
        raise RecordError("image-unreadable", f"{name}: a deflated DICOM file")
    file.seek(0)
    found = dcmread(file, stop_before_pixels=True, specific_tags=list(_TAGS))
    width, height = int(found.Columns), int(found.Rows)
    if width * height > max_pixels:
        raise RecordError(
            "image-too-large", f"{name}: {width} x {height}, at most {max_pixels} pixels"
        )
    frames = int(found.get("NumberOfFrames") or 1)
    kind = found.get("PhotometricInterpretation")
    if width < 1 or height < 1 or frames != 1 or kind not in (*_GREY, *_COLOUR):
        raise RecordError("image-unreadable", f"{name}: not one radiograph in grey or colour")
    _check_decoder(found)
    if header:
        return found
    file.seek(0)
    return dcmread(file, specific_tags=[*_TAGS, "PixelData"])


def dicom_size(file: BinaryIO, name: str, max_pixels: int) -> tuple[int, int]:
    """(width, height) in pixels from the header. Raises RecordError as `load_image`, or any
    error of pydicom.
    """
    with _without_validation(name):
        found = _read(file, name, max_pixels, header=True)
        return int(found.Columns), int(found.Rows)


def dicom_image(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    """The image in mode L or RGB. Raises RecordError as `load_image`, or any error of pydicom."""
    with _without_validation(name):
        return _to_image(_read(file, name, max_pixels, header=False))


def _to_image(found: Any) -> Image.Image:
    from PIL import Image
    from pydicom.pixels import pixel_array

    kind = str(found.PhotometricInterpretation)
    high = _high_bit(found)
    cells = pixel_array(found, correct_unused_bits=False)  # [height, width] or [height, width, 3]
    if kind not in _GREY:
        if cells.dtype != np.uint8 or found.BitsStored != 8:
            raise ValueError("colour of other than 8 bits")
        return Image.fromarray(cells)
    # The shifts clear the bits above the high bit (overlays, noise) and extend the sign.
    above = max(0, 8 * cells.dtype.itemsize - high - 1)
    values = (cells << above) >> (above + high + 1 - found.BitsStored)
    padded = _padding_mask(values, cells, found)
    shown = _apply_window(_rescale(values, found), ~padded, found)
    if kind == "MONOCHROME1":
        shown = 1.0 - shown
    shown[padded] = 0.0
    return Image.fromarray((shown * 255.0 + 0.5).astype(np.uint8))


def _high_bit(found: Any) -> int:
    """Position of the most significant bit in a cell. Raises ValueError if it is inconsistent."""
    from pydicom.uid import RLELossless

    stored, high = int(found.BitsStored), found.get("HighBit")
    high = stored - 1 if high is None else int(high)
    syntax = found.file_meta.TransferSyntaxUID
    movable = found.SamplesPerPixel == 1 and (
        not syntax.is_encapsulated or syntax == RLELossless  # JPEG stores samples, not cells
    )
    if not stored - 1 <= high < int(found.BitsAllocated) or (high >= stored and not movable):
        raise ValueError(
            f"HighBit {high} with BitsStored {stored}, {found.BitsAllocated} allocated"
        )
    return high


def _padding_mask(values: np.ndarray, cells: np.ndarray, found: Any) -> np.ndarray:
    """Which pixels are padding by PixelPaddingValue and PixelPaddingRangeLimit."""
    first = found.get("PixelPaddingValue")
    last = found.get("PixelPaddingRangeLimit")
    if first is None:
        return np.zeros(values.shape, dtype=bool)
    bits, signed = 8 * cells.dtype.itemsize, values.dtype.kind == "i"
    ends = []
    for end in (first, first if last is None else last):
        end = int(end) % (1 << bits)  # files write -2000 as 63536 and vice versa
        ends.append(end - (1 << bits) if signed and end >> (bits - 1) else end)
    low, high = min(ends), max(ends)
    least = -(1 << (found.BitsStored - 1)) if signed else 0
    most = least + (1 << found.BitsStored) - 1
    # Padding outside the range of stored values uses the unused bits.
    compared = values if least <= low and high <= most else cells
    return (compared >= low) & (compared <= high)


def _apply_table(values: np.ndarray, table: Any, found: Any) -> np.ndarray:
    """Map integer `values` by a modality or VOI lookup table (PS3.3 C.11.1.1, C.11.2.1.1)."""
    entries, first, depth = (int(number) for number in table.LUTDescriptor)
    entries = entries % (1 << 16) or 1 << 16  # 0 means 65536
    if first >= 1 << 15 and values.min() < 0:
        first -= 1 << 16  # a negative number in a file that declares it unsigned
    data = table.LUTData
    if isinstance(data, bytes):
        order = "<" if found.original_encoding[1] else ">"
        wide = depth > 8 or len(data) >= 2 * entries
        data = np.frombuffer(data, np.dtype(f"{order}u2") if wide else np.uint8)
    outputs = np.asarray(data, dtype=np.float64)[:entries]
    if len(outputs) < entries:
        raise ValueError(f"{len(outputs)} of {entries} entries in a lookup table")
    places = np.clip(np.rint(values) - first, 0, entries - 1)
    return outputs[places.astype(np.int64)]


def _number(value: Any) -> float | None:
    """A DS value; None if it is blank or missing."""
    if value is None or value == "":
        return None
    if not np.isfinite(float(value)):
        raise ValueError("a number that is not finite")
    return float(value)


def _rescale(values: np.ndarray, found: Any) -> np.ndarray:
    """Stored values -> float64 values of the modality; a blank slope is 1, a blank intercept 0."""
    if tables := found.get("ModalityLUTSequence"):
        return _apply_table(values, tables[0], found)
    slope, intercept = _number(found.get("RescaleSlope")), _number(found.get("RescaleIntercept"))
    if slope == 0:
        raise ValueError("RescaleSlope is 0")
    return values * (1.0 if slope is None else slope) + (intercept or 0.0)


def _window(found: Any, rule: str) -> tuple[float, float] | None:
    """(center, width) of the first window with a valid width for the rule (PS3.3 C.11.2.1.2)."""
    several = [found.get(name) for name in ("WindowCenter", "WindowWidth")]
    lists = [[one] if one is None or isinstance(one, str | float | int) else one for one in several]
    for pair in zip(*lists, strict=False):
        center, width = map(_number, pair)
        if center is None or width is None:
            continue
        if width >= 1 or (width > 0 and rule != "LINEAR"):
            return center, width
    return None


def _apply_window(values: np.ndarray, inside: np.ndarray, found: Any) -> np.ndarray:
    """Values -> 0..1 by the file's window, its lookup table, or the range of the values
    `inside`."""
    rule = str(found.get("VOILUTFunction") or "LINEAR").strip().upper()
    if rule not in _RULES:
        raise ValueError(f"VOILUTFunction is none of {', '.join(_RULES)}")
    window = _window(found, rule)
    if window is None:
        if tables := found.get("VOILUTSequence"):
            values = _apply_table(values, tables[0], found)
        low = float(values.min(where=inside, initial=np.inf))
        high = float(values.max(where=inside, initial=-np.inf))
    elif rule == "SIGMOID":
        center, width = window
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - center) / width, -60.0, 60.0)))
    else:
        center, width = window
        if rule == "LINEAR":
            center, width = center - 0.5, width - 1
        low, high = center - width / 2, center + width / 2
    if not (np.isfinite(high - low) or high < low):
        raise ValueError("values that are not finite")
    if high <= low:  # a constant image, a window of one value, or only padding
        return (values > low).astype(np.float64)
    return np.clip((values - low) / (high - low), 0.0, 1.0)

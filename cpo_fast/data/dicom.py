"""DICOM radiographs as 8-bit grey or RGB, through pydicom (an optional extra).

Stored values pass through the modality's rescale and the window of the file (its first; without one
from their minimum to their maximum), MONOCHROME1 is inverted. Sizes are read before pixels, and
what could unpack without bound (a deflated data set) is refused.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from cpo_fast.errors import RecordError

if TYPE_CHECKING:
    from typing import BinaryIO

    from PIL import Image

_PREAMBLE = 128
_MAGIC = b"DICM"
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
_HEADER_BYTES = 1 << 16

# Nothing else of the file is looked at: patients' names and dates reach no warning of pydicom's.
_TAGS = [
    "BitsAllocated", "BitsStored", "Columns", "HighBit", "ModalityLUTSequence", "NumberOfFrames",
    "PhotometricInterpretation", "PixelRepresentation", "PlanarConfiguration", "RescaleIntercept",
    "RescaleSlope", "Rows", "SamplesPerPixel", "VOILUTFunction", "VOILUTSequence", "WindowCenter",
    "WindowWidth",
]  # fmt: skip


def is_dicom(file: BinaryIO) -> bool:
    """Whether `file` begins as a DICOM file; its place in the file is left at the start."""
    head = file.read(_PREAMBLE + len(_MAGIC))
    file.seek(0)
    return head.endswith(_MAGIC) and len(head) == _PREAMBLE + len(_MAGIC)


def _decodable(found: Any) -> None:
    """Raises RecordError "no-decoder" where nothing installed decodes the transfer syntax of
    `found`, naming the packages that pydicom knows for it."""
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
        # pillow and gdcm decode only 8 of the 12 bits that this syntax may have
        known = known and "pylibjpeg" in decoder.available_plugins
        missing = [packages for packages in missing if packages.startswith("pylibjpeg")]
    if known:
        return
    # "gdcm - requires gdcm>=3.0.10" -> "python-gdcm", its name on PyPI
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
    """The data set of `file`, its size and decoder checked before its pixels are read."""
    try:
        from pydicom import dcmread
    except ImportError:
        raise RecordError(
            "image-needs-pydicom", f"{name} is DICOM; `pip install pydicom` to read it"
        ) from None
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
    _decodable(found)
    if header:
        return found
    file.seek(0)
    return dcmread(file, specific_tags=[*_TAGS, "PixelData"])


def dicom_size(file: BinaryIO, name: str, max_pixels: int) -> tuple[int, int]:
    """(width, height) in pixels from the header. Raises RecordError as `load_image`, or what
    pydicom raises.
    """
    found = _read(file, name, max_pixels, header=True)
    return int(found.Columns), int(found.Rows)


def dicom_image(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    """The image in mode L or RGB. Raises RecordError as `load_image`, or what pydicom raises."""
    from PIL import Image

    found = _read(file, name, max_pixels, header=False)
    from pydicom.pixels import apply_modality_lut, pixel_array

    kind = str(found.PhotometricInterpretation)
    values = pixel_array(found)  # [height, width] or [height, width, 3]
    if kind not in _GREY:
        if values.dtype != np.uint8:
            raise ValueError("colour of more than 8 bits")
        return Image.fromarray(values)
    grey = np.asarray(apply_modality_lut(values, found), dtype=np.float64)
    shown = _windowed(grey, found)
    if kind == "MONOCHROME1":
        shown = 1.0 - shown
    return Image.fromarray((shown * 255.0 + 0.5).astype(np.uint8))


def _first(value: Any) -> float | None:
    """A window value, which may be a list of several."""
    if value is None or value == "":
        return None
    return float(value if isinstance(value, int | float | str) else value[0])


def _windowed(values: np.ndarray, found: Any) -> np.ndarray:
    """Values -> 0..1 by the file's own first window (DICOM PS3.3 C.11.2.1.2), lookup table, or
    their range.
    """
    center, width = _first(found.get("WindowCenter")), _first(found.get("WindowWidth"))
    rule = str(found.get("VOILUTFunction") or "LINEAR")
    if center is None or width is None or width < 1:
        if "VOILUTSequence" in found:
            from pydicom.pixels import apply_voi_lut

            values = np.asarray(apply_voi_lut(values.astype(np.int64), found), dtype=np.float64)
        low, high = float(values.min()), float(values.max())
    elif rule == "SIGMOID":
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - center) / width, -60.0, 60.0)))
    elif rule == "LINEAR_EXACT":
        low, high = center - width / 2, center + width / 2
    else:
        low, high = center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2
    if not np.isfinite(high - low):
        raise ValueError("not finite")
    if high <= low:  # an even image, or a window of one value
        return (values > low).astype(np.float64)
    return np.clip((values - low) / (high - low), 0.0, 1.0)

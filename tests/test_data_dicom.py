"""DICOM through pydicom: windows, inversion, colour, sizes, and files that are damaged."""

from __future__ import annotations

import io
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from data_samples import SECRET
from hypothesis import given, settings
from hypothesis import strategies as st

from cpo_fast.data.images import image_size, load_image
from cpo_fast.errors import RecordError
from cpo_fast.types import ImageRef

pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed: pip install pydicom")


def dicom(values: np.ndarray, syntax: str = "1.2.840.10008.1.2.1", **tags: Any) -> ImageRef:
    """A DICOM file in memory; `tags` replace or (None) leave out what a plain radiograph has."""
    from pydicom.dataset import Dataset, FileMetaDataset

    bits = values.dtype.itemsize * 8
    found = Dataset()
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = syntax
    found.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    found.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    plain = {
        "PatientName": SECRET,
        "Rows": values.shape[0],
        "Columns": values.shape[1],
        "SamplesPerPixel": 1 if values.ndim == 2 else 3,
        "PhotometricInterpretation": "MONOCHROME2" if values.ndim == 2 else "RGB",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": 0,
        "PlanarConfiguration": None if values.ndim == 2 else 0,
    }
    for name, value in {**plain, **tags}.items():
        if value is not None:
            setattr(found, name, value)
    found.PixelData = values.tobytes()
    if found.file_meta.TransferSyntaxUID.is_encapsulated:
        found.PixelData = pydicom.encaps.encapsulate([values.tobytes()])
    buffer = io.BytesIO()
    found.save_as(buffer, enforce_file_format=True)
    return ImageRef("x.dcm", data=buffer.getvalue())


def grey(ref: ImageRef) -> np.ndarray:
    image = load_image(ref)
    assert (image.mode, image.size) == ("RGB", image_size(ref))
    values = np.asarray(image)
    assert (values == values[..., :1]).all()
    return values[..., 0]


TWELVE = np.linspace(0, 4095, 48).round().astype(np.uint16).reshape(6, 8)


def test_range_of_the_values_without_a_window() -> None:
    expected = TWELVE / 4095 * 255
    assert np.abs(grey(dicom(TWELVE)) - expected).max() <= 0.5 + 1e-6
    assert (grey(dicom(np.full((4, 4), 900, np.uint16))) == 0).all()


def test_monochrome1_is_inverted() -> None:
    normal = grey(dicom(TWELVE))
    inverted = grey(dicom(TWELVE, PhotometricInterpretation="MONOCHROME1"))
    assert normal[0, 0] == 0 and inverted[0, 0] == 255
    assert np.abs(255.0 - inverted - normal).max() <= 1


@pytest.mark.parametrize("rule", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("several", [False, True])
def test_window_after_rescale_is_pydicoms(rule: str | None, several: bool) -> None:
    from pydicom.pixels import apply_modality_lut, apply_windowing

    tags = {
        "RescaleSlope": "2",
        "RescaleIntercept": "-1000",
        "WindowCenter": ["2500", "100"] if several else "2500",
        "WindowWidth": ["3000", "10"] if several else "3000",
        "VOILUTFunction": rule,
        "BitsStored": 12,
        "HighBit": 11,
    }
    ref = dicom(TWELVE, **tags)
    found = pydicom.dcmread(io.BytesIO(ref.data or b""))
    theirs = apply_windowing(apply_modality_lut(found.pixel_array, found), found)
    low, high = -1000, 2 * 4095 - 1000
    assert np.abs(grey(ref) - (theirs - low) / (high - low) * 255).max() <= 0.6


def test_signed_values_and_colour() -> None:
    signed = TWELVE.astype(np.int16) - 2000
    assert (grey(dicom(signed, PixelRepresentation=1)) == grey(dicom(TWELVE))).all()
    colour = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
    assert (np.asarray(load_image(dicom(colour))) == colour).all()


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"Rows": 60_000, "Columns": 60_000}, "image-too-large"),
        ({"NumberOfFrames": "2"}, "image-unreadable"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "image-unreadable"),
        ({"PhotometricInterpretation": None}, "image-unreadable"),
        ({"Rows": None}, "image-unreadable"),
        ({"syntax": "1.2.840.10008.1.2.1.99"}, "image-unreadable"),
    ],
)
def test_what_is_refused_from_the_header(tags: dict, reason: str) -> None:
    ref = dicom(TWELVE, **tags)
    for read in (load_image, image_size):
        with pytest.raises(RecordError) as caught:
            read(ref)
        assert caught.value.reason == reason
        assert SECRET not in str(caught.value)


def test_pixels_that_are_missing() -> None:
    ref = dicom(TWELVE, Rows=100)
    assert image_size(ref) == (8, 100)
    with pytest.raises(RecordError, match="image-unreadable"):
        load_image(ref)


def test_without_pydicom(monkeypatch: pytest.MonkeyPatch) -> None:
    ref = dicom(TWELVE)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(RecordError, match="pip install pydicom") as caught:
        load_image(ref)
    assert caught.value.reason == "image-needs-pydicom"


@pytest.mark.parametrize(
    ("syntax", "name", "remedy"),
    [
        ("1.2.840.10008.1.2.4.57", "JPEG Lossless, Non-Hierarchical (Process 14)",
         "pylibjpeg and pylibjpeg-libjpeg; or python-gdcm"),
        ("1.2.840.10008.1.2.4.70", "JPEG Lossless, Non-Hierarchical, First-Order Prediction "
         "(Process 14 [Selection Value 1])", "pylibjpeg and pylibjpeg-libjpeg; or python-gdcm"),
        ("1.2.840.10008.1.2.4.80", "JPEG-LS Lossless Image Compression",
         "numpy and pyjpegls; or pylibjpeg and pylibjpeg-libjpeg; or python-gdcm"),
        ("1.2.840.10008.1.2.4.203", "High-Throughput JPEG 2000 Image Compression",
         "pylibjpeg and pylibjpeg-openjpeg"),
        ("1.2.840.10008.1.2.4.51", "JPEG Extended (Process 2 and 4)",
         "pylibjpeg and pylibjpeg-libjpeg"),
        ("1.2.840.10008.1.2.4.100", "MPEG2 Main Profile / Main Level", None),
    ],
)  # fmt: skip
def test_a_transfer_syntax_without_a_decoder_names_the_package(
    syntax: str, name: str, remedy: str | None
) -> None:
    wanted = f"install {remedy}" if remedy else "convert the file to Explicit VR Little Endian"
    detail = f"No decoder for this transfer syntax ({name}, {syntax}): {wanted}"
    if remedy and any(map(find_spec, ("libjpeg", "openjpeg", "gdcm", "jpeg_ls"))):
        pytest.skip("decoded by what is installed here")
    ref = dicom(TWELVE, syntax, BitsStored=12, HighBit=11)
    for read in (image_size, load_image):
        with pytest.raises(RecordError) as caught:
            read(ref)
        assert (caught.value.reason, caught.value.detail) == ("no-decoder", detail)


def test_a_failed_decoding_says_what_the_decoder_said() -> None:
    cut = dicom(TWELVE, Rows=100)
    with pytest.raises(RecordError, match="number of bytes of pixel data is less") as caught:
        load_image(cut)
    assert caught.value.reason == "image-unreadable"
    # A value that stands where it does not belong may be a patient's, and is not repeated.
    for tag in ("WindowCenter", "RescaleSlope"):
        tags = {"WindowWidth": "9", "RescaleIntercept": "0", tag: "1234567890123456"}
        raw = dicom(TWELVE, **tags).data or b""
        with pytest.raises(RecordError, match="while decoding") as caught:
            load_image(ImageRef("x", data=raw.replace(b"1234567890123456", b"Zebra-striped gr")))
        assert "Zebra" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(st.data())
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_an_image_or_a_reason(data: st.DataObject) -> None:
    raw = bytearray(dicom(TWELVE, WindowCenter="2000", WindowWidth="100").data or b"")
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(132, len(raw) - 1))] = data.draw(st.integers(0, 255))
    ref = ImageRef("x", data=bytes(raw[: data.draw(st.integers(140, len(raw)))]))
    for read in (image_size, lambda ref: load_image(ref, max_pixels=10_000).size):
        try:
            width, height = read(ref)
        except RecordError as error:
            assert error.reason in ("image-unreadable", "image-too-large", "no-decoder")
            assert SECRET.split()[0] not in str(error)
        else:
            assert width > 0 and height > 0

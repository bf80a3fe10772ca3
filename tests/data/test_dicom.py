"""DICOM through pydicom: windows, inversion, colour, sizes, and damaged files."""

from __future__ import annotations

import io
import sys
import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpo_fast.data.images import image_size, load_image
from cpo_fast.errors import RecordError
from cpo_fast.types import ImageRef
from tests.data.samples import SECRET

pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed: pip install pydicom")


def dicom(values: np.ndarray, syntax: str = "1.2.840.10008.1.2.1", **tags: Any) -> ImageRef:
    """A DICOM file in memory; `tags` replace or, with None, remove tags of a plain radiograph."""
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


def load_grey(ref: ImageRef) -> np.ndarray:
    image = load_image(ref)
    assert (image.mode, image.size) == ("RGB", image_size(ref))
    values = np.asarray(image)
    assert (values == values[..., :1]).all()
    return values[..., 0]


TWELVE = np.linspace(0, 4095, 48).round().astype(np.uint16).reshape(6, 8)


def test_values_are_stretched_without_a_window() -> None:
    expected = TWELVE / 4095 * 255
    assert np.abs(load_grey(dicom(TWELVE)) - expected).max() <= 0.5 + 1e-6
    assert (load_grey(dicom(np.full((4, 4), 900, np.uint16))) == 0).all()


def test_monochrome1_is_inverted() -> None:
    normal = load_grey(dicom(TWELVE))
    inverted = load_grey(dicom(TWELVE, PhotometricInterpretation="MONOCHROME1"))
    assert normal[0, 0] == 0 and inverted[0, 0] == 255
    assert np.abs(255.0 - inverted - normal).max() <= 1


@pytest.mark.parametrize("rule", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("several", [False, True])
def test_window_after_rescale_equals_pydicom(rule: str | None, several: bool) -> None:
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
    assert np.abs(load_grey(ref) - (theirs - low) / (high - low) * 255).max() <= 0.6


@pytest.mark.parametrize("rule", ["LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("width", ["0.5", "0.9"])
def test_fractional_windows_equal_pydicom(rule: str, width: str) -> None:
    from pydicom.pixels import apply_modality_lut, apply_windowing

    tags = {"RescaleSlope": "0.001", "RescaleIntercept": "0", "WindowCenter": "2"}
    ref = dicom(TWELVE, WindowWidth=width, VOILUTFunction=rule, **tags)
    found = pydicom.dcmread(io.BytesIO(ref.data or b""))
    theirs = apply_windowing(apply_modality_lut(found.pixel_array, found), found)
    expected = theirs / (0.001 * 65535) * 255
    assert np.abs(load_grey(ref) - expected).max() <= 0.6
    assert 20 < expected[3, 0] < 235  # neither the full range nor a threshold


@pytest.mark.parametrize(
    ("rule", "center", "width"),
    [(None, "1000", "0.5"), ("LINEAR", "1000", "0"), ("LINEAR_EXACT", "1000", "0"),
     ("SIGMOID", "1000", "-1"), (None, "", "2000"), (None, ["", ""], ["", ""])],
)  # fmt: skip
def test_invalid_window_is_ignored(rule: str | None, center: Any, width: Any) -> None:
    ref = dicom(TWELVE, WindowCenter=center, WindowWidth=width, VOILUTFunction=rule)
    assert (load_grey(ref) == load_grey(dicom(TWELVE))).all()


def test_first_complete_window_is_used() -> None:
    several = {"WindowCenter": ["", "1000", "3000"], "WindowWidth": ["50", "2000", "100"]}
    first = {"WindowCenter": "1000", "WindowWidth": "2000"}
    assert (load_grey(dicom(TWELVE, **several)) == load_grey(dicom(TWELVE, **first))).all()
    bad = {"WindowCenter": ["5", "1000"], "WindowWidth": ["0", "2000"]}
    assert (load_grey(dicom(TWELVE, **bad)) == load_grey(dicom(TWELVE, **first))).all()


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("window", [{}, {"WindowCenter": "2048", "WindowWidth": "4096"}])
@pytest.mark.parametrize(
    ("signed", "value", "limit", "put"),
    [(0, 65535, None, 65535), (0, 60000, 65535, 61234), (0, 65535, 60000, 61234),
     (1, -2000, None, -2000), (1, -32768, -32000, -32100)],
)  # fmt: skip
def test_padding_is_black_and_outside_the_range(
    kind: str, window: dict, signed: int, value: int, limit: int | None, put: int
) -> None:
    values = TWELVE.astype(np.int16 if signed else np.uint16)
    padded = values.copy()
    padded[:, :2] = put
    tags = {"PhotometricInterpretation": kind, "PixelRepresentation": signed, **window}
    padding = {"PixelPaddingValue": value, "PixelPaddingRangeLimit": limit}
    got = load_grey(dicom(padded, **tags, **padding))
    assert (got[:, :2] == 0).all()
    # Padding does not change the other pixels.
    assert (got[:, 2:] == load_grey(dicom(np.ascontiguousarray(values[:, 2:]), **tags))).all()


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.2"])
def test_padding_and_tables_of_other_encodings(syntax: str) -> None:
    big = syntax.endswith(".2.2")
    padded = TWELVE.astype(np.int16) - 2000
    padded[0] = -3000
    stored = padded.byteswap() if big else padded
    entries = np.linspace(4095, 0, 4096).round().astype(int).tolist()
    voi = pydicom.Sequence([lookup_table(entries, -2000, 12, packed=">u2" if big else "<u2")])
    for tags in ({}, {"VOILUTSequence": voi}):
        signed = {"PixelRepresentation": 1, "PixelPaddingValue": -3000, **tags}
        got = load_grey(dicom(stored, syntax, **signed))
        expected = load_grey(dicom(TWELVE[1:]))
        assert (got[0] == 0).all()
        top = 255.0 * (4095 - TWELVE[1:]) / (4095 - TWELVE[1, 0]) if tags else expected
        assert np.abs(got[1:] - top).max() <= 1


def test_padding_in_unused_bits_and_all_padding() -> None:
    padded = TWELVE.copy()
    padded[0] = 63536  # -2000, in a file of 12 bits
    tags = {"BitsStored": 12, "HighBit": 11, "PixelPaddingValue": 63536}
    assert (load_grey(dicom(padded, **tags))[1:] == load_grey(dicom(TWELVE[1:]))).all()
    assert (load_grey(dicom(padded, **tags))[0] == 0).all()
    even = np.full((4, 4), 7, np.uint16)
    for kind in ("MONOCHROME1", "MONOCHROME2"):
        all_padding = dicom(even, PixelPaddingValue=7, PhotometricInterpretation=kind)
        assert (load_grey(all_padding) == 0).all()


@pytest.mark.parametrize(
    ("slope", "intercept", "same"),
    [("", "", ("1", "0")), ("", "-1000", ("1", "-1000")), ("2", "", ("2", "0")),
     (None, "-1000", ("1", "-1000")), ("2", None, ("2", "0"))],
)  # fmt: skip
def test_blank_rescale_is_the_identity(slope: Any, intercept: Any, same: tuple[str, str]) -> None:
    window = {"WindowCenter": "1000", "WindowWidth": "1500"}
    got = load_grey(dicom(TWELVE, RescaleSlope=slope, RescaleIntercept=intercept, **window))
    expected = dicom(TWELVE, RescaleSlope=same[0], RescaleIntercept=same[1], **window)
    assert (got == load_grey(expected)).all()
    assert ((got > 0) & (got < 255)).any()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2.5"])
def test_values_above_unused_low_bits_and_below_overlays(signed: bool, syntax: str) -> None:
    values = TWELVE.astype(np.int16) - (2048 if signed else 0)
    tags = {"BitsStored": 12, "PixelRepresentation": int(signed), "PhotometricInterpretation":
            "MONOCHROME1"}  # fmt: skip
    noise = np.random.default_rng(0).integers(0, 16, TWELVE.shape, dtype=np.uint16)
    low = (values.view(np.uint16) & 4095) | noise << 12  # an overlay in the four high bits
    high = values.view(np.uint16) << 4 | noise
    expected = 255.0 - load_grey(dicom(TWELVE))
    for cells, bit in ((low, 11), (high, 15)):
        ref = dicom(cells, HighBit=bit, **tags)
        if syntax.endswith(".5"):
            found = pydicom.dcmread(io.BytesIO(ref.data or b""))
            found.compress(syntax)
            buffer = io.BytesIO()
            found.save_as(buffer)
            ref = ImageRef("x", data=buffer.getvalue())
        assert np.abs(load_grey(ref) - expected).max() <= 1


@pytest.mark.parametrize(
    "tags",
    [{"BitsStored": 12, "HighBit": 3}, {"BitsStored": 12, "HighBit": 16},
     {"RescaleSlope": "0", "RescaleIntercept": "0"}, {"VOILUTFunction": "CUBIC"}],
)  # fmt: skip
def test_unsupported_tags_are_set_aside(tags: dict) -> None:
    with pytest.raises(RecordError, match=r"HighBit|RescaleSlope|VOILUTFunction") as caught:
        load_image(dicom(TWELVE, **tags))
    assert caught.value.reason == "image-unreadable"


def lookup_table(entries: list[int], first: int, depth: int, **written: Any) -> pydicom.Dataset:
    found = pydicom.Dataset()
    found.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries), first, depth])
    packed = np.array(entries, written.get("packed", np.uint16)).tobytes()
    found.add_new("LUTData", "OW", packed)
    return found


@pytest.mark.parametrize("first", [-2000, 63536])
@pytest.mark.parametrize(("depth", "packed"), [(12, np.uint16), (8, np.uint16), (8, np.uint8)])
def test_lookup_tables_of_signed_values(first: int, depth: int, packed: Any) -> None:
    values = TWELVE.astype(np.int16) - 2000
    most = (1 << depth) - 1
    entries = np.linspace(most, 0, 4096).round().astype(int).tolist()
    voi = pydicom.Sequence([lookup_table(entries, first, depth, packed=packed)])
    tags = {"PixelRepresentation": 1, "VOILUTSequence": voi}
    assert np.abs(load_grey(dicom(values, **tags)) - (255.0 - TWELVE / 4095 * 255)).max() <= 1
    tags = {"PixelRepresentation": 1, "ModalityLUTSequence": voi}
    assert np.abs(load_grey(dicom(values, **tags)) - (255.0 - TWELVE / 4095 * 255)).max() <= 1


def test_lookup_tables_equal_pydicom() -> None:
    from pydicom.pixels import apply_modality_lut, apply_voi

    entries = np.sqrt(np.linspace(0, 65535**2, 3000)).round().astype(int).tolist()
    for name, theirs in (
        ("ModalityLUTSequence", apply_modality_lut),
        ("VOILUTSequence", apply_voi),
    ):
        ref = dicom(TWELVE, **{name: pydicom.Sequence([lookup_table(entries, 500, 16)])})
        found = pydicom.dcmread(io.BytesIO(ref.data or b""))
        expected = theirs(found.pixel_array, found).astype(float)
        expected = (expected - expected.min()) / (expected.max() - expected.min()) * 255
        assert np.abs(load_grey(ref) - expected).max() <= 0.6


def test_signed_values_and_colour() -> None:
    signed = TWELVE.astype(np.int16) - 2000
    assert (load_grey(dicom(signed, PixelRepresentation=1)) == load_grey(dicom(TWELVE))).all()
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
def test_invalid_headers_are_set_aside(tags: dict, reason: str) -> None:
    ref = dicom(TWELVE, **tags)
    for read in (load_image, image_size):
        with pytest.raises(RecordError) as caught:
            read(ref)
        assert caught.value.reason == reason
        assert SECRET not in str(caught.value)


def test_missing_pixels_are_set_aside() -> None:
    ref = dicom(TWELVE, Rows=100)
    assert image_size(ref) == (8, 100)
    with pytest.raises(RecordError, match="image-unreadable"):
        load_image(ref)


def test_missing_pydicom_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_transfer_syntax_without_a_decoder_names_the_package(
    syntax: str, name: str, remedy: str | None
) -> None:
    advice = f"install {remedy}" if remedy else "convert the file to Explicit VR Little Endian"
    detail = f"No decoder for this transfer syntax ({name}, {syntax}): {advice}"
    if remedy and any(map(find_spec, ("libjpeg", "openjpeg", "gdcm", "jpeg_ls"))):
        pytest.skip("an installed decoder supports it")
    ref = dicom(TWELVE, syntax, BitsStored=12, HighBit=11)
    for read in (image_size, load_image):
        with pytest.raises(RecordError) as caught:
            read(ref)
        assert (caught.value.reason, caught.value.detail) == ("no-decoder", detail)


def test_decoder_errors_are_reported_without_values(caplog: pytest.LogCaptureFixture) -> None:
    cut = dicom(TWELVE, Rows=100)
    with pytest.raises(RecordError, match="number of bytes of pixel data is less") as caught:
        load_image(cut)
    assert caught.value.reason == "image-unreadable"
    # A misplaced value can identify a patient, so messages do not repeat it.
    for tag in ("WindowCenter", "RescaleSlope", "VOILUTFunction"):
        tags = {"WindowWidth": "9", "RescaleIntercept": "0", tag: "1234567890123456"}
        raw = dicom(TWELVE, **tags).data or b""
        bad = ImageRef("x", data=raw.replace(b"1234567890123456", b"Zebra-striped gr"))
        with warnings.catch_warnings(), pytest.raises(RecordError, match="decoding") as caught:
            warnings.simplefilter("error")
            load_image(bad)
        assert "Zebra" not in str(caught.value) + caplog.text


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

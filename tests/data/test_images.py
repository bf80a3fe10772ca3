"""Images: formats, bit depths, orientation, invalid files."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cpo_fast.data.images import image_size, load_image, load_shades
from cpo_fast.errors import RecordError
from cpo_fast.types import ImageRef
from tests.data.samples import image_bytes

RADIOGRAPHS = Path(__file__).resolve().parents[3] / "shared/data/cxr_images/png"


def encode(image: Image.Image, format: str = "PNG", **options: object) -> ImageRef:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return ImageRef("x", data=buffer.getvalue())


def find_reason(ref: ImageRef, read=load_image, **options: int) -> str:  # type: ignore[no-untyped-def]
    with pytest.raises(RecordError) as caught:
        read(ref, **options)
    return caught.value.reason


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deep_png(
    values: np.ndarray, colour: int, *, interlaced: bool = False, exif: bytes = b""
) -> ImageRef:
    """A 16-bit PNG of `values` [height, width, channels] with all five row filters."""
    height, width, channels = values.shape
    step = 2 * channels
    body = b""
    for top, left, down, right in ADAM7 if interlaced else [(0, 0, 1, 1)]:
        part = values[top::down, left::right]
        if part.size == 0:
            continue
        rows = part.astype(">u2").reshape(len(part), -1).view(np.uint8).astype(int)
        above = np.zeros(rows.shape[1] + step, dtype=int)
        for number, row in enumerate(rows):
            here = np.concatenate([np.zeros(step, dtype=int), row])
            a, b, c = here[:-step], above[step:], above[:-step]
            p = np.stack([abs(b - c), abs(a - c), abs(a + b - 2 * c)]).argmin(0)
            paeth = np.choose(p, [a, b, c])
            kind = number % 5
            guess = [0 * row, a, b, (a + b) // 2, paeth][kind]
            body += bytes([kind]) + ((row - guess) % 256).astype(np.uint8).tobytes()
            above = here
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, int(interlaced))
    packed = zlib.compress(body)
    chunks = [(b"IHDR", header), (b"eXIf", exif), (b"IDAT", packed[:50]), (b"IDAT", packed[50:])]
    data = b"".join(chunk(name, part) for name, part in chunks if name != b"eXIf" or part)
    return ImageRef("x", data=b"\x89PNG\r\n\x1a\n" + data + chunk(b"IEND", b""))


ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2),
         (1, 0, 2, 1)]  # fmt: skip
FILM = np.random.default_rng(3).integers(90, 4096, (13, 17), dtype=np.uint16)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_twelve_bit_image_is_equal_in_every_mode(
    colour: int, channels: int, interlaced: bool
) -> None:
    values = np.repeat(FILM[..., None], channels, axis=2)
    if channels in (2, 4):
        values[..., -1] = np.random.default_rng(4).integers(0, 65536, FILM.shape)  # alpha
    ref = deep_png(values, colour, interlaced=interlaced)
    plain = np.asarray(load_image(encode(Image.fromarray(FILM))))
    expected = (FILM.astype(float) - FILM.min()) * 255 / (int(FILM.max()) - int(FILM.min()))
    assert (np.asarray(load_image(ref)) == plain).all()
    assert np.abs(plain[..., 0] - expected).max() <= 0.5 + 1e-3
    assert load_shades(ref).mode == ("L" if channels < 3 else "RGB")


def test_sixteen_bit_colour_keeps_its_hue_and_is_rotated() -> None:
    values = np.random.default_rng(5).integers(0, 3000, (6, 9, 3), dtype=np.uint16)
    values[0, 0] = (0, 100, 4095)
    exif = Image.Exif()
    exif[0x0112] = 6
    ref = deep_png(values, 2, exif=exif.tobytes().removeprefix(b"Exif\0\0"))
    got = np.asarray(load_image(ref))
    assert load_image(ref).size == image_size(ref) == (6, 9)
    expected = np.rot90(values.astype(float) / 4095 * 255, -1)
    assert np.abs(got - expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_damaged_sixteen_bit_files_are_refused(colour: int, channels: int) -> None:
    data = deep_png(np.repeat(FILM[..., None], channels, axis=2), colour).data or b""
    for cut in (60, len(data) // 2, len(data) - 20):
        assert find_reason(ImageRef("x", data=data[:cut])) == "image-unreadable"
    damaged = data[:100] + bytes([data[100] ^ 1]) + data[101:]
    assert find_reason(ImageRef("x", data=damaged)) == "image-unreadable"
    short = data.replace(struct.pack(">II", 17, 13), struct.pack(">II", 17, 14))
    assert find_reason(ImageRef("x", data=short)) == "image-unreadable"


def png_header(width: int, height: int, depth: int = 8) -> bytes:
    """A PNG file that declares a size and has almost no data."""
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    body = zlib.compress(b"\0" * 100)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("mode", "format"),
    [("L", "JPEG"), ("RGB", "JPEG"), ("CMYK", "JPEG"), ("L", "PNG"), ("LA", "PNG"), ("RGB", "PNG"),
     ("RGBA", "PNG"), ("P", "PNG"), ("1", "PNG"), ("I;16", "PNG")],
)  # fmt: skip
def test_every_mode_becomes_eight_bit_rgb(mode: str, format: str) -> None:
    ref = encode(Image.new(mode, (9, 5)), format)
    image = load_image(ref)
    assert (image.mode, image.size, image_size(ref)) == ("RGB", (9, 5), (9, 5))


def test_grey_keeps_its_values() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    got = np.asarray(load_image(encode(Image.fromarray(values))))
    assert (got == values[..., None]).all()


def test_twelve_bits_in_sixteen_are_stretched_not_black() -> None:
    values = np.linspace(100, 4095, 64).round().astype(np.uint16).reshape(8, 8)
    got = np.asarray(load_image(encode(Image.fromarray(values))))[..., 0]
    expected = (values.astype(float) - 100) * 255 / (4095 - 100)
    assert (got.min(), got.max()) == (0, 255)
    assert np.abs(got - expected).max() <= 0.5 + 1e-3


def test_uniform_sixteen_bit_image_is_black() -> None:
    got = np.asarray(load_image(encode(Image.fromarray(np.full((4, 4), 900, np.uint16)))))
    assert (got == 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(orientation: int, format: str) -> None:
    from PIL import ImageOps

    image = Image.fromarray(np.arange(0, 240, 5, dtype=np.uint8).reshape(8, 6))
    exif = Image.Exif()
    exif[0x0112] = orientation
    ref = encode(image, format, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(ref.data or b""))).convert("RGB")
    got = load_image(ref)
    assert got.size == image_size(ref) == expected.size
    assert (np.asarray(got) == np.asarray(expected)).all()


def test_size_and_pixels_agree_on_exif_after_the_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new("L", (8, 6))).data or b""
    late = data[:-12] + chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + data[-12:]
    ref = ImageRef("x", data=late)
    assert image_size(ref) == load_image(ref).size


def test_paths_below_the_root_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.jpg").write_bytes(image_bytes())
    assert image_size(ImageRef("a/x.jpg", str(tmp_path))) == (8, 6)
    assert image_size(ImageRef("a/../a/x.jpg", str(tmp_path))) == (8, 6)
    assert image_size(ImageRef(str(tmp_path / "a/x.jpg"), str(tmp_path))) == (8, 6)


@pytest.mark.parametrize("read", [load_image, image_size])
def test_paths_outside_the_root_are_refused(tmp_path: Path, read) -> None:  # type: ignore[no-untyped-def]
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "x.jpg").write_bytes(image_bytes())
    (root / "link.jpg").symlink_to(tmp_path / "x.jpg")
    (tmp_path / "root2").mkdir()
    for path in ("../x.jpg", str(tmp_path / "x.jpg"), "link.jpg", "../root2", "/dev/zero"):
        assert find_reason(ImageRef(path, str(root)), read) == "path-outside-root"


def test_root_or_its_files_can_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk/p10").mkdir(parents=True)
    (tmp_path / "disk/p10/x.jpg").write_bytes(image_bytes())
    (tmp_path / "other.jpg").write_bytes(image_bytes())
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/files").symlink_to(tmp_path / "disk")
    (tmp_path / "else").mkdir()
    (tmp_path / "else/x.jpg").write_bytes(image_bytes())
    (tmp_path / "tables/more").symlink_to(tmp_path / "else")
    (tmp_path / "root").symlink_to(tmp_path / "tables")
    for root in ("tables", "root"):
        assert image_size(ImageRef("files/p10/x.jpg", str(tmp_path / root))) == (8, 6)
        for path in ("files/../other.jpg", "more/x.jpg", "files/../../other.jpg"):
            outside = ImageRef(path, str(tmp_path / root))
            assert find_reason(outside, image_size) == "path-outside-root"


@pytest.mark.parametrize("read", [load_image, image_size])
def test_invalid_image_files_have_a_reason(tmp_path: Path, read) -> None:  # type: ignore[no-untyped-def]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("this is a report and not an image")
    (tmp_path / "picture.gif").write_bytes(image_bytes(format="GIF"))
    (tmp_path / "start.png").write_bytes(image_bytes(format="PNG")[:20])

    def fault(path: str) -> str:
        return find_reason(ImageRef(path, str(tmp_path)), read)

    assert fault("pipe") == fault("folder") == "image-not-a-file"
    assert fault("") == fault("nowhere.png") == fault("a\0b") == "image-missing"
    assert fault("empty.png") == "image-empty"
    assert fault("text.png") == fault("picture.gif") == fault("start.png") == "image-unreadable"
    assert fault("https://example.org/x.png") == fault("file:///etc/passwd") == "image-remote"
    assert find_reason(ImageRef("/dev/zero"), read) == "image-not-a-file"
    assert find_reason(ImageRef("x", data=b""), read) == "image-empty"
    assert fault("x" * 5000) == "image-unreadable"
    with pytest.raises(RecordError) as caught:
        read(ImageRef("secret " * 500, str(tmp_path)))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_decoding_finds_truncated_pixels(format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    data = encode(Image.fromarray(noise), format).data or b""
    ref = ImageRef("x", data=data[: len(data) // 2])
    assert image_size(ref) == (64, 64)
    assert find_reason(ref) == "image-unreadable"


@pytest.mark.parametrize("read", [load_image, image_size])
@pytest.mark.parametrize("side", [9_000, 12_000, 60_000, 2**31 - 1])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused(read, side: int) -> None:  # type: ignore[no-untyped-def]
    assert find_reason(ImageRef("x", data=png_header(side, side)), read) == "image-too-large"


def test_caller_sets_the_pixel_limit() -> None:
    ref = encode(Image.new("L", (10, 10)))
    assert image_size(ref, max_pixels=100) == (10, 10)
    assert find_reason(ref, max_pixels=99) == "image-too-large"


@settings(max_examples=150)
@given(st.sampled_from(["JPEG", "PNG", "deep"]), st.data())
def test_damaged_bytes_give_an_image_or_a_reason(format: str, data: st.DataObject) -> None:
    deep = deep_png(np.repeat(FILM[..., None], 4, axis=2), 6).data or b""
    raw = bytearray(deep if format == "deep" else image_bytes("RGB", (24, 16), format))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    ref = ImageRef("x", data=bytes(raw))
    for read in (image_size, lambda ref: load_image(ref, max_pixels=10_000).size):
        try:
            width, height = read(ref)
        except RecordError as error:
            assert error.reason in ("image-unreadable", "image-too-large")
        else:
            assert width > 0 and height > 0


def test_real_radiographs_are_read() -> None:
    if not RADIOGRAPHS.is_dir():
        pytest.skip("../shared/data/cxr_images is missing")
    paths = sorted(RADIOGRAPHS.glob("*.png"))
    assert len(paths) == 24
    for path in paths[:6]:
        ref = ImageRef(path.name, str(RADIOGRAPHS))
        image = load_image(ref)
        assert (image.mode, image.size) == ("RGB", image_size(ref))
        assert image.width == 640
        assert np.asarray(image).std() > 10

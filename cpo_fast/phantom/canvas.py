"""Drawing tools of the phantom: coordinates, masks, strokes, shared textures.

Coordinates range from -1 to 1, x to the right of the *image* (the patient's left), y downwards; `t`
is the distance from the midline towards a given side. Values are film densities from 0 (air, black)
to 1 (bone or metal, white). Fields are float32 [size, size]. Masks are products of clipped ramps,
which are ten times faster than exponentials.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Field = NDArray[np.floating[Any]]
SIDES = {"right": -1, "left": 1}  # the patient's right is on the left of the image
CHEST = 0.80  # maximum half-width of the lungs, the unit of the cardiothoracic ratio


@dataclass(frozen=True)
class Grid:
    """Fields shared by all images of one size."""

    x: Field  # [1, n]
    y: Field  # [n, 1]
    vessels: tuple[Field, ...]  # [n, n] branching lung markings, 0..1
    clouds: tuple[Field, ...]  # [n, n] smooth noise, about standard normal
    size: int


@dataclass
class Lung:
    """One side of the chest; curves are [n, 1] over y or [1, n] over x."""

    t: Field  # [1, n]
    outer: Field  # [n, 1] t of the chest wall
    dome: Field  # [1, n] y of the diaphragm
    mask: Field  # [n, n]


def ramp(distance: Field, width: float) -> Field:
    """0 outside, 1 inside, linear over `width` across distance = 0."""
    return np.clip(distance / width + 0.5, 0, 1)


def bump(distance: Field, radius: float) -> Field:
    """A bump of height 1 that falls smoothly to 0 at `radius`."""
    return np.clip(1 - (distance / radius) ** 2, 0, 1) ** 2


def blend(image: Field, alpha: Field, value: float) -> None:
    """Blend `image` in place towards `value` with opacity `alpha`."""
    image += alpha * (value - image)


def draw_strokes(size: int, lines: list[tuple[list[tuple[float, float]], float]]) -> Field:
    """Draw polylines (points, width) as a field 0..1, at twice the size for antialiasing."""
    canvas = Image.new("L", (2 * size, 2 * size))
    draw = ImageDraw.Draw(canvas)
    for points, width in lines:
        scaled = [((x + 1) * size, (y + 1) * size) for x, y in points]
        draw.line(scaled, fill=255, width=max(1, round(width * size)), joint="curve")
    return np.asarray(canvas.reduce(2), dtype=np.float32) / 255


@lru_cache(maxsize=4)
def build_grid(size: int) -> Grid:
    """The shared fields of one image size, independent of the seed."""
    axis = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1).astype(np.float32)
    rng = np.random.default_rng(7)
    clouds = []
    for cells in (14, 14, 18, 18):
        # The middle of nine tiles, so that a cloud can be rolled without a seam.
        coarse = np.tile(rng.standard_normal((cells, cells)).astype(np.float32), (3, 3))
        fine = Image.fromarray(coarse).resize((3 * size, 3 * size), Image.Resampling.BICUBIC)
        middle = np.asarray(fine)[size : 2 * size, size : 2 * size]
        clouds.append((middle - middle.mean()) / middle.std())
    vessels = tuple(_draw_vessels(rng, size) for _ in range(4))
    return Grid(axis[None, :], axis[:, None], vessels, tuple(clouds), size)


def _draw_vessels(rng: np.random.Generator, size: int) -> Field:
    lines: list[tuple[list[tuple[float, float]], float]] = []
    for sign in (-1, 1):
        for angle in np.linspace(-1.9, 1.5, 9):
            _add_branch(rng, lines, sign, 0.17, 0.02, angle + rng.normal(0, 0.12), 0.026, 3)
    image = Image.fromarray((draw_strokes(size, lines) * 255).astype(np.uint8))
    blurred = image.filter(ImageFilter.GaussianBlur(size / 256))
    return np.asarray(blurred, dtype=np.float32) / 255


def _add_branch(
    rng: np.random.Generator,
    lines: list[tuple[list[tuple[float, float]], float]],
    sign: int,
    t: float,
    y: float,
    angle: float,
    width: float,
    depth: int,
) -> None:
    """Add a vessel and its two branches; angle 0 points sideways, positive down."""
    length = rng.uniform(0.14, 0.24)
    t_end, y_end = t + length * np.cos(angle), y + length * np.sin(angle)
    lines.append(([(sign * t, y), (sign * t_end, y_end)], width))
    if depth:
        for turn in (-0.35, 0.35):
            bent = angle + turn + rng.normal(0, 0.1)
            _add_branch(rng, lines, sign, t_end, y_end, bent, width * 0.62, depth - 1)

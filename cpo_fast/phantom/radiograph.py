"""Draw a schematic frontal or lateral chest radiograph from a `Body` and its `Sign`s.

This module draws the anatomy, signs.py the signs; canvas.py defines the coordinates. Rotation and
scaling of the patient are one affine resampling at the end.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from cpo_fast.phantom.canvas import (
    CHEST,
    SIDES,
    Field,
    Grid,
    Lung,
    blend,
    build_grid,
    bump,
    draw_strokes,
    ramp,
)
from cpo_fast.phantom.cases import Body, Sign
from cpo_fast.phantom.signs import draw_in_lungs, draw_on_top


def draw_frontal(
    rng: np.random.Generator, body: Body, signs: tuple[Sign, ...], view: str, size: int
) -> Image.Image:
    """Draw a frontal view ("PA" or "AP") as an 8-bit greyscale image of size x size pixels.

    The signs use a separate random stream: the same `rng` state with other signs gives the same
    patient, position, exposure and noise.
    """
    for_signs = rng.spawn(1)[0]
    g = build_grid(size)
    shown = {s.finding: s for s in signs if s.strength > 0}
    strength = {name: s.strength for name, s in shown.items()}
    vessels = g.vessels[int(rng.integers(len(g.vessels)))]

    lungs = {side: _outline_lung(g, side, shown, rng) for side in SIDES}
    both = lungs["right"].mask + lungs["left"].mask
    image = _draw_soft_tissue(g, body, lungs)
    blend(image, both, 0.22 - 0.08 * strength.get("Emphysema", 0.0))
    image += (0.13 + 0.16 * strength.get("Edema", 0.0)) * vessels * both

    draw_in_lungs(image, g, lungs, shown, for_signs)
    _draw_mediastinum(image, g, body, strength, view)
    image += _draw_ribs(g, body, lungs)
    draw_on_top(image, g, shown, for_signs)
    return _expose(image, rng, body, view, size)


def _outline_lung(g: Grid, side: str, shown: dict[str, Sign], rng: np.random.Generator) -> Lung:
    t = SIDES[side] * g.x
    below = np.clip((0.40 - g.y) / 1.20, 0, 1)
    outer = CHEST * np.sqrt(1 - below**2.4)
    inner = 0.11 + 0.16 * np.clip((-0.45 - g.y) / 0.4, 0, 1) ** 2
    level = (0.46 if side == "right" else 0.50) + rng.uniform(-0.02, 0.02)
    arch = 0.13
    if (sign := shown.get("Atelectasis")) and sign.side in (side, "bilateral"):
        level -= 0.12 * sign.strength  # volume loss lifts the diaphragm
    if sign := shown.get("Emphysema"):
        level += 0.12 * sign.strength
        arch *= 1 - 0.8 * sign.strength
    dome = level + arch * np.clip((t - 0.40) / 0.38, -1, 1.3) ** 2
    mask = ramp(outer - t, 0.03) * ramp(t - inner, 0.05) * ramp(dome - g.y, 0.02)
    return Lung(t, outer, dome, mask)


def _draw_soft_tissue(g: Grid, body: Body, lungs: dict[str, Lung]) -> Field:
    """Torso with shoulders and neck, abdomen below the diaphragm, air in the stomach."""
    shoulder = np.clip((g.y + 0.98) / 0.36, 0, 1)
    half_width = 0.26 + 0.72 * shoulder**0.8
    image = 0.50 * body.tissue * ramp(half_width - abs(g.x), 0.06)
    image += 0.10 * bump(g.y + 0.75, 0.5) * bump(abs(g.x) - 0.72, 0.4)
    for lung in lungs.values():
        image += 0.20 * ramp(g.y - lung.dome, 0.03) * ramp(lung.t, 0.02)
    stomach = ((g.x - 0.42) / 0.15) ** 2 + ((g.y - lungs["left"].dome - 0.14) / 0.07) ** 2
    image -= 0.22 * ramp(1 - stomach, 0.6)
    return image.astype(np.float32)


def _draw_mediastinum(
    image: Field, g: Grid, body: Body, strength: dict[str, float], view: str
) -> None:
    """Upper mediastinum, heart, aortic knob, hila, trachea and spine."""
    widened = 0.17 * strength.get("Enlarged Cardiomediastinum", 0.0)
    half_width = 0.115 + widened * bump(g.y + 0.38, 0.55)
    blend(image, ramp(half_width - abs(g.x - 0.01), 0.04) * ramp(0.9 - g.y, 0.1), 0.62)
    knob = ((g.x - 0.11 - 0.7 * widened) / 0.09) ** 2 + ((g.y + 0.30) / 0.10) ** 2
    blend(image, 0.9 * ramp(1 - knob, 0.3), 0.64)
    for sign in (-1, 1):
        hilum = ((sign * g.x - 0.19) / 0.08) ** 2 + ((g.y + 0.03) / 0.15) ** 2
        blend(image, 0.55 * ramp(1 - hilum, 0.9), 0.55)

    ratio = body.heart + (0.02 if view == "AP" else 0.0)
    ratio += 0.24 * strength.get("Cardiomegaly", 0.0) - 0.06 * strength.get("Emphysema", 0.0)
    half, tall = ratio * CHEST, 0.19 + 0.30 * ratio
    cx, cy = 0.03 + 0.20 * ratio, 0.52 - tall * 0.82
    heart = ((g.x - cx) / half) ** 2 + ((g.y - cy - 0.18 * (g.x - cx)) / tall) ** 2
    blend(image, ramp(1 - heart, 0.14), 0.70)

    vertebrae = 0.045 * (1 + 0.5 * np.sign(np.sin(34 * g.y)))
    image += vertebrae * ramp(0.075 - abs(g.x), 0.02)
    windpipe = ramp(0.040 - abs(g.x), 0.02) * ramp(-0.20 - g.y, 0.04)
    for sign in (-1, 1):
        bronchus = abs(sign * g.x - 0.35 * (g.y + 0.22) - 0.02)
        windpipe = windpipe + ramp(0.022 - bronchus, 0.02) * ramp(0.10 - abs(g.y + 0.12), 0.04)
    image -= 0.20 * np.clip(windpipe, 0, 1)


def _draw_ribs(g: Grid, body: Body, lungs: dict[str, Lung]) -> Field:
    """Posterior ribs over the whole chest, fainter anterior ribs at the sides, clavicles."""
    t = abs(g.x)
    arc = 0.34 * t**2 - 0.10 * t
    wave = np.cos((2 * np.pi) * ((g.y - arc) / body.rib_spacing + body.rib_phase))
    cage = ramp(lungs["left"].outer + 0.05 - t, 0.05) * ramp(t - 0.07, 0.04)
    cage = cage * ramp(g.y + 0.84, 0.08) * (1 - 0.7 * ramp(g.y - 0.55, 0.3))
    ribs = 0.105 * np.clip(2.2 * wave - 1.2, 0, 1)
    front = np.cos((2 * np.pi) * ((g.y + 0.42 * t) / (1.15 * body.rib_spacing) + body.rib_phase))
    ribs += 0.04 * np.clip(2.2 * front - 1.2, 0, 1) * ramp(t - 0.34, 0.1)
    ribs = ribs * cage
    line = -0.60 - 0.16 * np.clip((t - 0.06) / 0.7, 0, 1) + 0.03 * np.sin(7 * t)
    ribs += 0.17 * ramp(0.030 - abs(g.y - line), 0.02) * ramp(t - 0.07, 0.02) * ramp(0.76 - t, 0.06)
    return ribs.astype(np.float32)


def _expose(
    image: Field, rng: np.random.Generator, body: Body, view: str, size: int
) -> Image.Image:
    """Apply position, exposure and quantum noise, and draw the L marker."""
    angle = rng.normal(0, 0.018)
    cos, sin = np.cos(angle) / body.width, np.sin(angle)
    half = size / 2
    dx, dy = rng.normal(0, 0.010, 2) * size
    a, b, d, e = cos, sin, -sin, np.cos(angle) / body.height
    shift = (
        a,
        b,
        half - a * (half + dx) - b * (half + dy),
        d,
        e,
        half - d * (half + dx) - e * (half + dy),
    )
    placed = Image.fromarray(np.clip(image, 0, 1)).transform(
        (size, size), Image.Transform.AFFINE, shift, Image.Resampling.BILINEAR
    )
    film = np.array(placed, dtype=np.float32)
    film = film * rng.uniform(0.92, 1.08) + rng.uniform(-0.02, 0.03)
    noise = 0.022 if view == "AP" else 0.015
    film += noise * rng.standard_normal(film.shape, dtype=np.float32)
    finished = Image.fromarray((np.clip(film, 0, 1) * 255).astype(np.uint8))
    marker = ImageDraw.Draw(finished)
    u = size / 64
    marker.line(
        [(58 * u, 4 * u), (58 * u, 7 * u), (60 * u, 7 * u)], fill=235, width=max(1, int(u / 2))
    )
    return finished


def draw_lateral(
    rng: np.random.Generator, body: Body, signs: tuple[Sign, ...], size: int
) -> Image.Image:
    """Draw a lateral view; it shows only cardiomegaly, pleural fluid, hyperinflation, pacemaker."""
    g = build_grid(size)
    strength = {s.finding: s.strength for s in signs}
    chest = ((g.x + 0.02) / 0.72) ** 2 + ((g.y + 0.02) / 0.86) ** 2
    image = 0.52 * body.tissue * ramp(0.95 - abs(g.x + 0.02) * np.ones_like(g.y), 0.1)
    dome = 0.42 + 0.16 * (1 - strength.get("Emphysema", 0.0)) * (g.x - 0.1) ** 2 + 0.25 * g.x**3
    lung = ramp(1 - chest, 0.1) * ramp(dome - g.y, 0.03)
    blend(image, lung, 0.24)
    image += 0.22 * ramp(g.y - dome, 0.04)
    image += 0.06 * np.roll(g.vessels[int(rng.integers(4))], size // 12, axis=1) * lung
    fluid = strength.get("Pleural Effusion", 0.0)
    if fluid:  # collects in the deep posterior angle
        level = 0.62 - 0.45 * fluid + 0.4 * np.clip(0.5 - g.x, 0, 1)
        blend(image, 0.9 * lung * ramp(g.y - level, 0.04), 0.74)
    half = 0.27 + 0.16 * strength.get("Cardiomegaly", 0.0)
    heart = ((g.x + 0.26) / half) ** 2 + ((g.y - 0.16 - 0.3 * (g.x + 0.26)) / 0.30) ** 2
    blend(image, 0.85 * ramp(1 - heart, 0.2), 0.62)
    spine = abs(g.x - 0.50 - 0.14 * np.cos(1.6 * g.y))
    bodies = 0.7 + 0.3 * np.sign(np.sin(30 * g.y))
    image += 0.20 * bodies * ramp(0.085 - spine, 0.03)
    image += (
        0.05 * np.clip(np.cos(34 * (g.y - 0.5 * g.x) + 6 * body.rib_phase) - 0.5, 0, 1) * 2 * lung
    )
    image -= (
        0.15 * ramp(0.035 - abs(g.x - 0.03 - 0.12 * (g.y + 0.8)), 0.02) * ramp(-0.2 - g.y, 0.05)
    )
    if any(s.place == "pacemaker" for s in signs):
        blend(image, draw_strokes(size, [([(-0.66, -0.46), (-0.56, -0.34)], 0.09)]), 0.98)
    return _expose(image.astype(np.float32), rng, body, "PA", size)

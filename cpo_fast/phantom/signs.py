"""Draw the radiographic sign of each finding on the phantom's frontal view.

Signs are strong and have fixed places, so that they are visible at 112 pixels: they test a training
pipeline and are not realistic. `strength` 1 is the strongest.
"""

from __future__ import annotations

import numpy as np

from cpo_fast.phantom.canvas import SIDES, Field, Grid, Lung, blend, bump, draw_strokes, ramp
from cpo_fast.phantom.cases import Sign

Lines = list[tuple[list[tuple[float, float]], float]]


def draw_in_lungs(
    image: Field, g: Grid, lungs: dict[str, Lung], shown: dict[str, Sign], rng: np.random.Generator
) -> None:
    """Draw signs behind heart, mediastinum and ribs. Changes `image` in place."""
    painters = {
        "Edema": _edema,
        "Lung Opacity": _opacity,
        "Pneumonia": _pneumonia,
        "Consolidation": _consolidation,
        "Atelectasis": _atelectasis,
        "Lung Lesion": _lesion,
        "Pleural Other": _pleural_thickening,
        "Pleural Effusion": _effusion,
        "Pneumothorax": _pneumothorax,
    }
    for finding, paint in painters.items():
        if sign := shown.get(finding):
            for side in SIDES if sign.side in ("", "bilateral") else (sign.side,):
                paint(image, g, lungs[side], sign, rng)


def draw_on_top(image: Field, g: Grid, shown: dict[str, Sign], rng: np.random.Generator) -> None:
    """Draw signs of bone and metal, in front of everything. Changes `image` in place."""
    if sign := shown.get("Fracture"):
        _fracture(image, g, sign, rng)
    if sign := shown.get("Support Devices"):
        _device(image, g, sign, rng)


def _edema(image: Field, g: Grid, lung: Lung, sign: Sign, rng: np.random.Generator) -> None:
    """Bat-wing haze around the hilum, Kerley B lines at the lateral wall."""
    s = sign.strength
    haze = bump(np.sqrt(((lung.t - 0.22) / 1.0) ** 2 + ((g.y - 0.02) / 1.35) ** 2), 0.42)
    blend(image, 0.75 * s * haze * lung.mask, 0.62)
    near_wall = ramp(lung.t - lung.outer + 0.17, 0.03) * bump(g.y - 0.28, 0.26)
    lines = np.clip(3 * np.cos(g.y * 95 + 6 * lung.t) - 1.4, 0, 1)
    image += 0.26 * s * lines * near_wall * lung.mask


def _opacity(image: Field, g: Grid, lung: Lung, sign: Sign, rng: np.random.Generator) -> None:
    """A faint, even patch in the mid zone."""
    t0, y0 = 0.53 + rng.normal(0, 0.015), -0.20 + rng.normal(0, 0.02)
    patch = bump(np.sqrt(((lung.t - t0) / 1.0) ** 2 + ((g.y - y0) / 0.9) ** 2), 0.30)
    blend(image, 0.75 * sign.strength * np.minimum(1, 1.6 * patch) * lung.mask, 0.50)


def _pneumonia(image: Field, g: Grid, lung: Lung, sign: Sign, rng: np.random.Generator) -> None:
    """Cotton-wool patches in the lower zone, uneven in contrast to a consolidation."""
    cloud = g.clouds[int(rng.integers(len(g.clouds)))]
    cloud = np.roll(cloud, tuple(rng.integers(g.size, size=2)), axis=(0, 1))
    region = bump(np.sqrt(((lung.t - 0.54) / 1.0) ** 2 + ((g.y - 0.14) / 1.0) ** 2), 0.36)
    patches = np.clip(1.6 * (cloud + 0.55), 0, 1) * np.minimum(1, 2 * region)
    blend(image, 0.85 * sign.strength * patches * lung.mask, 0.66)


def _consolidation(image: Field, g: Grid, lung: Lung, sign: Sign, rng: np.random.Generator) -> None:
    """A dense, homogeneous lobe with a straight border at the fissure and air bronchograms."""
    if sign.place == "upper lobe":
        border = -0.16 + 0.10 * (lung.t - 0.4)
        lobe = ramp(border - g.y, 0.03) * ramp(g.y + 0.60, 0.20)
        start, fans = (0.20, -0.20), (-1.25, -0.85, -0.45)
    else:
        border = -0.02 + 0.45 * (lung.t - 0.2)
        lobe = ramp(g.y - border, 0.03) * ramp(0.71 - lung.t, 0.08)
        start, fans = (0.36, 0.10), (0.15, 0.50, 0.90)
    blend(image, 0.95 * sign.strength * lobe * lung.mask, 0.74)
    side = SIDES[sign.side]
    bronchi: Lines = []
    for angle in fans:
        length = 0.34 + rng.uniform(-0.03, 0.03)
        end = (start[0] + length * np.cos(angle), start[1] + length * np.sin(angle))
        bronchi.append(([(side * start[0], start[1]), (side * end[0], end[1])], 0.022))
    image -= 0.34 * sign.strength * draw_strokes(g.size, bronchi) * lobe * lung.mask


def _atelectasis(image: Field, g: Grid, lung: Lung, sign: Sign, rng: np.random.Generator) -> None:
    """Plate-like bands at the base; `_outline_lung` raises the diaphragm."""
    inside = ramp(lung.t - 0.24, 0.05) * ramp(0.72 - lung.t, 0.08) * lung.mask
    for level in (0.17, 0.28):
        line = level + 0.10 * (lung.t - 0.45) + rng.normal(0, 0.008)
        band = ramp(0.026 - abs(g.y - line), 0.02)
        blend(image, 0.95 * sign.strength * band * inside, 0.84)


def _lesion(image: Field, g: Grid, lung: Lung, sign: Sign, rng: np.random.Generator) -> None:
    """A round nodule with a sharp margin in the upper zone."""
    t0, y0 = 0.36 + rng.normal(0, 0.02), -0.44 + rng.normal(0, 0.02)
    radius = 0.09 + 0.04 * sign.strength
    disc = ramp(radius - np.sqrt((lung.t - t0) ** 2 + (g.y - y0) ** 2), 0.025)
    blend(image, (0.35 + 0.65 * sign.strength) * disc, 0.80)


def _pleural_thickening(
    image: Field, g: Grid, lung: Lung, sign: Sign, rng: np.random.Generator
) -> None:
    """A cap on the apex with a scalloped lower border and a rind down the upper lateral wall."""
    scallop = 0.02 * np.sin(28 * lung.t + rng.uniform(0, 6))
    cap = ramp(-0.56 + scallop - g.y, 0.03)
    rind = ramp(lung.t - lung.outer + 0.09, 0.02) * ramp(-0.05 - g.y, 0.1)
    blend(image, 0.95 * sign.strength * np.maximum(cap, rind) * lung.mask, 0.72)


def _effusion(image: Field, g: Grid, lung: Lung, sign: Sign, rng: np.random.Generator) -> None:
    """Fluid in the costophrenic angle with a meniscus at the lateral wall."""
    depth = 0.10 + 0.20 * sign.strength
    surface = 0.60 - depth * (0.7 + 1.3 * np.clip((lung.t - 0.25) / 0.55, 0, 1) ** 2)
    chest = ramp(lung.outer - lung.t, 0.03) * ramp(lung.t - 0.08, 0.05)
    fluid = ramp(g.y - surface, 0.03) * ramp(0.85 - g.y, 0.2) * chest
    blend(image, (0.3 + 0.7 * sign.strength) * fluid, 0.78)


def _pneumothorax(image: Field, g: Grid, lung: Lung, sign: Sign, rng: np.random.Generator) -> None:
    """A black rim without markings, widest at the apex, bounded by the white pleural line."""
    retreat = sign.strength * (0.11 + 0.20 * bump(g.y + 0.60, 0.65)) * ramp(0.42 - g.y, 0.3)
    line = lung.outer - retreat
    rim = ramp(lung.t - line, 0.015) * lung.mask
    blend(image, (1 - rim) * 0.18 * sign.strength * lung.mask, 0.6)
    blend(image, (0.5 + 0.5 * sign.strength) * rim, 0.03)
    edge = ramp(0.010 - abs(lung.t - line), 0.012) * lung.mask * ramp(0.40 - g.y, 0.1)
    blend(image, sign.strength * edge, 0.85)


def _fracture(image: Field, g: Grid, sign: Sign, rng: np.random.Generator) -> None:
    """A lateral rib in two fragments with a step and a dark gap."""
    side = SIDES[sign.side]
    y0 = -0.02 + rng.normal(0, 0.015)
    inner = [(side * 0.42, y0 - 0.12), (side * 0.60, y0 - 0.04)]
    outer = [(side * 0.63, y0 + 0.07), (side * 0.82, y0 + 0.20)]
    gap = draw_strokes(g.size, [([(side * 0.58, y0 + 0.07), (side * 0.66, y0 - 0.05)], 0.035)])
    blend(image, 0.9 * sign.strength * draw_strokes(g.size, [(inner, 0.055), (outer, 0.055)]), 0.98)
    blend(image, 0.8 * sign.strength * gap, 0.05)


def _device(image: Field, g: Grid, sign: Sign, rng: np.random.Generator) -> None:
    """Pacemaker with lead, tracheal tube with gastric tube, central line, or chest tube."""
    j = rng.normal(0, 0.01)
    thin, thick = 0.020, 0.032
    lines: Lines
    if sign.place == "pacemaker":
        box = [(0.46, -0.50 + j), (0.66, -0.50 + j)]
        lead = [(0.50, -0.46), (0.30, -0.60), (0.06, -0.42), (-0.06, -0.10), (-0.04, 0.25)]
        lines = [(box, 0.17), ([*lead, (0.22 + j, 0.42)], thin)]
    elif sign.place == "endotracheal tube":
        gastric = [(0.03, -1.0), (0.03 + j, -0.2), (0.05, 0.35), (0.28, 0.66), (0.36, 0.72)]
        lines = [([(-0.015, -1.0), (j, -0.30)], 0.045), (gastric, thin)]
    elif sign.place == "central line":
        tip = [(-0.10, -0.35), (-0.09 + j, -0.02)]
        lines = [([(-0.28, -1.0), (-0.24, -0.80), (-0.13, -0.60), *tip], thick)]
    else:
        side = SIDES[sign.side]
        tube = [(0.98, 0.34), (0.72, 0.14), (0.62, -0.20), (0.42 + j, -0.56)]
        lines = [([(side * t, y) for t, y in tube], thick)]
    blend(image, draw_strokes(g.size, lines), 0.98)

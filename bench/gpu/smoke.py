"""A first check of each variant, within seconds, before anything is timed.

Against float64 with a ragged vocabulary, a real hidden size, rows in one chunk and in several, and
a trained head; and a policy equal to its reference, whose loss is log 2.
"""

from __future__ import annotations

import functools
from typing import Any

from bench.gpu.correctness import accuracy, log_2_of_equals, preferred_dtype
from bench.gpu.units import NotHere, Setting, Unit
from bench.gpu.variants import CHECKED, why_not

SHAPE = (300, 50257, 896)  # T, V, D
LIMIT = 40.0  # includes Triton's compilation, with all variants at the same time


def smoke(variant: str, device: str, quick: bool) -> dict[str, Any]:
    if reason := why_not(variant, device):
        raise NotHere(reason)
    shape = (40, 1013, 24) if quick else SHAPE
    errors = {}
    dtype = preferred_dtype(variant, device)
    for mib in (1024, 16):  # one chunk, and two or three
        found = accuracy(variant, device, shape, dtype, mib=mib)
        errors[f"{mib} MiB"] = found["errors"]
    log_2_of_equals(variant, device, quick)
    return {"errors": errors}


def units(setting: Setting) -> list[Unit]:
    return [
        Unit(
            f"{variant}: smoke",
            functools.partial(smoke, variant, setting.device, setting.quick),
            LIMIT,
            variant=variant,
            phase="correctness",
        )
        for variant in CHECKED[setting.device]
    ]

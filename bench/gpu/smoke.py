"""A first check of each variant, within seconds, before any timing.

Compares with float64 for a ragged vocabulary, a real hidden size, rows in one chunk and in several,
and a trained head; and checks that a policy equal to its reference has loss log 2.
"""

from __future__ import annotations

import functools
from typing import Any

from bench.gpu.correctness import check_accuracy, check_log_2, choose_dtype
from bench.gpu.units import NotHere, Setting, Unit
from bench.gpu.variants import CHECKED, explain_absence

SHAPE = (300, 50257, 896)  # T, V, D
LIMIT = 40.0  # includes Triton's compilation, with all variants running concurrently


def check_smoke(variant: str, device: str, quick: bool) -> dict[str, Any]:
    if reason := explain_absence(variant, device):
        raise NotHere(reason)
    shape = (40, 1013, 24) if quick else SHAPE
    errors = {}
    dtype = choose_dtype(variant, device)
    for mib in (1024, 16):  # one chunk, and two or three
        found = check_accuracy(variant, device, shape, dtype, mib=mib)
        errors[f"{mib} MiB"] = found["errors"]
    check_log_2(variant, device, quick)
    return {"errors": errors}


def list_units(setting: Setting) -> list[Unit]:
    return [
        Unit(
            f"{variant}: smoke",
            functools.partial(check_smoke, variant, setting.device, setting.quick),
            LIMIT,
            variant=variant,
            phase="correctness",
        )
        for variant in CHECKED[setting.device]
    ]

"""A first check of each variant, within seconds, before anything is timed.

Against float64 with a ragged vocabulary, a real hidden size, rows in one chunk and in several, and
a trained head; and a policy equal to its reference, whose loss is log 2.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from bench.gpu.correctness import accuracy, log_2_of_equals, preferred_dtype
from bench.gpu.units import NotHere, Setting, Unit
from bench.gpu.variants import CHECKED, LSE, why_not
from cpo_fast.testing.loss_problems import LossProblem

SHAPE = (300, 50257, 896)  # T, V, D
LIMIT = 40.0  # includes Triton's compilation, with all variants at the same time


def smoke(variant: str, device: str, quick: bool) -> dict[str, Any]:
    if reason := why_not(variant, device):
        raise NotHere(reason)
    shape = (40, 1013, 24) if quick else SHAPE
    if variant == LSE:
        return lse(shape, device)
    errors = {}
    dtype = preferred_dtype(variant, device)
    for mib in (1024, 16):  # one chunk, and two or three
        found = accuracy(variant, device, shape, dtype, mib=mib)
        errors[f"{mib} MiB"] = found["errors"]
    log_2_of_equals(variant, device, quick)
    return {"errors": errors}


def lse(shape: tuple[int, int, int], device: str) -> dict[str, Any]:
    """Log-probs of the fused log-sum-exp, which sums in float32 and does not round logits."""
    from cpo_fast.kernels.linear_lse import linear_lse_logps

    data = LossProblem("random", *shape, preferred_dtype(LSE, device), device)
    hidden, weight = data.tensors
    got = linear_lse_logps(hidden, weight, data.labels)
    z = hidden.double() @ weight.double().t()
    rows = torch.arange(shape[0], device=device)
    want = z.log_softmax(-1)[rows, data.labels.clamp(min=0)].where(data.labels >= 0, 0.0)
    assert got.isfinite().all(), "a log-prob is not finite"
    error = float((got.double() - want).norm() / want.norm())
    assert error < 1e-4, f"log-probs err by {error:.2e}"
    return {"errors": {"logps": error}}


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

"""Arithmetic shared by the Triton kernels: stable log-probs that are never positive.

With S = sum over j != y of exp(z_j - m) without the label y, and m the maximum of these z_j,

    logp = -log1p(exp(a)),    a = m + log(S) - z_y,

is never positive, for any rounding of the logits, and is exact where the label has nearly all of
the mass (1 - p_y = sigmoid(a) is then far below the rounding error of p_y).

Uses `tl` primitives only: Triton's interpreter, where the tests run, has no libdevice functions.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import triton
import triton.language as tl


@contextlib.contextmanager
def launching_on(tensor: torch.Tensor) -> Iterator[None]:
    """Make the tensor's device current: Triton launches on the current device, not on that of its
    arguments.

    Raises ValueError for a CPU tensor unless Triton's interpreter is on (TRITON_INTERPRET=1).
    """
    if not tensor.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"Triton kernels take CUDA tensors, got one on {tensor.device}; "
            "TRITON_INTERPRET=1 runs them on the CPU, slowly, for tests"
        )
    with torch.cuda.device_of(tensor):
        yield


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1; divides out the rounding error of 1 + x."""
    w = 1.0 + x
    return tl.where(w == 1.0, x, tl.log(w) * (x / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def softplus(a):
    """log(1 + exp(a)) without overflow; correct for +-inf and NaN."""
    positive = tl.where(a > 0, a, 0.0)
    return positive + log1p(tl.exp(-tl.abs(a)))


@triton.jit
def sigmoid(a):
    """1 / (1 + exp(-a)), with full relative precision on both sides."""
    e = tl.exp(-tl.abs(a))
    return tl.where(a > 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh_and_slope(x):
    """tanh(x) and its derivative, accurate to a few ulp."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    # Near zero 1 - e cancels; the Taylor series has a relative error of 1e-8 below 0.25.
    q = x * x
    series = 1.0 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835))))
    slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    return tl.where(q < 0.0625, x * series, far), slope


@triton.jit
def capped(z, softcap, HAS_SOFTCAP: tl.constexpr):
    """z, soft-capped if HAS_SOFTCAP, and d capped / d z (1.0 without a cap)."""
    slope = 1.0
    if HAS_SOFTCAP:
        t, slope = tanh_and_slope(z / softcap)
        z = softcap * t
    return z, slope


@triton.jit
def logp_from_odds(a, label_logit):
    """Log-prob of the label from `a` = log(sum of the other terms / the label's term).

    Returns (logp, probability of not being the label).
    """
    a = tl.where(label_logit == float("inf"), float("nan"), a)  # overflow gives NaN
    return -softplus(a), sigmoid(a)

"""Arithmetic shared by the Triton kernels: stable log-probs without positive values.

With the label y left out of the sum, S = sum over j != y of exp(z_j - m) and m their maximum,

    logp = -log1p(exp(a)),    a = m + log(S) - z_y,

cannot be positive however the logits were rounded, and is exact where the label takes nearly all
of the mass (1 - p_y = sigmoid(a) is then far below the rounding of p_y).

Only `tl` primitives are used: libdevice functions do not exist in Triton's interpreter, where the
tests run.
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
    """Make the tensor's device current, where Triton launches whatever its arguments' device is.

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
    """log(1 + x) for 0 <= x <= 1: the rounding of 1 + x is divided out again."""
    w = 1.0 + x
    return tl.where(w == 1.0, x, tl.log(w) * (x / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def softplus(a):
    """log(1 + exp(a)) without overflow; +-inf and NaN come out as they should."""
    positive = tl.where(a > 0, a, 0.0)
    return positive + log1p(tl.exp(-tl.abs(a)))


@triton.jit
def sigmoid(a):
    """1 / (1 + exp(-a)), with full relative precision on both sides."""
    e = tl.exp(-tl.abs(a))
    return tl.where(a > 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh_and_slope(x):
    """tanh(x) and its derivative, each to a few ulp."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    # Near zero 1 - e has lost its digits: the Taylor series, good to 1e-8 relative below 0.25.
    q = x * x
    series = 1.0 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835))))
    slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    return tl.where(q < 0.0625, x * series, far), slope


@triton.jit
def capped(z, softcap, HAS_SOFTCAP: tl.constexpr):
    """The soft cap of z where there is one, and d capped / d z (1.0 without a cap)."""
    slope = 1.0
    if HAS_SOFTCAP:
        t, slope = tanh_and_slope(z / softcap)
        z = softcap * t
    return z, slope


@triton.jit
def final_logits(
    z,  # raw logits, float32, any shape
    bias,  # the same shape, or 0.0
    softcap,
    inv_temperature,
    HAS_SOFTCAP: tl.constexpr,
):
    """Bias, soft cap and temperature; and d z / d raw, of the shape of z or a scalar."""
    z, slope = capped(z + bias, softcap, HAS_SOFTCAP)
    return z * inv_temperature, slope * inv_temperature


@triton.jit
def shift(m):
    """What to subtract before exp: the maximum, or 0 where nothing finite was seen (-inf)."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def logp_from_odds(a, label_logit):
    """Log-prob of the label from `a`, the log of the others' sum over the label's term.

    Returns (logp, probability of not being the label).
    """
    a = tl.where(label_logit == float("inf"), float("nan"), a)  # overflow is shown, not hidden
    return -softplus(a), sigmoid(a)


@triton.jit
def logp_from_parts(m, s, label_logit):
    """Log-prob of the label from the maximum `m` and sum `s` of exp(z - m) over the others.

    Returns (logp, probability of not being the label).
    """
    a = (m - label_logit) + tl.log(s)
    a = tl.where((s == 0.0) & (label_logit > float("-inf")), float("-inf"), a)  # nobody else
    return logp_from_odds(a, label_logit)

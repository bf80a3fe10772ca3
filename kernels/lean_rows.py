"""Row kernel: log-prob of the label and, in place, its gradient with respect to the logits.

One program reads one row of a chunk of logits [C, V] twice: for the sum of exponentials without the
label, then to overwrite every logit z_j with

    (onehot_j - p_j) * d z_j / d raw_j

in the logits' own dtype, ready for the product with W. Rows that only need the log-prob (reference
rows, evaluation) are read once and not written. The instruction count per logit is low because:

- exp(z / temperature - m) is exp2(z c - k) with c = log2(e) / temperature and k = m c: one fused
  multiply-add and one exponential. The log-prob uses the same rounded k, so its rounding error
  cancels. The scale 1 / (sum of all) includes the sign and the derivative of the temperature.
- The label's logit is read first and replaced by -inf in memory, so its term is 0 in both passes
  without a comparison per logit. The label's column then receives its gradient, or its logit back
  in rows that must not change. A soft cap maps -inf to a finite number: such heads compare the
  column index with the label instead.
- The main loop has no mask. A second, masked loop of half the width covers the end of a row.
- Two vectors per thread share one running maximum.
- The second pass runs backwards, so it first meets what the first pass read last. One row per
  multiprocessor is in flight: 40 MB of bf16 logits at V = 152,064 and 132 multiprocessors, which
  fits the L2 of an H100 (50 MB).

Limits: beyond |z c| = 2^30 (7e8 at temperature 1) the rounding error of k is too large for exp2.
Logits below -2^30 / c count as masked out, whatever their value. A row whose largest logit is
beyond either limit gives NaN, unless only its label is left.

Tested on an H200 in bfloat16 (docs/gpu.md), in Triton's interpreter, and by ahead-of-time
compilation for sm_90.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from cpo_fast.kernels.numerics import capped, launching_on, logp_from_odds

ALIGNMENT = 16
"""Columns. Triton derives aligned 16-byte accesses from arguments that are divisible by 16."""

_FAR = tl.constexpr(2.0**30)


@triton.jit
def _shift(k):
    """The offset subtracted before exp2: 0 if every logit so far is masked out."""
    return tl.where(k < -_FAR, 0.0, k)


@triton.jit
def _load_logits(
    row_ptr, bias_ptr, cols, V, V_mem, i_label, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Logits z [BR, BK] in float32 before the temperature, -inf for the label and beyond the
    vocabulary, and d z / d raw."""
    if MASKED:
        # The mask ends at the padded width, a multiple of 16, to keep the loads 16 bytes wide.
        raw = tl.load(row_ptr + cols, mask=cols < V_mem, other=0.0).to(tl.float32)
    else:
        raw = tl.load(row_ptr + cols).to(tl.float32)
    if HAS_BIAS:
        if MASKED:
            raw += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
        else:
            raw += tl.load(bias_ptr + cols).to(tl.float32)
    z, slope = capped(raw, softcap, HAS_SOFTCAP)
    if HAS_SOFTCAP:
        z = tl.where(cols == i_label, float("-inf"), z)
    if MASKED:
        z = tl.where(cols < V, z, float("-inf"))
    return z, slope


@triton.jit
def _add_terms(b_sum, z, c, offset):
    return b_sum + tl.sum(tl.exp2(tl.fma(z, c, -offset[:, None])), axis=1)


@triton.jit
def _raise_offset(b_k, b_sum, highest, c):
    """The running maximum k = max(z) c, its offset, and the sum rescaled to that offset."""
    k = tl.maximum(b_k, highest * c)
    offset = _shift(k)
    return k, offset, b_sum * tl.exp2(b_k - offset)


@triton.jit
def _gradient(z, slope, c, k, scale, HAS_SOFTCAP: tl.constexpr):
    """-p d z / d raw for all columns except the label's, where z is -inf and the result is 0."""
    grad = tl.exp2(tl.fma(z, c, -k)) * scale
    if HAS_SOFTCAP:
        grad *= slope
    return grad


@triton.jit
def _store_gradient(
    row_ptr, bias_ptr, cols, V, V_mem, i_label, softcap, c, k, scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    z, slope = _load_logits(
        row_ptr, bias_ptr, cols, V, V_mem, i_label, softcap, HAS_BIAS, HAS_SOFTCAP, MASKED
    )
    grad = _gradient(z, slope, c, k, scale, HAS_SOFTCAP)
    if MASKED:
        grad = tl.where(cols < V, grad, 0.0)
        tl.store(row_ptr + cols, grad.to(row_ptr.dtype.element_ty), mask=cols < V_mem)
    else:
        tl.store(row_ptr + cols, grad.to(row_ptr.dtype.element_ty))


# One binary for all grad_rows: policy and reference rows get bitwise equal log-probs.
@triton.jit(do_not_specialize=["grad_rows"])
def lean_rows_kernel(
    logits_ptr,  # [C, V_mem], rows below grad_rows are overwritten
    bias_ptr,  # [V]
    labels_ptr,  # [C] int64
    logps_ptr,  # [C] float32
    row_stride,
    V,
    V_mem,
    grad_rows,
    softcap,
    inv_temperature,
    c,  # log2(e) / temperature
    ignore_index,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BR: tl.constexpr,  # vectors per tile
    BK: tl.constexpr,  # columns per vector
    VECTORS: tl.constexpr,  # tiles per step of the main loop: 1 or 2
):
    i_row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + i_row * row_stride
    label = tl.load(labels_ptr + i_row)
    tile = tl.arange(0, BR)[:, None] * BK + tl.arange(0, BK)[None, :]  # [BR, BK]
    WIDTH: tl.constexpr = BR * BK
    STEP: tl.constexpr = VECTORS * WIDTH
    n_full = V // STEP
    tail = n_full * STEP

    if label == ignore_index:
        tl.store(logps_ptr + i_row, 0.0)
        if i_row < grad_rows:
            for start in range(0, V_mem, WIDTH):
                cols = start + tile
                zero = tl.zeros([BR, BK], dtype=logits_ptr.dtype.element_ty)
                tl.store(row_ptr + cols, zero, mask=cols < V_mem)
    else:
        # A label outside the vocabulary reads and writes no logit; its log-prob is NaN.
        valid = (label >= 0) & (label < V)
        raw_label = tl.load(row_ptr + label, mask=valid, other=float("nan"))
        z_label = raw_label.to(tl.float32)
        if HAS_BIAS:
            z_label += tl.load(bias_ptr + label, mask=valid, other=0.0).to(tl.float32)
        z_label, slope_label = capped(z_label, softcap, HAS_SOFTCAP)
        i_label = label.to(tl.int32)  # comparing 32 bits per column, not 64
        if not HAS_SOFTCAP:
            tl.debug_barrier()  # all threads have read the label's logit
            tl.store(row_ptr + label, float("-inf"), mask=valid)
            tl.debug_barrier()  # all threads read the replacement

        b_k = tl.full([BR], float("-inf"), dtype=tl.float32)
        b_sum = tl.zeros([BR], dtype=tl.float32)
        for start in range(0, tail, STEP):
            cols = start + tile
            z, _slope = _load_logits(
                row_ptr, bias_ptr, cols, V, V_mem, i_label, softcap, HAS_BIAS, HAS_SOFTCAP, False
            )
            highest = tl.max(z, axis=1)
            if VECTORS == 2:
                z_next, _slope = _load_logits(
                    row_ptr, bias_ptr, cols + WIDTH, V, V_mem, i_label, softcap,
                    HAS_BIAS, HAS_SOFTCAP, False,
                )  # fmt: skip
                highest = tl.maximum(highest, tl.max(z_next, axis=1))
            b_k, offset, b_sum = _raise_offset(b_k, b_sum, highest, c)
            b_sum = _add_terms(b_sum, z, c, offset)
            if VECTORS == 2:
                b_sum = _add_terms(b_sum, z_next, c, offset)
        for start in range(tail, V_mem, WIDTH):
            z, _slope = _load_logits(
                row_ptr, bias_ptr, start + tile, V, V_mem, i_label, softcap,
                HAS_BIAS, HAS_SOFTCAP, True,
            )  # fmt: skip
            b_k, offset, b_sum = _raise_offset(b_k, b_sum, tl.max(z, axis=1), c)
            b_sum = _add_terms(b_sum, z, c, offset)

        highest = tl.max(b_k, axis=0)
        k = _shift(highest)
        s = tl.sum(b_sum * tl.exp2(b_k - k), axis=0)
        masked_out = (highest > float("-inf")) & (highest < -_FAR) & (z_label * c < -_FAR)
        s = tl.where((highest > _FAR) | masked_out, float("nan"), s)
        relative = tl.fma(z_label, c, -k)  # log2 of the label's term
        logp, not_label = logp_from_odds((tl.log2(s) - relative) * 0.6931471805599453, z_label)
        tl.store(logps_ptr + i_row, logp)

        if i_row < grad_rows:
            total = s + tl.exp2(relative)
            scale = tl.where(total == 0.0, 0.0, -inv_temperature / total)  # 0: label only
            for start in range(tail, V_mem, WIDTH):
                _store_gradient(
                    row_ptr, bias_ptr, start + tile, V, V_mem, i_label, softcap, c, k, scale,
                    HAS_BIAS, HAS_SOFTCAP, True,
                )  # fmt: skip
            for done in range(0, n_full):
                cols = (n_full - 1 - done) * STEP + tile
                if VECTORS == 2:
                    # Both vectors are read before either is written.
                    z, slope = _load_logits(
                        row_ptr, bias_ptr, cols, V, V_mem, i_label, softcap,
                        HAS_BIAS, HAS_SOFTCAP, False,
                    )  # fmt: skip
                    z_next, slope_next = _load_logits(
                        row_ptr, bias_ptr, cols + WIDTH, V, V_mem, i_label, softcap,
                        HAS_BIAS, HAS_SOFTCAP, False,
                    )  # fmt: skip
                    grad = _gradient(z, slope, c, k, scale, HAS_SOFTCAP)
                    tl.store(row_ptr + cols, grad.to(logits_ptr.dtype.element_ty))
                    grad = _gradient(z_next, slope_next, c, k, scale, HAS_SOFTCAP)
                    tl.store(row_ptr + cols + WIDTH, grad.to(logits_ptr.dtype.element_ty))
                else:
                    _store_gradient(
                        row_ptr, bias_ptr, cols, V, V_mem, i_label, softcap, c, k, scale,
                        HAS_BIAS, HAS_SOFTCAP, False,
                    )  # fmt: skip
            tl.debug_barrier()  # the label's column has been written by the thread of its vector
            grad_label = not_label * slope_label * inv_temperature
            tl.store(row_ptr + label, grad_label.to(logits_ptr.dtype.element_ty), mask=valid)
        else:
            if not HAS_SOFTCAP:
                tl.debug_barrier()  # every thread has read the row
                tl.store(row_ptr + label, raw_label, mask=valid)


_REGISTERS = 65_536  # per multiprocessor
_forced: tuple[int, int] | None = None


@contextlib.contextmanager
def forced_tile(BR: int, num_warps: int) -> Iterator[None]:
    """Override `lean_tile` inside the block; for benchmarks and tests."""
    global _forced
    before, _forced = _forced, (BR, num_warps)
    try:
        yield
    finally:
        _forced = before


def lean_tile(columns: int, itemsize: int, *, softcap: bool) -> tuple[int, int, int, int]:
    """(BR, BK, VECTORS, num_warps) for rows of `columns` logits of `itemsize` bytes.

    A vector is one 16-byte load, and a thread reads two per step: 32 warps of 32 threads with 32
    bytes each keep 32 KB in flight per multiprocessor, about what 4.3 TB/s at 1 us of latency
    needs. With a soft cap two vectors need too many registers; a thread reads one per step.
    """
    BK = 16 // itemsize
    lanes = max(64, triton.next_power_of_2(triton.cdiv(columns, BK)))
    BR = min(1024, lanes)
    num_warps = min(32, BR // 32)
    if _forced is not None:
        BR, num_warps = _forced
    return BR, BK, 1 if softcap else 2, num_warps


def most_registers(num_warps: int) -> int:
    """Register limit per thread. Without it, ptxas targets 32 registers, so that two programs of 32
    warps share a multiprocessor: 80 MB of rows in flight, more than the L2 holds."""
    return min(255, _REGISTERS // (32 * num_warps))


def check_alignment(logits: torch.Tensor) -> None:
    """Raise ValueError unless 16-byte accesses to all rows are aligned."""
    V_mem = logits.shape[1]
    if V_mem % ALIGNMENT or logits.stride(0) % ALIGNMENT or logits.stride(1) != 1:
        raise ValueError(
            f"logits must have a width and row stride that are multiples of {ALIGNMENT} and "
            f"contiguous columns, got shape {tuple(logits.shape)}, strides {logits.stride()}"
        )


def row_logps_(
    logits: torch.Tensor,  # [C, V_mem >= V], V_mem and the row stride multiples of 16
    labels: torch.Tensor,  # [C] int64
    vocab_size: int,
    *,
    grad_rows: int,
    bias: torch.Tensor | None = None,  # [V]
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    out: torch.Tensor | None = None,  # [C] float32
) -> torch.Tensor:
    """Log-probs [C] float32 of `labels`; rows below `grad_rows` become d logp / d raw logits.

    `logits` holds h W^T without bias, in bf16, fp16 or fp32. Columns from `vocab_size` on are
    padding of any value; they become zero in the rows written. A row whose label is `ignore_index`
    gives 0 and a zero gradient. Raises ValueError for unaligned rows, and for CPU tensors outside
    Triton's interpreter.
    """
    C, V_mem = logits.shape
    check_alignment(logits)
    if out is None:
        out = torch.empty(C, dtype=torch.float32, device=logits.device)
    if C == 0:
        return out
    capped_head = softcap is not None
    BR, BK, vectors, num_warps = lean_tile(V_mem, logits.element_size(), softcap=capped_head)
    with launching_on(logits):
        lean_rows_kernel[(C,)](
            logits,
            logits if bias is None else bias,
            labels,
            out,
            logits.stride(0),
            vocab_size,
            V_mem,
            grad_rows,
            1.0 if softcap is None else softcap,
            1.0 / temperature,
            math.log2(math.e) / temperature,
            ignore_index,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=capped_head,
            BR=BR,
            BK=BK,
            VECTORS=vectors,
            num_warps=num_warps,
            maxnreg=most_registers(num_warps),
            enable_fp_fusion=True,
        )
    return out

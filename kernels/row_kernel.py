"""Masked row kernel: log-prob of the label and, in place, its gradient with respect to the logits.

One program reads one row of a chunk of logits [C, V] twice: first for the maximum and the sum of
exponentials with the label left out, then to overwrite every logit with

    (onehot_j - p_j) * d z_j / d raw_j

in the logits' own dtype, ready for the product with W. Rows that only need the log-prob (reference
rows, evaluation) are read once and not written. A row of 152,064 bf16 logits is 304 KB, more than
an SM can hold; with 1024 threads per program there is one row in flight per SM, so that all rows in
flight (40 MB on 132 SMs) fit a 50 MB L2 and the second read should rarely go to memory.

Each thread keeps a running maximum and sum of its own columns and all are combined once at the
end: no barrier in the loop, and no sum of more than a few hundred terms at a time.

lean_rows.py does the same with a third of the instructions and is the default: on an H200 it is
faster at every head measured (docs/gpu.md). This kernel is there to compare with.

Run on an H200 in bfloat16 (docs/gpu.md), in Triton's interpreter, and compiled ahead of time for
sm_90 in the tests.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from cpo_fast.kernels.numerics import (
    final_logits,
    launching_on,
    logp_from_parts,
    shift,
)

ALIGNMENT = 16
"""Columns; Triton proves that 16-byte accesses are aligned from arguments divisible by 16."""


@triton.jit
def _load_logits(
    row_ptr, bias_ptr, cols, V, V_mem, softcap, inv_temperature,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Final logits z [BR, BK] in float32, -inf beyond the vocabulary, and d z / d raw."""
    # The mask ends at the padded width: a multiple of 16 there keeps the loads 16 bytes wide.
    raw = tl.load(row_ptr + cols, mask=cols < V_mem, other=0.0).to(tl.float32)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
    z, slope = final_logits(raw, bias, softcap, inv_temperature, HAS_SOFTCAP)
    return tl.where(cols < V, z, float("-inf")), slope


# One binary whatever grad_rows is: policy and reference rows get bitwise the same log-probs.
@triton.jit(do_not_specialize=["grad_rows"])
def row_kernel(
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
    ignore_index,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + i_row * row_stride
    label = tl.load(labels_ptr + i_row)
    tile = tl.arange(0, BR)[:, None] * BK + tl.arange(0, BK)[None, :]  # [BR, BK]

    if label == ignore_index:
        tl.store(logps_ptr + i_row, 0.0)
        if i_row < grad_rows:
            for start in range(0, V_mem, BR * BK):
                cols = start + tile
                zero = tl.zeros([BR, BK], dtype=logits_ptr.dtype.element_ty)
                tl.store(row_ptr + cols, zero, mask=cols < V_mem)
    else:
        # A label outside the vocabulary reads nothing and gives NaN.
        valid = (label >= 0) & (label < V)
        raw = tl.load(row_ptr + label, mask=valid, other=float("nan")).to(tl.float32)
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + label, mask=valid, other=0.0).to(tl.float32)
        label_logit, _slope = final_logits(raw, bias, softcap, inv_temperature, HAS_SOFTCAP)
        i_label = label.to(tl.int32)  # comparing 32 bits per column, not 64

        b_max = tl.full([BR], float("-inf"), dtype=tl.float32)
        b_sum = tl.zeros([BR], dtype=tl.float32)
        for start in range(0, V_mem, BR * BK):
            cols = start + tile
            z, slope = _load_logits(
                row_ptr, bias_ptr, cols, V, V_mem, softcap, inv_temperature,
                HAS_BIAS, HAS_SOFTCAP,
            )  # fmt: skip
            z = tl.where(cols == i_label, float("-inf"), z)
            raised = tl.maximum(b_max, tl.max(z, axis=1))
            offset = shift(raised)
            b_sum = b_sum * tl.exp(b_max - offset) + tl.sum(tl.exp(z - offset[:, None]), axis=1)
            b_max = raised
        m = tl.max(b_max, axis=0)
        s = tl.sum(b_sum * tl.exp(b_max - shift(m)), axis=0)
        logp, not_label = logp_from_parts(m, s, label_logit)
        tl.store(logps_ptr + i_row, logp)

        if i_row < grad_rows:
            # p_j = exp(z_j - top) * scale, which needs no LSE of large numbers.
            top = shift(tl.maximum(m, label_logit))
            others = tl.where(s == 0.0, 0.0, s * tl.exp(shift(m) - top))  # no 0 x inf
            scale = 1.0 / (others + tl.exp(label_logit - top))
            for start in range(0, V_mem, BR * BK):
                cols = start + tile
                z, slope = _load_logits(
                    row_ptr, bias_ptr, cols, V, V_mem, softcap, inv_temperature,
                    HAS_BIAS, HAS_SOFTCAP,
                )  # fmt: skip
                p = tl.exp(z - top) * scale
                grad = tl.where(cols == i_label, not_label, -p) * slope
                grad = tl.where(cols < V, grad, 0.0)
                tl.store(row_ptr + cols, grad.to(logits_ptr.dtype.element_ty), mask=cols < V_mem)


def row_tile(columns: int, itemsize: int, *, plain: bool) -> tuple[int, int, int]:
    """(BR, BK, num_warps) for rows of `columns` logits of `itemsize` bytes.

    A thread reads BK contiguous columns as one 16-byte load, and two such loads per step: 32 warps
    with 32 bytes each keep 32 KB in flight per SM, about what 4.3 TB/s at 1 us of latency asks for.
    A bias or a soft cap (not `plain`) needs more registers than the 64 that a thread then has, so
    there it is one load per step.
    """
    BK = 16 // itemsize
    lanes = max(64, triton.next_power_of_2(triton.cdiv(columns, BK)))
    BR = min(2048 if plain else 1024, lanes)
    return BR, BK, min(32, BR // 32)


def check_alignment(logits: torch.Tensor) -> None:
    """Raises ValueError for rows whose 16-byte accesses would not be aligned."""
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

    `logits` holds h W^T without bias, in bf16, fp16 or fp32; columns from `vocab_size` on are
    padding, which may hold anything and is zero in the rows written. A row whose label is
    `ignore_index` gives 0 and a zero gradient. Raises ValueError for rows that are not aligned, and
    for CPU tensors outside Triton's interpreter.
    """
    C, V_mem = logits.shape
    check_alignment(logits)
    if out is None:
        out = torch.empty(C, dtype=torch.float32, device=logits.device)
    if C == 0:
        return out
    plain = bias is None and softcap is None
    BR, BK, num_warps = row_tile(V_mem, logits.element_size(), plain=plain)
    with launching_on(logits):
        row_kernel[(C,)](
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
            ignore_index,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            BR=BR,
            BK=BK,
            num_warps=num_warps,
            enable_fp_fusion=True,
        )
    return out

"""Segment sums of token log-probs, and row-wise scaling of the gradient of the hidden states.

    segment_sums    logps [T] -> sums and counts [S], one program per segment
    row_scale       unscaled gradients [T, D] x coefficients [T] -> d hidden [T, D]

No atomics: one program computes each sum and reads its terms in a fixed order, so results are
bitwise reproducible for any order of the segments. A program reads all T segment ids (64 KB at
T = 8192, from L2); for the tens of segments of a pack this is cheaper than sorting them.

Tested on an H200 in bfloat16 (docs/gpu.md), in Triton's interpreter, and by ahead-of-time
compilation for sm_90.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from cpo_fast.kernels.numerics import launching_on

BLOCK = 1024
"""Terms per tile of a sum, and columns per tile of a row."""


@triton.jit
def segment_sums_kernel(
    logps_ptr,  # [T] float32
    segment_ids_ptr,  # [T] int64, -1: no segment
    labels_ptr,  # [T] int64
    sums_ptr,  # [S] float64
    counts_ptr,  # [S] int32
    T,
    ignore_index,
    BLOCK: tl.constexpr,
):
    i_segment = tl.program_id(0)
    b_sum = tl.zeros([BLOCK], dtype=tl.float64)
    b_count = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, T, BLOCK):
        o_t = start + tl.arange(0, BLOCK)
        mask = o_t < T
        segment = tl.load(segment_ids_ptr + o_t, mask=mask, other=-1)
        label = tl.load(labels_ptr + o_t, mask=mask, other=ignore_index)
        mine = (segment == i_segment) & (label != ignore_index)
        b_sum += tl.load(logps_ptr + o_t, mask=mine, other=0.0).to(tl.float64)
        b_count += mine.to(tl.int32)
    tl.store(sums_ptr + i_segment, tl.sum(b_sum, axis=0))
    tl.store(counts_ptr + i_segment, tl.sum(b_count, axis=0))


@triton.jit
def row_scale_kernel(
    rows_ptr,  # [T, D]
    coefficients_ptr,  # [T] float32
    out_ptr,  # [T, D]
    D,
    rows_stride,
    out_stride,
    BLOCK: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    coefficient = tl.load(coefficients_ptr + i_t)
    for start in range(0, D, BLOCK):
        o_d = start + tl.arange(0, BLOCK)
        mask = o_d < D
        row = tl.load(rows_ptr + i_t * rows_stride + o_d, mask=mask).to(tl.float32)
        scaled = (coefficient * row).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + i_t * out_stride + o_d, scaled, mask=mask)


def segment_sums(
    logps: torch.Tensor,  # [T] float32
    labels: torch.Tensor,  # [T] int64
    segment_ids: torch.Tensor,  # [T] int64, -1: no segment
    num_segments: int,
    *,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob sums [S] float64 and counts [S] int32 of the scored tokens of each segment.

    float64 preserves the digits of the difference of two long sums.
    """
    sums = torch.empty(num_segments, dtype=torch.float64, device=logps.device)
    counts = torch.empty(num_segments, dtype=torch.int32, device=logps.device)
    if num_segments:
        with launching_on(logps):
            segment_sums_kernel[(num_segments,)](
                logps,
                segment_ids,
                labels,
                sums,
                counts,
                logps.shape[0],
                ignore_index,
                BLOCK=BLOCK,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return sums, counts


def row_scale(rows: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """`rows` [T, D] times `coefficients` [T] float32: one float32 product, rounded once to the
    dtype of `rows`."""
    T, D = rows.shape
    out = torch.empty((T, D), dtype=rows.dtype, device=rows.device)
    if T and D:
        # 8 columns per thread: one 16-byte access in 16-bit types.
        with launching_on(rows):
            row_scale_kernel[(T,)](
                rows,
                coefficients,
                out,
                D,
                rows.stride(0),
                out.stride(0),
                BLOCK=BLOCK,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return out

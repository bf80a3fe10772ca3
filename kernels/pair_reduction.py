"""From log-probs of tokens to losses of pairs, and from gradients of tokens to gradients of states.

    segment_sums     logps [T] -> sums and counts [S], one program per segment
    sigmoid_pairs    sums [S] -> losses, rewards and d loss / d log-ratio [P] (DPO, Rafailov et al.
                     2023, eq. 7, with label smoothing)
    segment_coefficients    d loss / d log-ratio [P] -> coefficients [S]
    row_scale        unscaled gradients [T, D] x coefficients [T] -> d hidden [T, D]

Nothing uses atomics: each sum has one program, which reads its terms in a fixed order, so that
results are bitwise the same from run to run whatever the order of segments and pairs. A program
reads all T segment ids (64 KB at T = 8192, from L2), which for the tens of segments of a pack is
cheaper than sorting them.

Run on an H200 in bfloat16 (docs/gpu.md), in Triton's interpreter, and compiled ahead of time for
sm_90 in the tests.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cpo_fast.kernels.numerics import launching_on, sigmoid, softplus

BLOCK = 1024
"""Terms per tile of a sum, and pairs per program."""


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
def sigmoid_pairs_kernel(
    logps_ptr,  # [S] float64
    ref_logps_ptr,  # [S] float64
    pairs_ptr,  # [P, 2] int64
    losses_ptr,  # [P] float32
    slopes_ptr,  # [P] float32
    rewards_ptr,  # [P, 2] float32
    P,
    beta,
    label_smoothing,
    BLOCK: tl.constexpr,
):
    o_p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = o_p < P
    chosen = tl.load(pairs_ptr + 2 * o_p, mask=mask, other=0)
    rejected = tl.load(pairs_ptr + 2 * o_p + 1, mask=mask, other=0)
    won = tl.load(logps_ptr + chosen, mask=mask) - tl.load(ref_logps_ptr + chosen, mask=mask)
    lost = tl.load(logps_ptr + rejected, mask=mask) - tl.load(ref_logps_ptr + rejected, mask=mask)
    x = (beta * (won - lost)).to(tl.float32)
    losses = (1.0 - label_smoothing) * softplus(-x) + label_smoothing * softplus(x)
    slopes = beta * (label_smoothing * sigmoid(x) - (1.0 - label_smoothing) * sigmoid(-x))
    tl.store(losses_ptr + o_p, losses, mask=mask)
    tl.store(slopes_ptr + o_p, slopes, mask=mask)
    tl.store(rewards_ptr + 2 * o_p, beta * won, mask=mask)
    tl.store(rewards_ptr + 2 * o_p + 1, beta * lost, mask=mask)


@triton.jit
def segment_coefficients_kernel(
    slopes_ptr,  # [P] float32
    pairs_ptr,  # [P, 2] int64
    coefficients_ptr,  # [S] float32
    P,
    BLOCK: tl.constexpr,
):
    i_segment = tl.program_id(0)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, P, BLOCK):
        o_p = start + tl.arange(0, BLOCK)
        mask = o_p < P
        slope = tl.load(slopes_ptr + o_p, mask=mask, other=0.0)
        chosen = tl.load(pairs_ptr + 2 * o_p, mask=mask, other=-1)
        rejected = tl.load(pairs_ptr + 2 * o_p + 1, mask=mask, other=-1)
        b_sum += tl.where(chosen == i_segment, slope, 0.0)
        b_sum -= tl.where(rejected == i_segment, slope, 0.0)
    tl.store(coefficients_ptr + i_segment, tl.sum(b_sum, axis=0))


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


class PairLosses(NamedTuple):
    """What `sigmoid_pairs` returns, all float32."""

    losses: torch.Tensor  # [P]
    slopes: torch.Tensor  # [P] d losses / d (log-ratio chosen - log-ratio rejected)
    rewards: torch.Tensor  # [P, 2] beta x log-ratio of the chosen and the rejected side


def segment_sums(
    logps: torch.Tensor,  # [T] float32
    labels: torch.Tensor,  # [T] int64
    segment_ids: torch.Tensor,  # [T] int64, -1: no segment
    num_segments: int,
    *,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums [S] float64 of the scored tokens' log-probs per segment, and their numbers [S] int32.

    float64 so that the difference of two long sums keeps its digits.
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


def sigmoid_pairs(
    logps: torch.Tensor,  # [S] float64
    ref_logps: torch.Tensor,  # [S] float64
    pairs: torch.Tensor,  # [P, 2] int64, contiguous
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PairLosses:
    """Losses of pairs (chosen, rejected), their derivatives and rewards."""
    P = pairs.shape[0]
    out = PairLosses(
        losses=torch.empty(P, dtype=torch.float32, device=logps.device),
        slopes=torch.empty(P, dtype=torch.float32, device=logps.device),
        rewards=torch.empty(P, 2, dtype=torch.float32, device=logps.device),
    )
    if P:
        with launching_on(logps):
            sigmoid_pairs_kernel[(triton.cdiv(P, BLOCK),)](
                logps,
                ref_logps,
                pairs,
                *out,
                P,
                beta,
                label_smoothing,
                BLOCK=BLOCK,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return out


def segment_coefficients(
    slopes: torch.Tensor,  # [P] float32
    pairs: torch.Tensor,  # [P, 2] int64, contiguous
    num_segments: int,
) -> torch.Tensor:
    """d (sum of losses) / d logps [S] float32, from the slopes of the losses of pairs."""
    out = torch.empty(num_segments, dtype=torch.float32, device=slopes.device)
    if num_segments:
        with launching_on(slopes):
            segment_coefficients_kernel[(num_segments,)](
                slopes,
                pairs,
                out,
                pairs.shape[0],
                BLOCK=BLOCK,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return out


def row_scale(rows: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """`coefficients` [T] float32 times `rows` [T, D], in float32, rounded once to rows' dtype."""
    T, D = rows.shape
    out = torch.empty((T, D), dtype=rows.dtype, device=rows.device)
    if T and D:
        # 8 columns a thread: one 16-byte access of 16-bit numbers.
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

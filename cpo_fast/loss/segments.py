"""Sums of token log-probs per segment, in float64, and the gradient of these sums.

The GPU implementations use their own kernels: `index_add` on a GPU adds by atomics, whose order
changes from run to run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cpo_fast.loss.operators import Operator

SumsAndCounts = Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor]]


def segment_sums(
    values: Tensor,  # [T], 0 where the segment is -1
    segment_ids: Tensor,  # [T] int64, -1: no segment
    segments: int,  # S
) -> Tensor:
    """Sums [S] float64 of the values of each segment, differentiable."""
    zeros = torch.zeros(segments, dtype=torch.float64, device=values.device)
    return zeros.index_add(0, segment_ids.clamp(min=0), values.double())


def sums_and_counts(
    logps: Tensor,  # [T], 0 where the label is ignored
    segment_ids: Tensor,  # [T] int64, -1: no segment
    labels: Tensor,  # [T] int64, `ignore_index` where the segment is -1
    segments: int,  # S
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Log-prob sums and numbers of scored tokens of each segment, [S] float64; the sums are
    differentiable."""
    scored = labels != ignore_index
    return segment_sums(logps, segment_ids, segments), segment_sums(scored, segment_ids, segments)


def sums_and_counts_operator(name: str, kernel: SumsAndCounts) -> SumsAndCounts:
    """`sums_and_counts` by a GPU kernel with the same arguments, as operator `cpo_fast::name`."""

    def compute(
        logps: Tensor, segment_ids: Tensor, labels: Tensor, segments: int, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        return kernel(logps, segment_ids, labels, segments, ignore_index)

    def fake(
        logps: Tensor, segment_ids: Tensor, labels: Tensor, segments: int, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        sums, counts = (logps.new_empty(segments, dtype=torch.float64) for _ in range(2))
        return sums, counts

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[1])

    def backward(ctx: Any, grad_sums: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return _spread(grad_sums, *ctx.saved_tensors), None, None, None, None

    operator = Operator(name, compute, fake)
    operator.register_autograd(backward, save)

    def call(
        logps: Tensor, segment_ids: Tensor, labels: Tensor, segments: int, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        tensors = logps.contiguous(), segment_ids.contiguous(), labels.contiguous()
        sums, counts = operator(*tensors, segments, ignore_index)
        return sums, counts

    return call


def _spread(grad_sums: Tensor, segment_ids: Tensor) -> Tensor:
    """d loss / d logps [T] float32 from d loss / d sums [S]."""
    if grad_sums.shape[0] == 0:
        return grad_sums.new_zeros(segment_ids.shape, dtype=torch.float32)
    grad = grad_sums[segment_ids.clamp(min=0)].where(segment_ids >= 0, 0)
    return grad.float()

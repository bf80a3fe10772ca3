"""From tokens to sequences: sums of log-probs per segment, in float64, and how their gradient
spreads. The GPU implementations sum by kernels of their own, since index_add adds by atomics there,
in an order that changes from run to run."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sums(
    logps: Tensor,  # [T], 0 where the label is ignored
    segment_ids: Tensor,  # [T] int64, -1: of no segment
    labels: Tensor,  # [T] int64, `ignore_index` where the segment is -1
    segments: int,  # S
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """(sums of log-probs, scored tokens) per segment, [S] float64 each; sums are differentiable."""
    zeros = torch.zeros(segments, dtype=torch.float64, device=logps.device)
    segment = segment_ids.clamp(min=0)
    sums = zeros.index_add(0, segment, logps.double())
    return sums, zeros.index_add(0, segment, (labels != ignore_index).double())


def spread(grad_sums: Tensor, segment_ids: Tensor) -> Tensor:
    """d loss / d logps [T] float32 from d loss / d sums [S]."""
    if grad_sums.shape[0] == 0:
        return grad_sums.new_zeros(segment_ids.shape, dtype=torch.float32)
    grad = grad_sums[segment_ids.clamp(min=0)].where(segment_ids >= 0, 0)
    return grad.float()

"""Per-token statistics for a trainer's log, in one pass without materialising the logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

COLUMNS = 4096
"""Vocabulary entries per block; the logits of a block fit in the cache."""


class TokenStatistics(NamedTuple):
    """Statistics of each row's next-token distribution; float32 (bool), without gradients."""

    entropy: Tensor  # [R]
    mean_logit: Tensor  # [R] over the vocabulary
    is_top1: Tensor  # [R] the label is the most likely token (the first of ties)


@torch.no_grad()
def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> TokenStatistics:
    """`hidden` [R, D], `weight` [V, D], `labels` [R], `bias` [V]; logits as in `linear_logprobs`.

    Running over blocks: the maximum, the sum of exponentials, and the sum of logit times
    exponential, both scaled by the maximum so far.
    """
    R, V = len(hidden), len(weight)
    peak = hidden.new_full((R,), -torch.inf, dtype=torch.float32)
    mass, moment, total = (torch.zeros_like(peak) for _ in range(3))
    best = torch.zeros_like(labels)
    for start in range(0, V, COLUMNS):
        stop = min(start + COLUMNS, V)
        shift = None if bias is None else bias[start:stop]
        z = F.linear(hidden, weight[start:stop], shift).float()  # [R, columns]
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        total += z.sum(1)
        top, where = z.max(1)
        best = torch.where(top > peak, where + start, best)
        new = torch.maximum(peak, top)
        down = torch.where(mass > 0, peak - new, 0.0)  # [R] <= 0
        z -= new[:, None]
        e = z.exp()
        moment = (moment + mass * down) * down.exp() + (z * e).sum(1)
        mass = mass * down.exp() + e.sum(1)
        peak = new
    return TokenStatistics(mass.log() - moment / mass, total / V, best == labels)

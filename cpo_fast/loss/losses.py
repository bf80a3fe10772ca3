"""Preference losses, each once, on vectors over pairs.

`chosen` and `rejected` are what a loss compares, [P]: log-ratios log pi - log pi_ref of the two
sides, summed over tokens (averaged for ipo and with average_log_prob); for simpo and orpo, which
know no reference, the average log-prob per token. `beta` scales them. All give one loss per pair,
[P].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    """DPO, arXiv:2305.18290 eq. 7; smoothed as in cDPO: labels flipped with that probability."""
    margin = beta * (chosen - rejected)
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def hinge(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    """SLiC, arXiv:2305.10425, on the log-ratios."""
    return torch.relu(1 - beta * (chosen - rejected))


def ipo(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    """IPO, arXiv:2310.12036 eq. 17, on averages per token; beta is the paper's tau."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def robust(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    """Robust DPO, arXiv:2403.00409 eq. 9: unbiased when labels are flipped with that
    probability."""
    margin = beta * (chosen - rejected)
    clean, flipped = F.logsigmoid(margin), F.logsigmoid(-margin)
    return (smoothing * flipped - (1 - smoothing) * clean) / (1 - 2 * smoothing)


def exo_pair(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    """EXO, arXiv:2402.00856 eq. 16: reverse KL to the smoothed preference."""
    margin = beta * (chosen - rejected)
    log_win, log_lose = F.logsigmoid(margin), F.logsigmoid(-margin)
    return log_win.exp() * (log_win - math.log1p(-smoothing)) + log_lose.exp() * (
        log_lose - math.log(smoothing)
    )


def nca_pair(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    """NCA, arXiv:2402.05369, two answers."""
    up, down = F.logsigmoid(beta * chosen), F.logsigmoid(-beta * chosen)
    return -up - 0.5 * down - 0.5 * F.logsigmoid(-beta * rejected)


def bco_pair(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    """BCO on pairs, arXiv:2404.04656, without the running shift of the rewards."""
    return -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)


def sppo_hard(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    """SPPO, arXiv:2405.00675 eq. 4.7 with win probabilities 1 and 0."""
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    """APO-zero, arXiv:2408.06266 eq. 7: chosen up, rejected down."""
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    """APO-down, arXiv:2408.06266 eq. 8: both down, rejected further."""
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


def orpo(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    """The odds-ratio term of ORPO, arXiv:2403.07691 eq. 7; the caller adds the chosen NLL."""
    return -beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logp: Tensor) -> Tensor:
    # An average log-prob of 0 (a certain or an empty side) has infinite odds: keep them finite.
    logp = logp.clamp(max=-1e-7)
    return logp - torch.log(-torch.expm1(logp))


def plackett_luce(
    chosen: Tensor, rejected: Tensor, beta: float, group: Tensor, num_groups: int, counted: Tensor
) -> Tensor:
    """-log of the chosen's share among itself and its K rejected (arXiv:2305.18290 eq. 20, top-1).

    `group` [P] names the chosen answer of a pair, `counted` [P] bool leaves a pair out. Each pair
    gets its group's value; with K = 1 this is `sigmoid`.
    """
    margin = (beta * (rejected - chosen)).masked_fill(~counted, -torch.inf)  # [P]
    zeros = margin.new_zeros(num_groups)
    peak = zeros.scatter_reduce(
        0, group, margin.detach(), "amax"
    )  # [groups] >= 0: the chosen's own
    total = torch.exp(-peak).index_add(0, group, torch.exp(margin - peak[group]))
    return (peak + torch.log(total))[group]


@dataclass(frozen=True, slots=True)
class LossType:
    """A loss and the options that it takes."""

    function: Callable[..., Tensor]
    reference: bool = True  # compares with a reference model
    averages: bool = False  # divides by token counts by itself
    smoothing: tuple[float, float] | None = None  # label_smoothing lies in [low, high)


LOSS_TYPES: dict[str, LossType] = {
    "sigmoid": LossType(sigmoid, smoothing=(0.0, 1.0)),
    "hinge": LossType(hinge),
    "ipo": LossType(ipo, averages=True),
    "robust": LossType(robust, smoothing=(0.0, 0.5)),
    "exo_pair": LossType(exo_pair, smoothing=(math.ulp(0.0), 1.0)),
    "nca_pair": LossType(nca_pair),
    "bco_pair": LossType(bco_pair),
    "sppo_hard": LossType(sppo_hard),
    "apo_zero": LossType(apo_zero),
    "apo_down": LossType(apo_down),
    "simpo": LossType(sigmoid, reference=False, averages=True, smoothing=(0.0, 1.0)),
    "orpo": LossType(orpo, reference=False, averages=True),
    "plackett_luce": LossType(plackett_luce),
}
"""simpo (arXiv:2405.14734 eq. 6) is `sigmoid` on averages whose margin the caller lowers by gamma
/ beta."""


def pair_losses(
    logps: Tensor,  # [S]
    ref: Tensor,  # [S]
    counts: Tensor,  # [S] scored tokens
    pairs: Tensor,  # [P, 2]
    pair_weights: Tensor | None,  # [P]
    *,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    average_log_prob: bool,
    simpo_gamma: float,
    rpo_alpha: float,
) -> tuple[Tensor, Tensor]:
    """The loss and the losses [P] of pairs, from sums over segments, all float64."""
    kind = LOSS_TYPES[loss_type]
    chosen, rejected = pairs.unbind(1)
    lengths = counts.clamp(min=1)
    ratios = logps - ref
    if average_log_prob or kind.averages:
        ratios = ratios / lengths
    counted = counts[pairs].sum(1) > 0  # [P]
    weights = counted.double()
    nll = -logps / lengths  # [S] per token

    if loss_type == "plackett_luce":
        S = logps.shape[0]
        losses = plackett_luce(ratios[chosen], ratios[rejected], beta, chosen, S, counted)
        group_size = logps.new_zeros(S).index_add(0, chosen, weights).clamp(min=1)
        weights = weights / group_size[chosen]
    else:
        won = ratios[chosen]
        if loss_type == "simpo":
            won = won - simpo_gamma / beta
        losses = kind.function(won, ratios[rejected], beta, label_smoothing)
        if loss_type == "orpo":
            # The peers' mean over the chosen tokens of the batch, written as a mean over pairs.
            mean_length = (weights * counts[chosen]).sum() / weights.sum().clamp(min=1)
            losses = losses - logps[chosen] / mean_length.clamp(min=1)
    if rpo_alpha:
        losses = losses + rpo_alpha * nll[chosen]

    if pair_weights is not None:
        weights = weights * pair_weights.double()
    total = weights.sum()
    return (weights * losses).sum() / total.where(total > 0, 1), losses

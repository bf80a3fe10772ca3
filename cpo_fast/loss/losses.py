"""The formulas of the preference losses, on vectors over pairs.

`chosen` and `rejected` [P] are the values that a loss compares: the log-ratios log pi - log pi_ref
of the two sides, summed over tokens (averaged for ipo and with average_log_prob); for simpo and
orpo, which have no reference, the average log-prob per token. `beta` scales them. Every formula
returns one loss per pair, [P].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cpo_fast.loss.options import LOSS_TYPES, LossOptions


def sigmoid(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    """DPO, arXiv:2305.18290 eq. 7; smoothed as in cDPO: `smoothing` is the probability of a flipped
    label."""
    margin = beta * (chosen - rejected)
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def hinge(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    """SLiC, arXiv:2305.10425, on the log-ratios."""
    return torch.relu(1 - beta * (chosen - rejected))


def ipo(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    """IPO, arXiv:2310.12036 eq. 17, on averages per token; beta is the paper's tau."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def robust(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    """Robust DPO, arXiv:2403.00409 eq. 9: unbiased when labels are flipped with probability
    `smoothing`."""
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
    """NCA, arXiv:2402.05369, for two answers."""
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
    # An average log-prob of 0 (a certain or an empty side) has infinite odds; the clamp keeps them
    # finite.
    logp = logp.clamp(max=-1e-7)
    return logp - torch.log(-torch.expm1(logp))


def plackett_luce(
    chosen: Tensor, rejected: Tensor, beta: float, group: Tensor, num_groups: int, counted: Tensor
) -> Tensor:
    """-log of the chosen answer's share among itself and its K rejected answers (arXiv:2305.18290
    eq. 20, top-1).

    `group` [P] is the segment of a pair's chosen answer; pairs where `counted` [P] is False are
    left out. Each pair gets the value of its group; with K = 1 this is `sigmoid`.
    """
    margin = (beta * (rejected - chosen)).masked_fill(~counted, -torch.inf)  # [P]
    zeros = margin.new_zeros(num_groups)
    # [groups] >= 0, the chosen answer's own margin
    peak = zeros.scatter_reduce(0, group, margin.detach(), "amax")
    total = torch.exp(-peak).index_add(0, group, torch.exp(margin - peak[group]))
    return (peak + torch.log(total))[group]


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "robust": robust,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "simpo": sigmoid,
    "orpo": orpo,
    "plackett_luce": plackett_luce,
}
"""By loss type. simpo (arXiv:2405.14734 eq. 6) is `sigmoid` on averages whose margin `pair_losses`
lowers by gamma / beta."""


def pair_losses(
    logps: Tensor,  # [S]
    ref: Tensor,  # [S]
    counts: Tensor,  # [S] scored tokens
    pairs: Tensor,  # [P, 2]
    pair_weights: Tensor | None,  # [P]
    options: LossOptions,
) -> tuple[Tensor, Tensor]:
    """The loss and the losses [P] of pairs, from sums over segments, all float64."""
    loss_type, beta = options.loss_type, options.beta
    kind = LOSS_TYPES[loss_type]
    chosen, rejected = pairs.unbind(1)
    lengths = counts.clamp(min=1)
    ratios = logps - ref
    if options.average_log_prob or kind.averages:
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
            won = won - options.simpo_gamma / beta
        losses = FORMULAS[loss_type](won, ratios[rejected], beta, options.label_smoothing)
        if loss_type == "orpo":
            # The NLL per chosen token of the batch, written as a mean over pairs.
            mean_length = (weights * counts[chosen]).sum() / weights.sum().clamp(min=1)
            losses = losses - logps[chosen] / mean_length.clamp(min=1)
    if options.rpo_alpha:
        losses = losses + options.rpo_alpha * nll[chosen]

    if pair_weights is not None:
        weights = weights * pair_weights.double()
    total = weights.sum()
    return (weights * losses).sum() / total.where(total > 0, 1), losses

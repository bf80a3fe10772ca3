"""Does the policy prefer the true report to its counterfactual? Vectors in, figures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cpo_fast.errors import UsageError


def preference(
    policy_chosen: Sequence[float],
    policy_rejected: Sequence[float],
    reference_chosen: Sequence[float],
    reference_rejected: Sequence[float],
    *,
    beta: float,
    groups: Sequence[Any] | None = None,
    sources: Sequence[str] | None = None,
    bootstrap: int = 1000,
    seed: int = 42,
) -> dict[str, Any]:
    """Rewards of P held-out pairs from their summed log-probs [P] (lists, arrays or CPU tensors).

    reward = beta x (log pi - log pi_ref), as in the loss (arXiv 2505.13081; DPO, arXiv 2305.18290).
    Returns {"pairs", "accuracy" (chosen reward above the rejected one, strictly), "margin",
    "chosen_reward", "rejected_reward" (means), "policy_accuracy" (the policy's own log-probs alone,
    whatever the reference), "beta"}; accuracies and margin as {"value", "interval"}, 95 % by
    bootstrap over `groups` ([P] names, such as study ids; pairs of one study are not independent)
    or over pairs. Where all pairs are won, or none, every draw says the same: the accuracy's bound
    is then the exact binomial one for that many groups. One group alone gives a margin no interval.
    With `sources` [P] (thinking, perception) of more than one kind, "sources" holds
    the same figures of each. Raises UsageError for unequal lengths, no pair, or values that are not
    finite.
    """
    columns = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    vectors = [np.asarray(column, dtype=np.float64).reshape(-1) for column in columns]
    if len({len(vector) for vector in vectors}) != 1:
        raise UsageError(f"log-probs of unequal lengths: {[len(vector) for vector in vectors]}")
    pairs = len(vectors[0])
    if not pairs:
        raise UsageError("no held-out pair to evaluate")
    if not all(np.isfinite(vector).all() for vector in vectors):
        raise UsageError("the log-probs contain NaN or infinity")
    for given, what in ((groups, "group names"), (sources, "sources")):
        if given is not None and len(given) != pairs:
            raise UsageError(f"{pairs} pairs, but {len(given)} {what}")
    chosen = beta * (vectors[0] - vectors[2])
    rejected = beta * (vectors[1] - vectors[3])
    keys = np.arange(pairs) if groups is None else np.unique(list(groups), return_inverse=True)[1]
    weights = _pair_weights(keys, bootstrap, seed)

    studies = int(keys.max()) + 1

    def figure(values: np.ndarray) -> dict[str, Any]:
        if studies == 1:
            return {"value": float(values.mean()), "interval": None}
        spread = (weights @ values) / weights.sum(axis=1)
        low, high = np.quantile(spread, [0.025, 0.975])
        return {"value": float(values.mean()), "interval": [float(low), float(high)]}

    def share(won: np.ndarray) -> dict[str, Any]:
        least = 0.025 ** (1 / studies)  # Clopper and Pearson 1934
        if won.all():
            return {"value": 1.0, "interval": [least, 1.0]}
        if not won.any():
            return {"value": 0.0, "interval": [0.0, 1 - least]}
        return figure(won.astype(np.float64))

    figures: dict[str, Any] = {
        "pairs": pairs,
        "beta": beta,
        "accuracy": share(chosen > rejected),
        "margin": figure(chosen - rejected),
        "chosen_reward": float(chosen.mean()),
        "rejected_reward": float(rejected.mean()),
        "policy_accuracy": share(vectors[0] > vectors[1]),
    }
    names = list(dict.fromkeys(sources or ()))
    if sources is not None and len(names) > 1:
        figures["sources"] = {}
        for name in names:
            where = np.asarray([source == name for source in sources])
            own = [vector[where] for vector in vectors]
            figures["sources"][name] = preference(
                *own, beta=beta, groups=list(keys[where]), bootstrap=bootstrap, seed=seed
            )
    return figures


def more_likely(
    chosen: Sequence[float],
    rejected: Sequence[float],
    *,
    groups: Sequence[Any] | None = None,
    sources: Sequence[str] | None = None,
    bootstrap: int = 1000,
    seed: int = 42,
) -> dict[str, Any]:
    """What `preference` says of P pairs without a reference: {"pairs", "policy_accuracy"}, and
    "sources" where there is more than one. Raises UsageError as it does.
    """
    options: dict[str, Any] = {"groups": groups, "sources": sources, "bootstrap": bootstrap}
    figures = preference(chosen, rejected, chosen, rejected, beta=1.0, seed=seed, **options)

    def kept(found: dict[str, Any]) -> dict[str, Any]:
        return {name: found[name] for name in ("pairs", "policy_accuracy")}

    parts = {name: kept(found) for name, found in figures.get("sources", {}).items()}
    return kept(figures) | ({"sources": parts} if parts else {})


def both_models(
    scored: Mapping[str, Any], *, beta: float, seed: int = 42
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(figures of the policy, figures of the reference) of pairs as `score_pairs` returns them: by
    `preference` and by `more_likely`."""
    of_pairs = {name: scored[name] for name in ("groups", "sources")}
    below = (scored["reference_chosen"], scored["reference_rejected"])
    return preference(**scored, beta=beta, seed=seed), more_likely(*below, **of_pairs, seed=seed)


def _pair_weights(keys: np.ndarray, bootstrap: int, seed: int) -> np.ndarray:
    """[bootstrap, P]: how often the group of each pair was drawn."""
    groups = int(keys.max()) + 1
    draw = np.random.default_rng(seed)
    drawn = draw.multinomial(groups, np.full(groups, 1.0 / groups), bootstrap)
    return drawn[:, keys].astype(np.float64)

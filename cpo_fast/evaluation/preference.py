"""How often a policy prefers the true report to its counterfactual, from summed log-probs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cpo_fast.counting import counted
from cpo_fast.errors import UsageError
from cpo_fast.evaluation.bootstrap import estimate, group_weights


def summarize_preference(
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
    Returns {"pairs", "accuracy" (share of pairs whose chosen reward is strictly higher), "margin",
    "chosen_reward", "rejected_reward" (means), "policy_accuracy" (from the policy's log-probs
    alone), "beta"}. Accuracies and margin are {"value", "interval"}: 95 % by bootstrap over
    `groups` ([P] names, such as study ids, because pairs of one study are not independent), or over
    pairs if None. If all pairs are won, or none, every draw is equal: the interval is then the
    exact binomial one for the number of groups. A single group gives the margin no interval.
    With more than one kind in `sources` [P] (thinking, perception), "sources" holds the same
    figures of each. Raises UsageError for unequal lengths, no pair, or values that are not finite.
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
    for given, what in ((groups, "group name"), (sources, "source")):
        if given is not None and len(given) != pairs:
            raise UsageError(f"{counted(pairs, 'pair')}, but {counted(len(given), what)}")
    chosen = beta * (vectors[0] - vectors[2])
    rejected = beta * (vectors[1] - vectors[3])
    keys = list(range(pairs) if groups is None else groups)
    weights = group_weights(keys, bootstrap, seed)
    independent = len(set(keys))

    def mean(values: np.ndarray) -> dict[str, Any]:
        if independent == 1:
            return {"value": float(values.mean()), "interval": None}
        return estimate(values.mean(), (weights @ values) / weights.sum(axis=1))

    def share(won: np.ndarray) -> dict[str, Any]:
        bound = 0.025 ** (1 / independent)  # Clopper and Pearson 1934
        if won.all():
            return {"value": 1.0, "interval": [bound, 1.0]}
        if not won.any():
            return {"value": 0.0, "interval": [0.0, 1 - bound]}
        return mean(won.astype(np.float64))

    figures: dict[str, Any] = {
        "pairs": pairs,
        "beta": beta,
        "accuracy": share(chosen > rejected),
        "margin": mean(chosen - rejected),
        "chosen_reward": float(chosen.mean()),
        "rejected_reward": float(rejected.mean()),
        "policy_accuracy": share(vectors[0] > vectors[1]),
    }
    names = list(dict.fromkeys(sources or ()))
    if sources is not None and len(names) > 1:
        figures["sources"] = {}
        for name in names:
            rows = [i for i, source in enumerate(sources) if source == name]
            own: list[Any] = [vector[rows] for vector in vectors]
            figures["sources"][name] = summarize_preference(
                *own,
                beta=beta,
                groups=[keys[i] for i in rows],
                bootstrap=bootstrap,
                seed=seed,
            )
    return figures


def summarize_likelihood(
    chosen: Sequence[float],
    rejected: Sequence[float],
    *,
    groups: Sequence[Any] | None = None,
    sources: Sequence[str] | None = None,
    bootstrap: int = 1000,
    seed: int = 42,
) -> dict[str, Any]:
    """The part of `summarize_preference` that needs no reference, for P pairs.

    Returns {"pairs", "policy_accuracy"}, and "sources" if there is more than one. Raises UsageError
    as `summarize_preference` does.
    """
    options: dict[str, Any] = {"groups": groups, "sources": sources, "bootstrap": bootstrap}
    figures = summarize_preference(chosen, rejected, chosen, rejected, beta=1, seed=seed, **options)

    def select(found: dict[str, Any]) -> dict[str, Any]:
        return {name: found[name] for name in ("pairs", "policy_accuracy")}

    parts = {name: select(found) for name, found in figures.get("sources", {}).items()}
    return select(figures) | ({"sources": parts} if parts else {})


def summarize_both_models(
    scored: Mapping[str, Any], *, beta: float, seed: int = 42
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(`summarize_preference` of the policy, `summarize_likelihood` of the reference) for pairs as
    `score_pairs` returns them.
    """
    pairs = {name: scored[name] for name in ("groups", "sources")}
    reference = (scored["reference_chosen"], scored["reference_rejected"])
    return (
        summarize_preference(**scored, beta=beta, seed=seed),
        summarize_likelihood(*reference, **pairs, seed=seed),
    )

"""Choice of the target diseases of a report: near in the graph, described by the same words,
plausible, reproducible."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set
from functools import lru_cache

import numpy as np

from cpo_fast.counterfactual.graph.wording import TARGET_WORDINGS
from cpo_fast.counterfactual.seeding import hash_seed
from cpo_fast.types import ConceptGraph, Labels

NEARNESS, DRIFT, STATED, CONFLICT, CHANCE = 1.0, 1.0, 0.1, 0.5, 0.5
"""Weights of the score: attributes shared with a present disease; `drift_proneness` of the target;
the report names the target; a present disease or reported anatomy excludes it (subtracted); a
random number from seed and study, which spreads the targets of similar reports."""


@lru_cache(maxsize=4)
def nearness(graph: ConceptGraph) -> dict[tuple[str, str], float]:
    """Jaccard index of the associated attributes for each pair of diseases."""
    rows = {name: frozenset(d.associations) for name, d in graph.diseases.items()}
    return {(a, b): len(rows[a] & rows[b]) / len(rows[a] | rows[b]) for a in rows for b in rows}


def drift_proneness(graph: ConceptGraph, asserted: Collection[str]) -> dict[str, float]:
    """How strongly the asserted attributes of a report suggest each disease, 0 to 1.

    Pick one of the attributes at random, then one of its associated diseases: the value is the
    probability of this disease. A high value for an absent disease means that the same words
    support two diagnoses, so a small change of wording can move a model from one to the other. All
    values are 0 if the report asserts no attribute.
    """
    shown_by = _diseases_by_attribute(graph)
    suggested = [shown_by[name] for name in asserted if shown_by.get(name)]
    return {
        disease: sum(1 / len(names) for names in suggested if disease in names)
        / max(len(suggested), 1)
        for disease in graph.diseases
    }


@lru_cache(maxsize=4)
def _diseases_by_attribute(graph: ConceptGraph) -> dict[str, frozenset[str]]:
    """The associated diseases of each attribute."""
    diseases = graph.diseases.items()
    return {
        attribute: frozenset(name for name, d in diseases if attribute in d.associations)
        for attribute in graph.attributes
    }


def list_candidates(graph: ConceptGraph, labels: Labels) -> list[str]:
    """Diseases with wordings that are neither present nor uncertain in `labels`, nor implied by a
    present disease."""
    taken = {name for name, value in labels.items() if value in (1, -1)}
    present = [name for name, value in labels.items() if value == 1 and name in graph.diseases]
    for name in present:
        taken.update(graph.network.nodes[name]["implies"])
    return [name for name in graph.diseases if name in TARGET_WORDINGS and name not in taken]


def score_targets(
    graph: ConceptGraph,
    study_id: str,
    labels: Labels,
    stated: Labels,
    asserted: Collection[str],
    against: Set[str],
    seed: int,
) -> dict[str, float]:
    """The possible targets of a study and their scores.

    `labels`: labels of the study; `stated`: labels of its text (0 means that a disease is named and
    denied); `asserted`: attributes asserted in the text; `against`: diseases whose anatomy the text
    contradicts. Depends only on these, the seed and the study id, so that all shards agree.
    """
    near = nearness(graph)
    drift = drift_proneness(graph, asserted)
    present = [name for name, value in labels.items() if value == 1 and name in graph.diseases]

    def score(name: str) -> float:
        nearest = max((near[name, other] for other in present), default=0.0)
        conflict = name in against or any(labels.get(o) in (1, -1) for o in graph.excluded[name])
        chance = hash_seed(seed, study_id, name) / 2.0**64
        named = stated.get(name) == 0
        likely = NEARNESS * nearest + DRIFT * drift[name] + STATED * named
        return likely - CONFLICT * conflict + CHANCE * chance

    return {name: score(name) for name in list_candidates(graph, labels)}


def pick_targets(scores: Mapping[str, float], prices: Mapping[str, float], count: int) -> list[str]:
    """The at most `count` targets with the highest score less price, best first."""
    return sorted(scores, key=lambda n: scores[n] - prices.get(n, 0.0), reverse=True)[:count]


def balance_prices(
    scores: Iterable[Mapping[str, float]], count: int, *, rounds: int = 60
) -> dict[str, float]:
    """A price for each disease that makes all diseases targets about equally often.

    `scores` holds the scores of every study of the data set. The price of a disease chosen too
    often rises, that of one chosen too rarely falls, in decreasing steps. Prices are limited to
    +-`CONFLICT` / 2, so that a target contradicted by the anatomy is not forced. The result depends
    on the data set, `count` and the seed of the scores, not on the shard.
    """
    rows = list(scores)
    names = sorted({name for row in rows for name in row})
    if not names:
        return {}
    table = np.full((len(rows), len(names)), -np.inf, dtype=np.float64)  # [studies, diseases]
    for index, row in enumerate(rows):
        for name, value in row.items():
            table[index, names.index(name)] = value
    count = min(count, len(names))
    price = np.zeros(len(names))
    for step in range(rounds):
        best = np.argpartition(price - table, count - 1, axis=1)[:, :count]  # [studies, count]
        real = np.isfinite(np.take_along_axis(table, best, axis=1))
        chosen = np.bincount(best[real], minlength=len(names))
        surplus = chosen / max(chosen.mean(), 1.0) - 1.0
        price = np.clip(price + 0.2 / (1 + step / 5) * surplus, -CONFLICT / 2, CONFLICT / 2)
    return dict(zip(names, map(float, price), strict=True))

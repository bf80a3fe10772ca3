"""Which diseases a report is rewritten towards: near in the graph, told by the same words,
plausible, reproducible."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set
from functools import lru_cache

import numpy as np

from cpo_fast.counterfactual.graph.wording import TARGET_WORDINGS
from cpo_fast.counterfactual.seeding import hash_seed
from cpo_fast.types import ConceptGraph, Labels

NEARNESS, DRIFT, STATED, CONFLICT, CHANCE = 1.0, 1.0, 0.1, 0.5, 0.5
"""Weights of the score: attributes shared with a present disease; how prone the wording of the
report is to drift to the target (`drift_proneness`); the report speaks of the target;
a present disease or the anatomy told excludes it; a draw by seed and study, which spreads targets
where nothing else decides."""


@lru_cache(maxsize=4)
def nearness(graph: ConceptGraph) -> dict[tuple[str, str], float]:
    """Jaccard index of the associated attributes of each pair of diseases."""
    rows = {name: frozenset(d.associations) for name, d in graph.diseases.items()}
    return {(a, b): len(rows[a] & rows[b]) / len(rows[a] | rows[b]) for a in rows for b in rows}


def drift_proneness(graph: ConceptGraph, asserted: Collection[str]) -> dict[str, float]:
    """How far the attributes that a report asserts speak for each disease, 0 to 1.

    A reader who knows the graph alone takes one of the attributes and guesses among the diseases
    that show it; the value is the chance that the guess is this disease. Where it is high for a
    disease that is absent, the same words carry two diagnoses, and a small change of them can move
    a model from one to the other. All 0 where the report asserts no attribute.
    """
    shown_by = _diseases_by_attribute(graph)
    told = [shown_by[name] for name in asserted if shown_by.get(name)]
    return {
        disease: sum(1 / len(names) for names in told if disease in names) / max(len(told), 1)
        for disease in graph.diseases
    }


@lru_cache(maxsize=4)
def _diseases_by_attribute(graph: ConceptGraph) -> dict[str, frozenset[str]]:
    """The diseases with which each attribute is associated."""
    diseases = graph.diseases.items()
    return {
        attribute: frozenset(name for name, d in diseases if attribute in d.associations)
        for attribute in graph.attributes
    }


def list_candidates(graph: ConceptGraph, labels: Labels) -> list[str]:
    """Diseases of the graph that have wordings and are neither present nor uncertain in `labels`,
    nor implied by a present one."""
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
    """Each possible target of a study and how relevant it is.

    `labels` say what is present, `stated` what the text says (a denied disease is spoken of),
    `asserted` holds the attributes that it asserts, `against` names the diseases whose anatomy the
    text contradicts. Depends on the seed, the study id and the text and labels of the study alone,
    so that any shard finds the same.
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
    """The `count` best targets after their prices (fewer where there are no more), best first."""
    return sorted(scores, key=lambda n: scores[n] - prices.get(n, 0.0), reverse=True)[:count]


def balance_prices(
    scores: Iterable[Mapping[str, float]], count: int, *, rounds: int = 60
) -> dict[str, float]:
    """A price for each disease that makes all of them targets about equally often.

    `scores` are those of every study of the data set (held as one row of numbers each). A disease
    that is chosen too often grows dearer, one chosen too seldom cheaper, in ever smaller steps; no
    price passes `CONFLICT`, so that a target which the anatomy contradicts is not forced. The
    outcome depends on the data set, `count` and the seed behind the scores, not on the shard.
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

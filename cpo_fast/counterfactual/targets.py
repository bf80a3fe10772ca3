"""Which diseases a report is rewritten towards: near in the graph, plausible, reproducible."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence, Set
from functools import lru_cache

from cpo_fast.counterfactual.lexicon import GraphKey
from cpo_fast.counterfactual.wording import WORDINGS
from cpo_fast.types import ConceptGraph, Labels

NEARNESS, STATED, CONFLICT, CHANCE = 1.0, 0.1, 0.5, 0.5
"""Weights of the score: attributes shared with a present disease; the report speaks of the target;
a present disease or the anatomy told excludes it; a draw by seed and study, which spreads targets
where nothing else decides."""


def draw(seed: int, *names: str) -> int:
    """A whole number of 64 bits that depends on the seed and the names alone."""
    digest = hashlib.blake2b("\x1f".join((str(seed), *names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


@lru_cache(maxsize=4)
def _nearness(key: GraphKey) -> dict[tuple[str, str], float]:
    """Jaccard index of the associated attributes of each pair of diseases."""
    rows = {name: frozenset(d.associations) for name, d in key.graph.diseases.items()}
    return {(a, b): len(rows[a] & rows[b]) / len(rows[a] | rows[b]) for a in rows for b in rows}


def candidates(graph: ConceptGraph, labels: Labels) -> list[str]:
    """Diseases of the graph that have wordings and are neither present nor uncertain in `labels`,
    nor implied by a present one."""
    taken = {name for name, value in labels.items() if value in (1, -1)}
    present = [name for name, value in labels.items() if value == 1 and name in graph.diseases]
    for name in present:
        taken.update(graph.network.nodes[name]["implies"])
    return [name for name in graph.diseases if name in WORDINGS and name not in taken]


def choose_targets(
    graph: ConceptGraph,
    study_id: str,
    labels: Labels,
    stated: Labels,
    against: Set[str],
    count: int,
    seed: int,
) -> list[str]:
    """The `count` most relevant targets of a study (fewer where the graph has no more), best first.

    `labels` say what is present, `stated` what the text says (a denied disease is spoken of),
    `against` names the diseases whose anatomy the text contradicts. Depends on
    the seed, the study id and the labels alone, so that any shard chooses the same.
    """
    near = _nearness(GraphKey(graph))
    present = [name for name, value in labels.items() if value == 1 and name in graph.diseases]

    def score(name: str) -> float:
        nearest = max((near[name, other] for other in present), default=0.0)
        conflict = name in against or any(labels.get(o) in (1, -1) for o in graph.excluded[name])
        chance = draw(seed, study_id, name) / 2.0**64
        named = stated.get(name) == 0
        return NEARNESS * nearest + STATED * named - CONFLICT * conflict + CHANCE * chance

    ranked: Sequence[str] = sorted(candidates(graph, labels), key=score, reverse=True)
    return list(ranked[:count])

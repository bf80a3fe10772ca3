"""Mine a corpus for evidence on the edges of the graph, and propose new edges for review.

Each report yields the diseases and attributes that it asserts (cues of denial and doubt as in the
labeller, phrases from the graph file). Pair counts over the corpus give pointwise mutual
information and two one-sided Fisher tests, for co-occurrence and for exclusion. The graph is not
changed: weights are added to its edges, proposals are listed with their evidence.
"""

from __future__ import annotations

import math
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations, islice
from multiprocessing import get_context
from typing import Any

import numpy as np

from cpo_fast.concepts.graph import compile_phrases, find_relation, graph_from_json
from cpo_fast.concepts.labeller import STRENGTH, find_mentions, split_sentences
from cpo_fast.concepts.labeller_scope import judge
from cpo_fast.errors import DataError
from cpo_fast.types import ConceptGraph

_WORD = re.compile(r"\w+")

CHUNK = 500
"""Reports per task of a worker."""


@dataclass
class Counts:
    """Number of reports: total, per asserted, uncertain or denied node, and per asserted pair."""

    reports: int = 0
    nodes: Counter[str] = field(default_factory=Counter)
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)
    uncertain: Counter[str] = field(default_factory=Counter)
    denied: Counter[str] = field(default_factory=Counter)

    def add(self, other: Counts) -> None:
        self.reports += other.reports
        for name in ("nodes", "pairs", "uncertain", "denied"):
            getattr(self, name).update(getattr(other, name))


@dataclass(frozen=True)
class Edge:
    """Evidence for one pair: reports with both, expectation by chance, PMI and p-values."""

    left: str
    right: str
    relation: str
    together: int
    expected: float
    pmi: float  # log2(together / expected), -inf if never together
    p_association: float
    p_exclusion: float

    def to_json(self) -> dict[str, Any]:
        row = {name: getattr(self, name) for name in self.__dataclass_fields__}
        row["pmi"] = self.pmi if math.isfinite(self.pmi) else None
        return row


class Miner:
    """Finds mentions of the nodes of a graph; results are cached per sentence."""

    def __init__(self, graph: ConceptGraph) -> None:
        self._patterns = {k: compile_phrases(a.phrases) for k, a in graph.attributes.items()}
        nodes = graph.network.nodes
        denials = {k: nodes[k]["negated"] for k in graph.attributes if nodes[k]["negated"]}
        self._denials = {k: compile_phrases(phrases) for k, phrases in denials.items()}
        self._by_word = _by_first_word(
            {k: (*a.phrases, *denials.get(k, ())) for k, a in graph.attributes.items()}
        )
        self._diseases = frozenset(graph.diseases)
        self._sentence = lru_cache(maxsize=1 << 17)(self._find)

    def _find(self, sentence: str) -> tuple[tuple[str, int], ...]:
        found = [m for m in find_mentions(sentence) if m[0] in self._diseases]
        words = {"", *_WORD.findall(sentence)} & self._by_word.keys()
        keys = set[str]().union(*(self._by_word[word] for word in words))
        if not keys:
            return tuple(found)
        for key, pattern in self._patterns.items():
            for match in pattern.finditer(sentence) if key in keys else ():
                found.append((key, judge(sentence, match.start(), match.end())))
        for key, pattern in self._denials.items():
            for match in pattern.finditer(sentence) if key in keys else ():
                if judge(sentence, match.start(), match.end()) == 1:
                    found.append((key, 0))
        return tuple(found)

    def mentions(self, text: str) -> dict[str, int]:
        """Node -> 1 asserted, -1 uncertain, 0 denied, for the nodes mentioned in a report."""
        best: dict[str, int] = {}
        for sentence in split_sentences(text):
            for key, value in self._sentence(sentence):
                if STRENGTH[value] > STRENGTH[best.get(key)]:
                    best[key] = value
        return best

    def count(self, texts: Iterable[str]) -> Counts:
        """Count over report texts."""
        out = Counts()
        for text in texts:
            out.reports += 1
            found = self.mentions(text)
            asserted = sorted(key for key, value in found.items() if value == 1)
            out.nodes.update(asserted)
            out.pairs.update(combinations(asserted, 2))
            out.uncertain.update(key for key, value in found.items() if value == -1)
            out.denied.update(key for key, value in found.items() if value == 0)
        return out


def _by_first_word(phrases: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    """First word of a phrase -> nodes with such phrases; "" if a phrase does not start with a
    word."""
    found: dict[str, set[str]] = {}
    for key, several in phrases.items():
        for phrase in several:
            word = _WORD.match(phrase.lower().strip())
            found.setdefault(word.group() if word else "", set()).add(key)
    return found


_worker: Miner


def _start_worker(graph_json: Mapping[str, Any]) -> None:
    global _worker
    _worker = Miner(graph_from_json(graph_json))


def _count_chunk(texts: list[str]) -> Counts:
    return _worker.count(texts)


def mine(graph_json: Mapping[str, Any], texts: Iterable[str], workers: int = 1) -> Counts:
    """Count over a stream of report texts with `workers` processes; the result does not depend on
    their number. Raises DataError if a process dies."""
    total = Counts()
    if workers <= 1:
        total.add(Miner(graph_from_json(graph_json)).count(texts))
        return total
    waiting: deque[Future[Counts]] = deque()
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (graph_json,)) as pool:
        try:
            for chunk in _chunks(texts):
                waiting.append(pool.submit(_count_chunk, chunk))
                if len(waiting) > 4 * workers:  # limits the number of reports in memory
                    total.add(waiting.popleft().result())
            for future in waiting:
                total.add(future.result())
        except BrokenProcessPool as error:
            raise DataError("a mining process died; use fewer --workers") from error
    return total


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    stream = iter(texts)
    while chunk := list(islice(stream, CHUNK)):
        yield chunk


def collect_evidence(graph: ConceptGraph, counts: Counts) -> list[Edge]:
    """An `Edge` for each pair of disease and attribute, and of two diseases, that both occur."""
    pairs = [(d, a) for d in graph.diseases for a in graph.attributes]
    pairs += combinations(graph.diseases, 2)
    pairs = [pair for pair in pairs if all(counts.nodes[node] for node in pair)]
    together = [counts.pairs[min(pair), max(pair)] for pair in pairs]
    a, b = ([counts.nodes[pair[side]] for pair in pairs] for side in (0, 1))
    edges = []
    for (left, right), n_both, n_left, n_right, below, above in zip(
        pairs, together, a, b, *fisher(together, a, b, counts.reports), strict=True
    ):
        expected = n_left * n_right / counts.reports
        pmi = math.log2(n_both / expected) if n_both else -math.inf
        relation = find_relation(graph, left, right)
        edges.append(Edge(left, right, relation, n_both, expected, pmi, above, below))
    return edges


def fisher(
    together: Sequence[int], a: Sequence[int], b: Sequence[int], n: int
) -> tuple[list[float], list[float]]:
    """(P(X <= together), P(X >= together)) per pair, the one-sided p-values of Fisher's exact test.

    X is hypergeometric: reports with both nodes if `a` and `b` of `n` reports assert each.
    """
    from scipy.stats import hypergeom

    at = np.asarray(together)
    return hypergeom.cdf(at, n, b, a).tolist(), hypergeom.sf(at - 1, n, b, a).tolist()


def propose_changes(
    edges: Iterable[Edge], *, confidence: float = 0.999, min_pmi: float = 1.0, min_reports: int = 5
) -> list[dict[str, Any]]:
    """Changes supported by the evidence, strongest first, for review by a radiologist.

    "add association": an irrelevant pair with at least `min_reports` reports and a PMI of at least
    `min_pmi`. "add exclusion": an irrelevant or associated pair, expected in at least `min_reports`
    reports, with a PMI of at most -`min_pmi`. "doubt exclusion": an excluded pair that co-occurs
    more often than by chance. All at the given confidence with Bonferroni correction for the number
    of pairs.
    """
    rows = list(edges)
    limit = (1 - confidence) / max(len(rows), 1)
    found = []
    for edge in rows:
        if edge.relation == "exclusion":
            change = "doubt exclusion" if edge.p_association < limit else ""
        elif edge.expected >= min_reports and edge.p_exclusion < limit and edge.pmi <= -min_pmi:
            change = "add exclusion"
        elif edge.relation == "irrelevance" and edge.together >= min_reports:
            strong = edge.p_association < limit and edge.pmi >= min_pmi
            change = "add association" if strong else ""
        else:
            change = ""
        if change:
            found.append({"change": change, **edge.to_json()})
    return sorted(found, key=lambda row: min(row["p_association"], row["p_exclusion"]))


def add_weights(graph: ConceptGraph, edges: Iterable[Edge]) -> ConceptGraph:
    """A copy of the graph with `together`, `expected` and `pmi` of a corpus on its edges."""
    network = graph.network.copy()
    for edge in edges:
        if network.has_edge(edge.left, edge.right):
            network.edges[edge.left, edge.right].update(
                together=edge.together, expected=edge.expected, pmi=edge.to_json()["pmi"]
            )
    return ConceptGraph(
        graph.attributes, graph.diseases, graph.contradictions, graph.excluded, network
    )

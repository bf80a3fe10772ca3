"""Patterns that the rewriter searches for in a sentence, compiled from the concept graph.

For each target disease: the words whose denial denies the target (its names, its hallmarks, and
the diseases it is denied with), the attributes it excludes, and the kinds of normal statement that
contradict it. Nothing here is shared with the labeller that checks the results.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from cpo_fast.concepts.graph import compile_phrases
from cpo_fast.types import ConceptGraph

# Normal statements that contradict a target. Counted on Open-I (observed / expected number of
# reports with the statement and an asserted finding): lungs clear with consolidation 0/13, edema
# 2/42, pneumonia 1/28, pneumothorax 0/9. A statement about an organ always contradicts a disease
# of that organ. Lungs clear with effusion 9/57, emphysema 12/43 or an enlarged heart 51/121 is
# less frequent than expected but occurs, and is kept.
CONTRADICTED_TOPICS: dict[str, frozenset[str]] = {
    "Atelectasis": frozenset({"lungs", "inflation"}),
    "Cardiomegaly": frozenset({"heart", "cardiomediastinum"}),
    "Consolidation": frozenset({"lungs"}),
    "Edema": frozenset({"lungs", "vessels"}),
    "Emphysema": frozenset({"inflation"}),
    "Enlarged Cardiomediastinum": frozenset({"mediastinum", "cardiomediastinum"}),
    "Lung Lesion": frozenset({"lungs"}),
    "Lung Opacity": frozenset({"lungs"}),
    "Pleural Effusion": frozenset({"pleura", "sulci"}),
    "Pleural Other": frozenset({"pleura"}),
    "Pneumonia": frozenset({"lungs"}),
    "Pneumothorax": frozenset({"lungs", "pleura", "inflation"}),
}

_AIRSPACE = (
    r"air ?space|alveolar|opaci\w*|focal (?:lung|pulmonary|process)|parenchymal|infiltrat\w*"
)
_MORE_DENIED: dict[str, str] = {
    "Atelectasis": r"volume loss|loss of volume|atelect\w*",
    "Cardiomegaly": r"(?:heart|cardiac) (?:size )?enlargement|cardiac decompensation",
    "Consolidation": rf"consolid\w*|{_AIRSPACE}",
    "Edema": r"o?edema|congest\w*|failure|engorge\w*|interstitial (?:process|disease)|kerley|"
    r"redistribution",
    "Emphysema": r"hyperinfl\w*|hyperexp\w*|emphysem\w*|air trapping|copd",
    "Enlarged Cardiomediastinum": r"mediastinal|widen\w*",
    "Lung Lesion": r"nodul\w*|mass(?:es)?\b|malignan\w*|neoplas\w*|tumou?rs?|metasta\w*|suspicious|"
    r"granuloma\w*|(?<!destructive )(?<!bony )(?<!osseous )lesions?",
    "Lung Opacity": _AIRSPACE,
    "Pleural Effusion": r"(?<!pericardial )(?<!joint )effusions?|pleural (?:or|and) pericardial|"
    r"ha?emothora\w*|pleural fluid|blunting|free fluid|"
    r"fluid collections?|pleural (?:disease|abnormalit\w+|space)",
    "Pleural Other": r"pleural(?! effusion| fluid| air)|effusions? or thickening",
    "Pneumonia": rf"pneumoni\w+|infecti\w+|consolid\w*|{_AIRSPACE}",
    "Pneumothorax": r"pneumo ?thora\w*|pleural air|pleural (?:disease|abnormalit\w+)",
}
"""Words whose denial denies the target, in addition to its names and hallmarks in the graph."""


@dataclass(frozen=True, eq=False)
class Lexicon:
    """Patterns for one target, over lower-case text. Hashed by identity, for speed."""

    target: str
    denied: re.Pattern[str]
    excluded: re.Pattern[str] | None
    excluded_here: re.Pattern[str] | None  # excluded only on the side of the target
    topics: frozenset[str]
    acute: bool


def get_lexicon(graph: ConceptGraph, target: str) -> Lexicon:
    """The lexicon of `target`, compiled once per graph."""
    return _lexicons(graph)[target]


@lru_cache(maxsize=4)
def _lexicons(graph: ConceptGraph) -> dict[str, Lexicon]:
    return {name: _compile(graph, name) for name in graph.diseases}


def _compile(graph: ConceptGraph, target: str) -> Lexicon:
    nodes = graph.network.nodes
    denied: set[str] = set()
    for name in (target, *nodes[target]["denied_with"]):
        denied.update(nodes[name]["synonyms"])
    for attribute in graph.diseases[target].hallmarks:
        denied.update(graph.attributes[attribute].phrases)
    everywhere: set[str] = set()
    here: set[str] = set()
    for attribute in graph.diseases[target].exclusions:
        regional = graph.network.edges[target, attribute]["scope"] == "region"
        (here if regional else everywhere).update(graph.attributes[attribute].phrases)
    for hallmark in graph.diseases[target].hallmarks:
        for other in graph.network.neighbors(hallmark):
            edge = graph.network.edges[hallmark, other]
            if edge["relation"] == "contradiction" and edge["scope"] == "patient":
                everywhere.update(graph.attributes[other].phrases)
    for disease in graph.excluded[target]:
        everywhere.update(nodes[disease]["synonyms"])
    extra = _MORE_DENIED.get(target, "")
    named = compile_phrases(sorted(denied)).pattern
    return Lexicon(
        target=target,
        denied=re.compile(f"{named}|\\b(?:{extra})" if extra else named),
        excluded=compile_phrases(sorted(everywhere)) if everywhere else None,
        excluded_here=compile_phrases(sorted(here)) if here else None,
        topics=CONTRADICTED_TOPICS.get(target, frozenset()),
        acute=nodes[target]["course"] == "acute",
    )

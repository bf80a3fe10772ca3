"""Checks of a counterfactual, whatever its generator, by a labeller without shared phrases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from cpo_fast.concepts.labeller import (
    find_clear_side,
    find_mentions,
    find_opposed,
    find_ruled_out,
    split_sentences,
)
from cpo_fast.counterfactual.assertions import compare, exempts_other
from cpo_fast.counterfactual.prompt import find_leaks
from cpo_fast.types import ConceptGraph, Report

MIN_LENGTH, MAX_LENGTH, LENGTH_ALLOWANCE = 0.35, 2.0, 160
"""Limits of the counterfactual's length relative to the original, and characters of allowance."""

MAX_EDITED, EDIT_ALLOWANCE = 0.6, 16
"""Maximum share of changed words of the original, and words of allowance: a short normal report can
change almost entirely, a long one keeps two words in five."""

# A lung finding can also be labelled as an opacity, and pneumonia as a consolidation.
_IMPLIED_LABELS: dict[str, frozenset[str]] = {
    "Atelectasis": frozenset({"Lung Opacity"}),
    "Consolidation": frozenset({"Lung Opacity"}),
    "Edema": frozenset({"Lung Opacity"}),
    "Lung Lesion": frozenset({"Lung Opacity"}),
    "Pneumonia": frozenset({"Lung Opacity", "Consolidation"}),
}


class _SentenceLabels(NamedTuple):
    """Labels of a sentence: findings asserted, ruled out and opposed, and the lung called clear."""

    asserted: frozenset[str]
    out: frozenset[str]
    opposed: frozenset[str]
    clear: str


@lru_cache(maxsize=1 << 17)
def _read_sentence(line: str) -> _SentenceLabels:
    asserted = frozenset(name for name, value in find_mentions(line) if value == 1)
    return _SentenceLabels(
        asserted, find_ruled_out(line), find_opposed(line), find_clear_side(line)
    )


def _union_asserted(reads: Iterable[_SentenceLabels]) -> frozenset[str]:
    return frozenset[str]().union(*[read.asserted for read in reads])


@lru_cache(maxsize=1 << 12)
def _summarise_original(text: str) -> tuple[frozenset[str], frozenset[str], Counter[str], int]:
    """(sentences, asserted findings, word counts, number of words) of an original."""
    words, lines = text.lower().split(), split_sentences(text)
    return frozenset(lines), _union_asserted(map(_read_sentence, lines)), Counter(words), len(words)


_LUNG = frozenset(
    {"Atelectasis", "Consolidation", "Edema", "Lung Lesion", "Lung Opacity", "Pneumonia"}
)


def _has_side_conflict(lines: list[str], target: str) -> bool:
    """Whether a lung is called clear on the side of the target (Edema: on any side)."""
    if target not in _LUNG:
        return False
    clear = {read.clear for read in map(_read_sentence, lines)} - {""}
    if not clear:
        return False
    if target == "Edema":
        return True
    where = " ".join(s for s in lines if (target, 1) in find_mentions(s)).split()
    return any(side in where for side in clear) or not {"right", "left"} & set(where)


def _find_tied(text: str, gone: frozenset[str]) -> set[str]:
    """Findings asserted only together with a disease in `gone` ("opacity reflecting atelectasis"),
    which are removed with it."""
    free: set[str] = set()
    tied: set[str] = set()
    for line in split_sentences(text) if gone else ():
        names = _read_sentence(line).asserted
        (tied if names & gone else free).update(names)
    return tied - free


def _leaks(old: frozenset[str], lines: Iterable[str]) -> bool:
    new = frozenset[object]().union(*(find_leaks(s) for s in lines if s not in old))
    return bool(new) and not new <= frozenset[object]().union(*map(find_leaks, old))


def check(
    graph: ConceptGraph, original: Report, counterfactual: Report, target: str
) -> dict[str, bool]:
    """{check: passed} of a counterfactual towards `target`.

    differs (from the original), format (same sections), target (asserted in every section),
    no_denial (no sentence rules the target out), sides (no lung is called clear on the side of the
    target), no_exclusion (no finding excluded by the graph is asserted), survivors (all other
    asserted findings remain), nothing_else (only the target is new), assertions (all findings
    asserted in a clause of the original remain, found without the labeller), no_new_denial (none of
    them is denied), exemptions (the lungs are not called clear except for another finding), length,
    edits, no_leak (no words of a prompt or a chat).
    """
    before, after = original.text, counterfactual.text
    old_lines, old, words, count = _summarise_original(before)
    parts = [split_sentences(p) for p in (counterfactual.findings, counterfactual.impression) if p]
    lines = [line for part in parts for line in part]
    asserted = [_union_asserted(map(_read_sentence, part)) for part in parts]
    reads = [_read_sentence(line) for line in lines]
    new = _union_asserted(reads)
    gone = graph.excluded.get(target, frozenset())
    written = Counter(after.lower().split())
    changed = sum(max(number - written.get(word, 0), 0) for word, number in words.items())
    kept, undenied = compare(graph, target, split_sentences(before), lines)
    low = MIN_LENGTH * len(before) - LENGTH_ALLOWANCE
    high = MAX_LENGTH * len(before) + LENGTH_ALLOWANCE
    return {
        "differs": before.split() != after.split(),
        "format": bool(original.findings) == bool(counterfactual.findings)
        and bool(original.impression) == bool(counterfactual.impression),
        "target": bool(parts) and all(target in found for found in asserted),
        "no_denial": not any(target in read.out for read in reads),
        "sides": not _has_side_conflict(lines, target),
        "no_exclusion": not gone & new and not any(target in read.opposed for read in reads),
        "survivors": old - gone - new <= _find_tied(before, gone),
        "nothing_else": new - old <= {target} | _IMPLIED_LABELS.get(target, frozenset()),
        "assertions": kept,
        "no_new_denial": undenied,
        "exemptions": target not in _LUNG or not any(exempts_other(s, target) for s in lines),
        "length": low <= len(after) <= high,
        "edits": changed <= MAX_EDITED * count + EDIT_ALLOWANCE,
        "no_leak": not _leaks(old_lines, lines),
    }

"""A rule-based finding labeller: the 14 CheXpert labels and emphysema, from a report's own words.

A report is cut into sentences, sentences into mentions; each mention is asserted (1), denied (0)
or uncertain (-1) by the cues around it, and for the report positive beats uncertain beats
negative. Made to check counterfactuals and to label reports that come without labels; it shares no
phrase with the generator. Sentences are remembered, because reports repeat them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from cpo_fast.concepts.labeller_phrases import (
    CALLED_NORMAL,
    EXEMPTION,
    MENTIONS,
    NEGATION_AFTER,
    NEGATION_BEFORE,
    NORMALITY,
    ONE_SIDE,
    OPPOSED,
    PSEUDO_NEGATION,
    SCOPE_BREAK,
    UNCERTAIN_AFTER,
    UNCERTAIN_BEFORE,
    UNCERTAIN_BREAK,
    UNCERTAIN_INSIDE,
)
from cpo_fast.types import FINDINGS

LABELLED: tuple[str, ...] = (*FINDINGS, "Emphysema")
"""What `label_report` answers for."""

_MENTIONS = {
    name: re.compile("|".join(f"(?:{p})" for p in table)) for name, table in MENTIONS.items()
}
_CALLED_NORMAL = tuple((name, re.compile(p)) for name, p in CALLED_NORMAL)
_NORMALITY = tuple((re.compile(p), frozenset(f or MENTIONS)) for p, f in NORMALITY)
_OPPOSED = tuple((name, re.compile(p)) for name, p in OPPOSED)
_EXEMPTION = re.compile(EXEMPTION)
_ONE_SIDE = re.compile(ONE_SIDE)
_PRE_NEG = re.compile(NEGATION_BEFORE)
_INNER_NEG = re.compile(r"\bnot\b")
_INNER_UNC = re.compile(UNCERTAIN_INSIDE)
_POST_NEG = re.compile(NEGATION_AFTER)
_PRE_UNC = re.compile(UNCERTAIN_BEFORE)
_POST_UNC = re.compile(UNCERTAIN_AFTER)
_BREAK = re.compile(SCOPE_BREAK)
_DOUBT_BREAK = re.compile(UNCERTAIN_BREAK)
_PSEUDO = re.compile(PSEUDO_NEGATION)
_SENTENCE = re.compile(r"(?<=[.?!])\s+|\n\s*\n|\n(?=\s*(?:\d+[.)]|-)\s)|\s(?=\d{1,2}\. +[a-z])")
_ENUMERATOR = re.compile(r"^(?:findings:|impression:|\d{1,2}[.)]|-)\s*")


def sentences(text: str) -> list[str]:
    """`text` cut at full stops, blank lines and list marks; lower case, white space made single."""
    return list(_cut(text))


@lru_cache(maxsize=1 << 6)
def _cut(text: str) -> tuple[str, ...]:
    # Remembered for the moment: one report is read by several rules in a row.
    plain = [" ".join(part.split()) for part in _SENTENCE.split(text.lower())]
    return tuple([s for s in [_ENUMERATOR.sub("", part) for part in plain] if s])


@lru_cache(maxsize=1 << 17)
def sentence_mentions(sentence: str) -> tuple[tuple[str, int], ...]:
    """(finding, 1 | 0 | -1) for each mention in one lower-case sentence, in the order of
    `LABELLED`."""
    found: list[tuple[str, int]] = []
    calm = _calmed(sentence)
    for name, pattern in _MENTIONS.items():
        for match in pattern.finditer(sentence):
            found.append((name, _polarity(calm, match.start(), match.end())))
    return tuple(found)


@lru_cache(maxsize=1 << 17)
def called_normal(sentence: str) -> tuple[tuple[str, int], ...]:
    """(finding, 0) for each finding that a lower-case sentence denies by calling its organ
    normal."""
    calm = _calmed(sentence)
    return tuple((name, 0) for name, pattern in _CALLED_NORMAL if pattern.search(calm))


def polarity(sentence: str, start: int, end: int) -> int:
    """Whether what stands at start:end of a lower-case sentence is asserted (1), denied or
    doubted."""
    return _polarity(_calmed(sentence), start, end)


@lru_cache(maxsize=1 << 10)
def _calmed(sentence: str) -> str:
    """The sentence with words blanked that look like denials and are none ("no change")."""
    return _PSEUDO.sub(lambda m: "_" * len(m.group()), sentence)


def _polarity(sentence: str, start: int, end: int) -> int:
    before, after = sentence[:start], sentence[end:]
    if _INNER_UNC.search(sentence, start, end) or _POST_UNC.search(after):
        return -1
    if _reaches(_PRE_UNC, before, _DOUBT_BREAK):
        return -1
    denied = _INNER_NEG.search(sentence, start, end) or _POST_NEG.search(after)
    return 0 if denied or _reaches(_PRE_NEG, before, _BREAK) else 1


def _reaches(cue: re.Pattern[str], before: str, end: re.Pattern[str]) -> bool:
    """Whether some cue in `before` is followed by no word that ends its reach."""
    cues = list(cue.finditer(before))
    return bool(cues) and end.search(before, cues[-1].end()) is None


@lru_cache(maxsize=1 << 17)
def ruled_out(sentence: str) -> frozenset[str]:
    """Findings that a lower-case sentence denies: by name, or by a statement that all is normal
    there.

    A statement about one lung alone rules nothing out; see `clear_side`.
    """
    out = {name for name, polarity in sentence_mentions(sentence) if polarity == 0}
    if clear_side(sentence) or _EXEMPTION.search(sentence):
        return frozenset(out)
    for pattern, findings in _NORMALITY:
        if pattern.search(sentence):
            out |= findings
    return frozenset(out)


def clear_side(sentence: str) -> str:
    """ "right" or "left" where a lower-case sentence calls that lung alone clear, else ""."""
    match = _ONE_SIDE.search(sentence)
    return (match.group(1) or match.group(2)) if match else ""


def label_report(text: str) -> dict[str, int | None]:
    """Labels of a report: name -> 1 present, 0 absent, -1 uncertain, None not mentioned.

    Positive beats uncertain beats negative. "No Finding" is 1 where nothing but support devices is
    present or uncertain, else None. Source of the scheme: Irvin et al. 2019, arXiv 1901.07031.
    """
    lines = sentences(text)
    return merge_labels([*map(sentence_mentions, lines), *map(called_normal, lines)])


def merge_labels(mentions: Iterable[tuple[tuple[str, int], ...]]) -> dict[str, int | None]:
    """Labels of a report from the mentions of its sentences."""
    labels: dict[str, int | None] = dict.fromkeys(LABELLED)
    rank = {None: 0, 0: 1, -1: 2, 1: 3}
    for sentence in mentions:
        for name, polarity in sentence:
            if rank[polarity] > rank[labels[name]]:
                labels[name] = polarity
    quiet = all(
        labels[n] not in (1, -1) for n in LABELLED if n not in ("No Finding", "Support Devices")
    )
    labels["No Finding"] = 1 if quiet else None
    return labels


@lru_cache(maxsize=1 << 17)
def opposed(sentence: str) -> frozenset[str]:
    """Findings whose anatomy a lower-case sentence contradicts by what it asserts (volume,
    vessels)."""
    calm = _calmed(sentence)
    return frozenset(
        name
        for name, pattern in _OPPOSED
        for match in pattern.finditer(sentence)
        if _polarity(calm, match.start(), match.end()) == 1
    )

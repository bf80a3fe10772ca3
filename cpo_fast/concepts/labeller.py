"""A rule-based finding labeller: the 14 CheXpert labels and emphysema, from report text.

The mentions of each sentence are asserted (1), denied (0) or uncertain (-1), depending on the cues
around them. For the report, positive overrides uncertain overrides negative. The labeller checks
counterfactuals and labels reports without labels; it shares no phrases with the generator. Results
are cached per sentence, since reports repeat sentences.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from cpo_fast.concepts.labeller_phrases import (
    CALLED_NORMAL,
    EXEMPTION,
    MENTIONS,
    NORMALITY,
    ONE_SIDE,
    OPPOSED,
    STEMS,
)
from cpo_fast.concepts.labeller_scope import judge
from cpo_fast.types import FINDINGS

LABELLED: tuple[str, ...] = (*FINDINGS, "Emphysema")
"""The labels of `label_report`."""

STRENGTH: dict[int | None, int] = {None: 0, 0: 1, -1: 2, 1: 3}
"""Rank of a label: positive overrides uncertain overrides negative."""

_MENTIONS = {
    name: re.compile("|".join(f"(?:{p})" for p in table)) for name, table in MENTIONS.items()
}
_CALLED_NORMAL = tuple((name, re.compile(p)) for name, p in CALLED_NORMAL)
_NORMALITY = tuple((re.compile(p), frozenset(f or MENTIONS)) for p, f in NORMALITY)
_OPPOSED = tuple((name, re.compile(p)) for name, p in OPPOSED)
_EXEMPTION = re.compile(EXEMPTION)
_ONE_SIDE = re.compile(ONE_SIDE)
_SENTENCE = re.compile(
    r"(?<=[.?!])(?<!\bvs\.)\s+|\n\s*\n|\n(?=\s*(?:\d+[.)]|-)\s)|"
    r"\s(?=\d{1,2}\. +[a-z]|\d{1,2}\.[a-z]{2}|\d{1,2}\) +[a-z])"
)
_WITH = re.compile(r"\bw/(?!o\b)\s*")
_ANSWER = re.compile(
    r"\s*\?\s+(?=(?:no|none|absent|negative|nil|yes|present)\b\s*(?:[.;!?]|$))", re.MULTILINE
)
_ENUMERATOR = re.compile(r"^(?:findings:|impression:|\d{1,2}[.)](?!\d)|-)\s*")


def split_sentences(text: str) -> list[str]:
    """Split `text` at full stops, blank lines and list marks; lower case, single spaces."""
    return list(_split_cached(text))


@lru_cache(maxsize=1 << 10)
def _split_cached(text: str) -> tuple[str, ...]:
    # Cached since several rules read the same report in succession.
    text = text.lower()
    if "w/" in text:
        text = _WITH.sub("with ", text)
    if "?" in text:
        text = _ANSWER.sub(": ", text)
    plain = [" ".join(part.split()) for part in _SENTENCE.split(text)]
    return tuple([s for s in [_ENUMERATOR.sub("", part) for part in plain] if s])


@lru_cache(maxsize=1 << 17)
def find_mentions(sentence: str) -> tuple[tuple[str, int], ...]:
    """(finding, 1 | 0 | -1) for each mention in a lower-case sentence."""
    found: list[tuple[str, int]] = []
    for name, pattern in _MENTIONS.items():
        if not any(map(sentence.__contains__, STEMS.get(name, ("",)))):
            continue
        for match in pattern.finditer(sentence):
            found.append((name, judge(sentence, match.start(), match.end())))
    return tuple(found)


@lru_cache(maxsize=1 << 17)
def find_called_normal(sentence: str) -> tuple[tuple[str, int], ...]:
    """(finding, 0) for each finding denied by a normal statement in a lower-case sentence."""
    return tuple((name, 0) for name, pattern in _CALLED_NORMAL if pattern.search(sentence))


@lru_cache(maxsize=1 << 17)
def find_ruled_out(sentence: str) -> frozenset[str]:
    """Findings that a lower-case sentence denies, by name or by a normal statement.

    A statement about one lung rules nothing out; see `find_clear_side`.
    """
    out = {name for name, polarity in find_mentions(sentence) if polarity == 0}
    if find_clear_side(sentence) or _EXEMPTION.search(sentence):
        return frozenset(out)
    for pattern, findings in _NORMALITY:
        if pattern.search(sentence):
            out |= findings
    return frozenset(out)


def find_clear_side(sentence: str) -> str:
    """The side ("right" or "left") that a lower-case sentence calls clear, if only one, else ""."""
    match = _ONE_SIDE.search(sentence)
    return (match.group(1) or match.group(2)) if match else ""


def label_report(text: str) -> dict[str, int | None]:
    """Labels of a report: name -> 1 present, 0 absent, -1 uncertain, None not mentioned.

    Positive overrides uncertain overrides negative. "No Finding" is 1 if only support devices are
    present or uncertain, else None. Scheme: Irvin et al. 2019, arXiv 1901.07031.
    """
    lines = split_sentences(text)
    return merge_labels([*map(find_mentions, lines), *map(find_called_normal, lines)])


def merge_labels(mentions: Iterable[tuple[tuple[str, int], ...]]) -> dict[str, int | None]:
    """Labels of a report, merged from the mentions of its sentences."""
    labels: dict[str, int | None] = dict.fromkeys(LABELLED)
    for sentence in mentions:
        for name, polarity in sentence:
            if STRENGTH[polarity] > STRENGTH[labels[name]]:
                labels[name] = polarity
    quiet = all(
        labels[n] not in (1, -1) for n in LABELLED if n not in ("No Finding", "Support Devices")
    )
    labels["No Finding"] = 1 if quiet else None
    return labels


@lru_cache(maxsize=1 << 17)
def find_opposed(sentence: str) -> frozenset[str]:
    """Findings that contradict the anatomy (volume, vessels) asserted in a lower-case sentence."""
    return frozenset(
        name
        for name, pattern in _OPPOSED
        for match in pattern.finditer(sentence)
        if judge(sentence, match.start(), match.end()) == 1
    )

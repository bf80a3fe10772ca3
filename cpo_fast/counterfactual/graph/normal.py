"""Normal statements: "heart size and pulmonary vascularity are normal"."""

from __future__ import annotations

import re

from cpo_fast.counterfactual.graph.clauses import FRAGMENT, ITEM, VERB, find_sides
from cpo_fast.counterfactual.graph.grammar import agree, capitalise_like, is_plural, join_items
from cpo_fast.counterfactual.graph.lexicon import Lexicon

_NORMAL = (
    r"(?:normal|within (?:the )?(?:\w+ ){0,2}limits(?: of normal)?|unremarkable|clear(?! (?:of|"
    r"from|space)\b)|not (?:\w+ )?(?:enlarged|engorged|congested|widened|increased)|"
    r"(?:at )?(?:the )?upper limits of normal|top[- ]normal|borderline|of normal|(?:well[- ]|"
    r"normally |fully )?(?:expanded|inflated|aerated)|"
    r"sharp)\b"
)
_POST = re.compile(
    rf"^(?P<subject>.+?)(?P<verb>\s+{VERB})?(?P<adverb>(?:\s+(?:both|all|grossly|again|also|"
    rf"still|within|now|"
    rf"stable|clear|normal|are|is|appear|and|at|in|to be|otherwise|borderline|probably|mildly))*?)"
    rf"\s+(?P<predicate>{_NORMAL}.*)$"
)
_PRE = re.compile(
    r"^(?P<predicate>(?:there (?:is|are) )?(?:grossly |essentially |well[- ]expanded and |"
    r"well[- ]inflated and )?"
    r"(?:normal(?:[- ]sized)?|unremarkable|clear(?! (?:of|from)\b)|borderline|"
    r"top normal))(?P<adverb>(?: appearing| appearance of| size of| size)?(?: the)?)"
    r"\s+(?P<subject>.+)$"
)
_VERBAL = re.compile(r"\b(?:shows?|demonstrates?|reveals?|is|are|was|were|has|have|seen|noted)\b")
INFLATED = re.compile(r"\b(?:expanded|inflated|aerated)\b")
TOPICS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "cardiomediastinum",
        re.compile(r"cardio ?-?mediastin|cardiac and mediastin|cardio ?pericard"),
    ),
    ("vessels", re.compile(r"vascul|vessels")),
    ("mediastinum", re.compile(r"mediastin")),
    ("heart", re.compile(r"\bheart|\bcardiac|\bcardio")),
    ("inflation", re.compile(r"lung volumes?|inflation|aeration|expansion")),
    ("sulci", re.compile(r"costophrenic|sulci|\bcp angles")),
    ("pleura", re.compile(r"pleura")),
    ("lungs", re.compile(r"\blungs?\b|parenchyma|airspaces?|\bhemithora")),
)


def edit_normal(clause: str, lex: Lexicon, where: frozenset[str]) -> str | None:
    """Remove the subjects that the target contradicts from a normal statement; None for another
    kind of clause."""
    lower = clause.lower()
    match = _PRE.match(lower)
    prefix = match is not None
    if match is None:
        match = _POST.match(lower)
    if match is None:
        return None
    start, stop = match.span("subject")
    subject = clause[start:stop]
    predicate = match.group("predicate") + " " + (match.group("adverb") or "")
    if (
        re.search(r"\b(?:no|without|not|however|but)\b", subject.lower())
        or len(subject.split()) > 16
    ):
        return None
    if _VERBAL.search(subject.lower()) or re.search(r" The\b", subject):
        return "" if _is_contradicted(subject, predicate, lex, where) else None
    separators = ITEM.findall(subject)
    items = [item.strip() for item in ITEM.split(subject)]
    bad = [_is_contradicted(item, predicate, lex, where) for item in items]
    if not any(bad):
        return None if _names_target(lower, lex) else clause
    kept = [item for item, hit in zip(items, bad, strict=True) if not hit]
    if any(re.fullmatch(r"(?:size|contours?|configuration)", item.lower()) for item in kept):
        return ""
    if not kept or all(
        _find_topic(item) == "other" and FRAGMENT.match(item.lower()) for item in kept
    ):
        return ""
    if bad[-1] and re.fullmatch(
        r"(?:the )?(?:cardiac|mediastinal|hilar|pulmonary|cardio)", kept[-1].lower()
    ):
        kept[-1] += " " + items[-1].split()[-1]
    if re.fullmatch(r"(?:the )?(?:cardiac|mediastinal|hilar|pulmonary|aortic)", kept[-1].lower()):
        return ""
    if (
        re.search(r"\bboth\b|\bsize\b", match.group("adverb") or "")
        or "otherwise" in subject.lower()
    ):
        return ""
    word = next((w for w in (re.search(r"and|or", s) for s in reversed(separators)) if w), None)
    if (
        bad[0]
        and re.match(r"the\s", items[0].lower())
        and not kept[0].lower().startswith(("the ", "xxxx"))
    ):
        kept[0] = "the " + kept[0]
    joined = join_items(
        kept, word.group() if word else "and", any("," in s and "and" in s for s in separators)
    )
    several = len(kept) > 1 or is_plural(kept[0])
    if prefix:
        return clause[:start] + joined
    return capitalise_like(clause, joined) + agree(clause[stop:], several)


def _is_contradicted(subject: str, predicate: str, lex: Lexicon, where: frozenset[str]) -> bool:
    topic = _find_topic(subject)
    named = find_sides(subject.lower())
    if named and where and not named & where:
        return False
    if "otherwise" in predicate:
        return False
    if topic == "lungs" and "inflation" in lex.topics and INFLATED.search(predicate):
        return True
    if topic == "lungs" and not re.search(r"\b(?:clear|normal|unremarkable)\b", predicate):
        return False
    if topic == "lungs" and "inflation" in lex.topics and re.search(r"^\s*normal\b", predicate):
        return True
    return topic in lex.topics


def _find_topic(subject: str) -> str:
    lower = subject.lower()
    return next((name for name, pattern in TOPICS if pattern.search(lower)), "other")


def _names_target(lower: str, lex: Lexicon) -> bool:
    return bool(
        lex.denied.search(lower) or (lex.excluded is not None and lex.excluded.search(lower))
    )

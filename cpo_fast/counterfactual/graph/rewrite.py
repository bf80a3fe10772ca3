"""Rewrite a report towards a target by small edits along the concept graph.

Sentences that deny or exclude the target are trimmed or dropped. The target is asserted once in
the findings and once in the impression, in place of the text it replaces. All other text is kept
byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from cpo_fast.counterfactual.graph.clauses import find_sides
from cpo_fast.counterfactual.graph.edit import edit_sentence
from cpo_fast.counterfactual.graph.lexicon import Lexicon, get_lexicon
from cpo_fast.counterfactual.graph.text import (
    NEW_ITEM,
    Unit,
    is_upper_case,
    join_units,
    restore_first_mark,
    split_units,
)
from cpo_fast.counterfactual.graph.wording import TARGET_WORDINGS, Place, fill_template
from cpo_fast.counterfactual.seeding import hash_seed
from cpo_fast.types import ConceptGraph, Report

# Reported findings that determine the lobe, base or side of a new finding.
_ANCHORS: dict[str, str] = {
    "Atelectasis": r"opaci\w+|airspace disease|scar\w*|effusion",
    "Consolidation": r"opaci\w+|airspace disease|infiltrat\w*|pneumonia|atelectasis",
    "Lung Opacity": r"densit\w+|atelectasis|infiltrat\w*",
    "Pneumonia": r"opaci\w+|airspace disease|infiltrat\w*|consolidation|atelectasis",
    "Pleural Effusion": r"blunting|costophrenic|consolidation|thoracentesis|pleural thickening",
    "Pneumothorax": r"chest tube|rib fractures?|thoracostomy|pleural catheter",
    "Pleural Other": r"blunting|pleural|costophrenic",
    "Lung Lesion": r"densit\w+|opaci\w+",
}
_ANCHOR = {name: re.compile(rf"\b(?:{p})\b") for name, p in _ANCHORS.items()}
_DENIAL = re.compile(r"\b(?:no|without|not|clear|negative|resol\w+)\b")
_LOBE = re.compile(r"\b(right|left) (upper|middle|lower) lobe\b")
_BASE = re.compile(r"\b(?:(right|left)(?: lung)? bas\w+|(?:lung )?bases|bibasilar)\b")
_SIGNS = re.compile(
    r"hyperinflat|hyperexpan|hyperlucen|flatten|retrosternal|blunting|volume loss|crowding|"
    r"cardiomegaly|vascular congestion|infiltrate"
)
_CLEAR_SIDE = re.compile(
    r"\b(right|left) (?:lung|hemithorax)[^.;]*\bclear\b|\bclear (right|left) lung\b"
)
_ORGANS: dict[str, re.Pattern[str]] = {
    "Cardiomegaly": re.compile(r"heart|cardi|mediastin"),
    "Enlarged Cardiomediastinum": re.compile(r"mediastin|heart|cardi"),
    "Pleural Effusion": re.compile(r"effusion|pleural|pneumothora|costophrenic|lung"),
    "Pleural Other": re.compile(r"pleural|effusion|pneumothora|costophrenic|lung"),
    "Pneumothorax": re.compile(r"effusion|pleural|pneumothora|lung"),
}
_LUNGS = re.compile(r"\blungs?\b|consolid|opaci|air ?space|infiltrat|pulmonary|lobe|basilar|inflat")

_OTHERWISE = re.compile(
    r"(?:^otherwise|\b(?:lungs?|parenchyma|chest|exam)\b.*\botherwise)\b.*"
    r"\b(?:clear|normal|unremarkable)\b(?!.*\b(?:mediastin|bon|oss|heart|cardi))"
)

_STOPS = (".", "?", "!", ":", ";", ",")
_Position = Callable[[list[Unit], int | None, str], int]


def rewrite(
    graph: ConceptGraph, report: Report, target: str, study_id: str, seed: int, attempt: int
) -> Report:
    """`report` as it would read with `target`. Each `attempt` (from 0) uses a different wording.

    Deterministic in its arguments. Raises KeyError for a target without wordings, AmbiguousError
    for a sentence that cannot be edited safely.
    """
    lex = get_lexicon(graph, target)
    wording = TARGET_WORDINGS[target]
    chance = hash_seed(seed, study_id, target, str(attempt))
    place = _choose_place(report, target, chance, attempt)
    size = wording.sizes[(chance >> 16) % len(wording.sizes)]
    both = len(place.sides) == 2
    sentences = wording.both if both else wording.one
    phrases = wording.impression_both if both else wording.impression_one
    sentence = fill_template(
        _choose_template(sentences, chance >> 24, report.findings.lower()), place, size
    )
    phrase = fill_template(phrases[(chance >> 32) % len(phrases)], place, size)
    capitals = is_upper_case(report.text)
    if capitals:
        sentence, phrase = sentence.upper(), phrase.upper()
    findings, impression = report.findings, report.impression
    if findings:
        findings = _rewrite_section(findings, lex, place.sides, sentence, _place_finding)
    if impression:
        impression = _rewrite_section(impression, lex, place.sides, phrase, _place_first)
    return Report(findings, impression)


def _choose_template(templates: tuple[str, ...], chance: int, findings: str) -> str:
    """Choose a template by `chance`, if possible one whose signs are not yet in `findings`."""
    fresh = [t for t in templates if not any(m in findings for m in _SIGNS.findall(t.lower()))]
    options = fresh or templates
    return options[chance % len(options)]


def _choose_place(report: Report, target: str, chance: int, attempt: int) -> Place:
    """A place for the target: that of a related finding, else one that is not called clear."""
    places = TARGET_WORDINGS[target].places
    if len(places) == 1:
        return places[0]
    anchored, clear = _find_places(report.findings + "\n" + report.impression, target)
    options = [p for p in places if p.place in anchored or p.zone in anchored]
    if options and attempt < 2:
        return options[chance % len(options)]
    free = [p for p in places if not p.sides & clear] or list(places)
    return free[chance % len(free)]


@lru_cache(maxsize=1 << 14)
def _find_places(text: str, target: str) -> tuple[frozenset[str], frozenset[str]]:
    """(places of findings related to the target, sides called clear) in a report text."""
    anchored: set[str] = set()
    clear: set[str] = set()
    anchor = _ANCHOR.get(target)
    for unit in split_units(text.lower()):
        body = unit.plain
        clear.update(
            side for match in _CLEAR_SIDE.finditer(body) for side in match.groups() if side
        )
        if anchor is None or _DENIAL.search(body) or not anchor.search(body):
            continue
        anchored.update(match.group() for match in _LOBE.finditer(body))
        for match in _BASE.finditer(body):
            side = match.group(1)
            anchored.update((f"{side} lung base", f"{side} lower lobe") if side else ("bibasilar",))
        named = find_sides(body)
        if len(named) == 1:
            anchored.add(next(iter(named)))
    return frozenset(anchored), frozenset(clear)


@lru_cache(maxsize=1 << 17)
def _edit_cached(sentence: str, lex: Lexicon, where: frozenset[str]) -> str:
    return edit_sentence(sentence, lex, where)


@lru_cache(maxsize=1 << 14)
def _plain_sentences(section: str) -> tuple[str, ...]:
    return tuple(unit.plain for unit in split_units(section))


def _rewrite_section(
    text: str, lex: Lexicon, where: frozenset[str], new: str, position: _Position
) -> str:
    units = split_units(text)
    out: list[Unit] = []
    touched: int | None = None
    for unit, plain in zip(units, _plain_sentences(text), strict=True):
        edited = _edit_cached(plain, lex, where)
        if edited == plain:
            out.append(unit)
            continue
        if touched is None:
            touched = len(out)
        if edited:
            out.append(Unit(unit.lead, unit.mark, edited))
        elif unit.mark and not any(u.mark for u in out):
            touched = len(out)
    index = position(out, touched, lex.target)
    listed = any(u.mark for u in units)
    mark = (
        next((u.mark for u in units if u.mark), "") if listed and position is _place_first else ""
    )
    if mark[:1].isdigit():
        mark = NEW_ITEM + mark.lstrip("0123456789")
    if index and not mark and not out[index - 1].body.endswith(_STOPS):
        out[index - 1] = replace(out[index - 1], body=out[index - 1].body + ".")
    lead = out[index].lead if 0 < index < len(out) else " "
    out.insert(index, Unit(lead or " ", mark, new))
    if index == 0 and len(out) > 1 and not out[1].lead:
        out[1] = Unit(_gap(units), out[1].mark, out[1].body)
    return join_units(restore_first_mark(out))


def _gap(units: tuple[Unit, ...]) -> str:
    return next((u.lead for u in units[1:] if u.lead.strip() == "" and u.lead), " ")


def _place_first(units: list[Unit], touched: int | None, target: str) -> int:
    """Index of the target in the impression: first, before the existing findings."""
    return 0


def _place_finding(units: list[Unit], touched: int | None, target: str) -> int:
    """Index of the target in the findings: that of the text it replaces, else next to its organ;
    always before "the lungs are otherwise clear"."""
    place = _place_beside_organ(units, target) if touched is None else touched
    if target in _ORGANS and target != "Pneumothorax":
        return place
    for index, unit in enumerate(units[:place]):
        lower = unit.body.lower()
        if "otherwise" in lower and _OTHERWISE.search(lower):
            return index
    return place


def _place_beside_organ(units: list[Unit], target: str) -> int:
    organ = _ORGANS.get(target, _LUNGS)
    last = None
    for index, unit in enumerate(units):
        if organ.search(unit.body.lower()):
            last = index
    if last is None and organ is not _LUNGS:
        last = next((i for i, u in enumerate(units) if _LUNGS.search(u.body.lower())), None)
    return len(units) if last is None else last + 1

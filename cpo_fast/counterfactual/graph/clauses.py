"""Clauses of a sentence, and patterns that clauses share: verbs, list items, sides."""

from __future__ import annotations

import re

VERB = r"(?:is|are|was|were|appears?|remains?|has been|have been)"
SEEN = (
    r"\b(?:seen|identified|noted|visuali[sz]ed|present|evident|appreciated|demonstrated|detected|"
    r"observed|suspected|visible|apparent|found)\b"
)
"""Predicates that can end both a denied list and an assertion."""
_PREDICATE = re.compile(
    rf"\b(?:{VERB}|has|have|shows?|demonstrates?|normal|clear|unremarkable|seen|noted|present|"
    r"represents?|midline|intact|enlarged|stable|unchanged)\b"
)
_ASIDE = (
    r"(?:an? )?(?:\w+ )?(?:redemonstration|tortuo\w+|unfolding|ectasia|ectatic|atheroscl\w+|"
    r"calcif\w+|prominent|sternotomy|postoperative|granuloma\w*)\b"
)
"""An incidental finding after "with": kept when the text before it is dropped."""
_CONNECTOR = re.compile(
    r"\s*;\s+|,?\s+(?:but|however|although|though|while|whereas)\s+|"
    r",?\s+(?:and|with)\s+(?=(?:there (?:is|are)|no|without|(?:grossly )?clear|normal)\b)|"
    r",?\s+otherwise,?\s+(?=(?:no|negative|without|clear|normal|unremarkable)\b)|"
    r",?\s+and\s+(?=(?:the |both )?(?:lungs?|heart|mediastin\w+|pulmonary vascul\w+|cardi\w+)\b)|"
    rf",?\s+with\s+(?={_ASIDE})|"
    r",\s+(?=(?:the )?pulmonary vascul\w+ )|"
    r",\s+(?=(?:no|without|negative for|the lungs|lungs|there (?:is|are))\b)|"
    r"\s+(?=(?:without|w/o)\b)|"
    r"\s+(?=(?:The (?:lungs|heart|cardi|mediastin)|Lungs|Heart|There (?:is|are)|"
    r"No )\b)"  # a missing full stop
)
ITEM = re.compile(r"\s*,\s*(?:and/or|and|or|nor)\s+|\s*,\s*|\s+(?:and/or|and|or|nor)\s+")
FRAGMENT = re.compile(
    r"^(?:(?:pleural|pericardial|pulmonary|focal|acute|active|cardiac|interstitial|alveolar|bony|"
    r"lobar|large|"
    r"small|right|left|hilar|mediastinal|suspicious|vascular|confluent|patchy|lung|air ?space|"
    r"peripheral|"
    r"central|chronic|dense|sizable|bilateral|discrete|new|the|of|in|parenchymal|osseous|"
    r"significant|grossly|overall)\s*)+$"
)
_SAYS = re.compile(rf"{_PREDICATE.pattern}|^{_ASIDE}")
_OPEN_END = re.compile(
    r"\b(?:is|are|was|were|appears?|remains?|be|have|has|shows?|reveals?|demonstrates?|the|of|"
    r"and|or)$"
)
_CONTRAST = re.compile(r"but|however|although|though|;")
_SIDE = re.compile(r"\b(right|left|bilateral\w*|both|bibasilar|bi)\b")


def split_clauses(body: str) -> list[tuple[str, str]]:
    """[(connector before, clause)]. A coordinator separates clauses only if both sides make a
    statement."""
    out: list[tuple[str, str]] = []
    start, connector = 0, ""
    for match in _CONNECTOR.finditer(body):
        left, right = body[start : match.start()], body[match.end() :]
        tail = right.lstrip().lower()
        negative = tail.startswith(("no ", "without", "w/o ", "negative", "there "))
        contrast = _CONTRAST.search(match.group().lower()) and len(left.split()) > 1
        says = contrast or _PREDICATE.search(left.lower())
        lost_stop = right[:1].isupper() and not match.group().strip() and left[-1:].isalpha()
        if not left or not (negative or lost_stop or (says and _SAYS.search(tail))):
            continue
        if _OPEN_END.search(left.lower()):
            continue
        out.append((connector, left))
        connector, start = match.group(), match.end()
    out.append((connector, body[start:]))
    return out


def find_sides(text: str) -> frozenset[str]:
    """Sides of the body named in lower-case `text`."""
    found: set[str] = set()
    for word in _SIDE.findall(text):
        found.update((word,) if word in ("right", "left") else ("right", "left"))
    return frozenset(found)

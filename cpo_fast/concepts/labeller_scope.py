"""Scope of the cues in a sentence: whether a mention is asserted, denied or uncertain.

A cue governs the text up to the end of its clause. "No pneumothorax, effusion or edema" is one
list; "No pneumothorax, small effusion" is a denial and a new assertion. At each comma and "and",
the following words decide (`_asserts`).
"""

from __future__ import annotations

import re
from functools import lru_cache

from cpo_fast.concepts.labeller_cues import (
    CONJUNCTION,
    CUES,
    DENIAL_END,
    DENIED_AFTER,
    DENIED_INSIDE,
    DOUBTED_AFTER,
    DOUBTED_INSIDE,
    EXEMPTED_AFTER,
    LIST_PREDICATE,
    PLACE_END,
    SIDE,
    SIZABLE,
    SIZE,
    STATE,
    STATE_AFTER,
    VERB,
)

_CUE = re.compile("|".join(f"(?P<{kind}>{expression})" for kind, expression in CUES))
_CONJUNCTION = re.compile(CONJUNCTION)
_DENIAL_END = re.compile(f"{CONJUNCTION}|{DENIAL_END}|{VERB}")
_VERB = re.compile(VERB)
_LIST_PREDICATE = re.compile(LIST_PREDICATE)
_SEPARATOR = re.compile(
    r",\s*(?:and/or|and|or|nor)\b|\b(?:and/or|and|or|nor)\b|,|\(|\s(?:--?|[–—])\s"
)
_PLACE_END = re.compile(f"{_SEPARATOR.pattern}|{PLACE_END}")
_ONE_WORD_ASIDE = re.compile(r"\(\w+\)")
_CLOSING = re.compile(r"\b(?:or|nor)\b|(?<=[a-z]{3})/(?=[a-z]{3})")
_LAST_AND = re.compile(r"\band (?!(?:\w+ly )?(?:" + f"{SIZE}|{SIDE}|{SIZABLE}" + r")\b)")
_SHOWN_OR = re.compile(rf"{LIST_PREDICATE},? (?=n?or\b)")
_DEVICE = re.compile(
    r"\b(?:tub(?:e|es|ing)|lines?|catheters?|picc|drains?|pace\w+|leads?|wires?|port|balloon|pump|"
    r"swan\S*|sheath|stents?|devices?|hardware|clips?|staples?|icd|defibrillator|tracheostomy)\b"
)
_STATE = re.compile(STATE)
_STATE_AFTER = re.compile(STATE_AFTER)
_ASSERTIVE = re.compile(rf"^(?:\w+ly )?(?:{SIZE}|{SIDE}|{SIZABLE})\b")
_SIZABLE = re.compile(rf"^(?:\w+ly )?{SIZABLE}\b")
_SIZE = re.compile(rf"\b{SIZE}\b")
_SIDE = re.compile(rf"\b{SIDE}\b")
_DENIED_AFTER = re.compile(DENIED_AFTER)
_DOUBTED_AFTER = re.compile(DOUBTED_AFTER)
_EXEMPTED_AFTER = re.compile(EXEMPTED_AFTER)
_DOUBTED_INSIDE = re.compile(DOUBTED_INSIDE)
_DENIED_INSIDE = re.compile(DENIED_INSIDE)


_DENYING = ("denial", "ending", "removal")


def judge(sentence: str, start: int, end: int) -> int:
    """Whether a lower-case sentence asserts (1), denies (0) or doubts (-1) its text at
    start:end."""
    after = sentence[end:]
    value = _judge_before(sentence, start)
    if value == 0:
        return 1 if _EXEMPTED_AFTER.match(after) else 0
    if _DOUBTED_INSIDE.search(sentence, start, end) or _DOUBTED_AFTER.match(after):
        return -1
    if _DENIED_INSIDE.search(sentence, start, end) or _DENIED_AFTER.match(after):
        return 1 if _EXEMPTED_AFTER.match(after) else 0
    return value


def _judge_before(sentence: str, at: int) -> int:
    """Label from the cues before `at`: the last denial or assertion in scope, else doubt."""
    value = 1
    for kind, begin, start, end in _find_reaches(sentence):
        if begin >= at and not begin <= at < start:
            break
        if kind == "assertion" and begin <= at < start:
            return 0  # "no enlargement of the heart": the change is the finding
        if start <= at < end:
            if kind in ("assertion", "place"):
                value = 1
            elif kind in _DENYING:
                value = 0
            elif value:
                value = -1
    return value


@lru_cache(maxsize=1 << 10)
def _find_reaches(sentence: str) -> tuple[tuple[str, int, int, int], ...]:
    """(kind, start of the cue, start and end of its scope) for each cue."""
    found = []
    for cue in _CUE.finditer(sentence):
        kind = cue.lastgroup or ""
        if kind != "neutral":
            end = _end_of_reach(sentence, cue.end(), kind)
            found.append((kind, cue.start(), cue.end(), end))
    return tuple(found)


def _end_of_reach(sentence: str, start: int, kind: str) -> int:
    ends = _CONJUNCTION if kind in ("assertion", "doubt") else _DENIAL_END
    stop = ends.search(sentence, start)
    while stop and kind == "denial" and (shown := _SHOWN_OR.match(sentence, stop.start())):
        stop = ends.search(sentence, shown.end())  # "no effusion seen or pneumothorax"
    limit = stop.start() if stop else len(sentence)
    if ")" in sentence:
        closing = sentence.find(")", start, limit)
        if closing >= 0 and "(" not in sentence[start:closing]:
            limit = closing
    if kind == "assertion":
        return limit
    if kind == "place":
        end = _PLACE_END.search(sentence, start, limit)
        return end.start() if end else limit
    for separator in _SEPARATOR.finditer(sentence, start, limit):
        if _ONE_WORD_ASIDE.match(sentence, separator.start()):
            continue
        joins = _CLOSING.search(separator.group())
        if not joins and _asserts(sentence, separator.end(), separator.group(), kind):
            return separator.start()
    return limit


def _asserts(sentence: str, start: int, separator: str, kind: str) -> bool:
    """Whether the text after a comma, dash, bracket or "and" is a new assertion instead of another
    list item."""
    if not separator[-1:].isalpha() and not separator.startswith(","):
        separator = ","
    while sentence[start : start + 1] == " ":
        start += 1
    stop = _CONJUNCTION.search(sentence, start)
    clause = sentence[start : stop.start() if stop else len(sentence)]
    item = clause.split(",", 1)[0]
    if separator != ",":
        item = re.split(r"\b(?:and|or|nor)\b", item, maxsplit=1)[0]
    verb = _VERB.search(item)
    if verb and not _LIST_PREDICATE.match(item, verb.start()):
        return True
    noun = item[: verb.start()] if verb else item
    if _STATE.search(noun) or _STATE_AFTER.search(noun):
        return True
    if kind == "ending":
        return False
    if kind == "removal":
        return not _DEVICE.search(item)
    head = " ".join(noun.split()[:5])
    if _SIZE.match(head) and _SIDE.search(head):
        return True
    if _is_closed(clause):
        return False
    if _SIZABLE.search(noun) and separator == "," and _LAST_AND.search(clause):
        return False
    return bool(_ASSERTIVE.search(noun) or (separator == "," and _SIDE.search(noun)))


def _is_closed(clause: str) -> bool:
    """Whether "or" or "nor" closes a list in a clause that has no other statement."""
    closing = _CLOSING.search(clause)
    if not closing:
        return False
    verb = _VERB.search(clause, 0, (clause + ",").find(",", closing.end()))
    return verb is None or bool(_LIST_PREDICATE.match(clause, verb.start()))

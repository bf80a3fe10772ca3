"""Split a section into sentences, and join them to the same bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

_BOUNDARY = re.compile(
    r"(?<=[.?!])\s+|\s*\n\s*\n\s*|\n(?=\s*(?:\d{1,2}[.)]|-|\*)\s)|(?<=[a-z]{3}\.)(?=[A-Z][a-z])"
)
_MARK = re.compile(r"(?:\d{1,2}[.)]|-|\*)\s*")
_INLINE_MARK = re.compile(r"\s+(?=(\d{1,2})[.)]\s+[A-Z])")
_NUMBER = re.compile(r"\d+")


NEW_ITEM = "0"
"""List number of an inserted item; `join_units` renumbers the list."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One sentence: leading white space, list mark ("2. ", "- " or ""), text."""

    lead: str
    mark: str
    body: str

    @property
    def plain(self) -> str:
        """The text with single spaces, for matching."""
        return " ".join(self.body.split())


@lru_cache(maxsize=1 << 14)
def split_units(section: str) -> tuple[Unit, ...]:
    """The sentences of one section; `join_units` restores it."""
    units: list[Unit] = []
    lead, mark, start = "", "", 0
    ends = sorted(
        {*((m.start(), m.end()) for m in _BOUNDARY.finditer(section)), *_find_unstopped(section)}
    )
    for stop, following in [*ends, (len(section), len(section))]:
        body = section[start:stop]
        found = _MARK.match(body)
        if found:
            mark, body = mark + found.group(), body[found.end() :]
        if body or stop == len(section):
            if body or mark:
                units.append(Unit(lead, mark, body))
            lead, mark = section[stop:following], ""
        else:  # a separate list mark belongs to the next sentence
            mark += section[stop:following]
        start = following
    if lead and units:  # trailing white space
        units.append(Unit(lead, "", ""))
    return tuple(units)


def _find_unstopped(section: str) -> list[tuple[int, int]]:
    """Boundaries before the consecutive marks (1., 2., ...) of a list without full stops."""
    found: list[tuple[int, int]] = []
    if not section.startswith(("1.", "1)")):
        return found
    expected = 2
    for match in _INLINE_MARK.finditer(section):
        if int(match.group(1)) == expected:
            expected += 1
            found.append((match.start(), match.end()))
    return found


def join_units(units: list[Unit]) -> str:
    """Join units to a section and renumber its lists; mark 0 is a new item, mark 1 starts a
    list."""
    parts: list[str] = []
    number, previous = 0, None  # type: int, int | None
    for index, unit in enumerate(units):
        mark = unit.mark
        if mark[:1].isdigit():
            was = int(_NUMBER.match(mark).group())  # type: ignore[union-attr]
            if previous is None:
                number = max(was, 1)
            else:
                number = 1 if was == 1 and previous != 0 else number + 1
            previous = was
            mark = _NUMBER.sub(str(number), mark, count=1)
        parts.append(("" if index == 0 else unit.lead) + mark + unit.body)
    return "".join(parts).strip()


def restore_first_mark(units: list[Unit]) -> list[Unit]:
    """Mark the first sentence as a list item if the list lost its first mark. A list of one item
    keeps its number, as radiologists write it."""
    if units and not units[0].mark and any(u.mark[:1].isdigit() for u in units[1:]):
        mark = NEW_ITEM + next(u.mark for u in units if u.mark[:1].isdigit()).lstrip("0123456789")
        return [replace(units[0], mark=mark), *units[1:]]
    return units


def is_upper_case(text: str) -> bool:
    """Whether a report is all capitals, apart from de-identification marks (XXXX)."""
    return text.isupper() and any(c.isalpha() for c in text.replace("X", ""))


def capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]

"""Word-level differences between a report and its counterfactual."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

Piece = tuple[bool, str]  # (whether the text changed, text)


def word_diff(original: str, edited: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts as unchanged and changed pieces; the joined pieces equal the text.

    Words and punctuation marks are compared one by one; white space belongs to the word before it.
    """
    first, second = _split(original), _split(edited)
    matcher = SequenceMatcher(
        None, [w.strip() for w in first], [w.strip() for w in second], autojunk=False
    )
    before: list[Piece] = []
    after: list[Piece] = []
    for tag, i, j, k, m in matcher.get_opcodes():
        if i < j:
            before += _pieces(tag != "equal", "".join(first[i:j]))
        if k < m:
            after += _pieces(tag != "equal", "".join(second[k:m]))
    return before, after


def _pieces(changed: bool, text: str) -> list[Piece]:
    """Line breaks and white space at either end are not marked as changed."""
    if not changed:
        return [(False, text)]
    parts = re.split(r"(^\s+|\s*\n\s*|\s+$)", text)
    return [(not part.isspace(), part) for part in parts if part]


def _split(text: str) -> list[str]:
    pieces = re.findall(r"\w+(?:[-'./]\w+)*\s*|[^\w\s]\s*", text)
    start = len(text) - len(text.lstrip())
    return [text[:start], *pieces] if start else pieces

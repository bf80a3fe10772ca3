"""Which words a counterfactual changed."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

Piece = tuple[bool, str]  # (changed?, text)


def word_diff(original: str, edited: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts cut into unchanged and changed pieces; joined, the pieces give each text back.

    Words are compared with their case and punctuation; white space belongs to the word before it.
    """
    first, second = _words(original), _words(edited)
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
    """White space at the end of a changed piece is not marked."""
    end = len(text.rstrip()) if changed else len(text)
    return [piece for piece in ((changed, text[:end]), (False, text[end:])) if piece[1]]


def _words(text: str) -> list[str]:
    return re.findall(r"\s*\S+\s*", text) or ([text] if text else [])

"""A number with its noun."""

from __future__ import annotations

from collections.abc import Callable


def counted(
    number: int, noun: str, several: str | None = None, show: Callable[[int], str] = str
) -> str:
    """`1 step`, `2 steps`; `several` is an irregular plural."""
    return f"{show(number)} {noun if number == 1 else several or noun + 's'}"

"""Allowed values of flags, for all commands.

Each kind has `fault(value)`: None for an allowed value, else the allowed values. A `Number` is also
a `type=` of argparse, whose message then has the flag, the value and the allowed values.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Protocol

Names = Sequence[str] | Callable[[], Sequence[str]]


class Allowed(Protocol):
    """The values of a flag; `read` parses its text, or returns the text for `fault`."""

    def fault(self, value: Any) -> str | None: ...

    def read(self, text: str) -> Any: ...


@dataclass(frozen=True)
class Number:
    """A finite number from `low` to `high` (inclusive), and > `above`, < `below`.

    `whole`: integers only. `also` is one allowed value outside the bounds.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    whole: bool = False
    also: float | None = None

    def fault(self, value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return f"must be {self}"
        inside = (
            (isinstance(value, int) or math.isfinite(value))
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )
        return None if inside or value == self.also else f"must be {self}"

    def read(self, text: str) -> Any:
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        return text

    def __call__(self, text: str) -> Any:
        """Parse `text`; argparse's error if the number is not allowed."""
        value = self.read(text)
        if fault := self.fault(value):
            raise argparse.ArgumentTypeError(f"{text}: {fault}")
        return value if self.whole else float(value)

    def __str__(self) -> str:
        words = ["a whole number" if self.whole else "a finite number"]
        bounds = []
        if self.above is not None:
            bounds.append(f"above {self.above:g}")
        if self.low is not None and self.high is not None:
            bounds.append(f"from {_plain(self.low)} to {_plain(self.high)}")
        elif self.low is not None:
            bounds.append(f"of at least {_plain(self.low)}")
        elif self.high is not None:
            bounds.append(f"of at most {_plain(self.high)}")
        if self.below is not None:
            bounds.append(f"below {self.below:g}")
        words += [" and ".join(bounds)] if bounds else []
        return " ".join(words) + (f", or {_plain(self.also)}" if self.also is not None else "")


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def whole(low: int, high: int | None = None, *, also: int | None = None) -> Number:
    """An integer from `low` to `high`."""
    return Number(low, high, whole=True, also=also)


POSITIVE = whole(1)
COUNT = whole(0)
SHARE = Number(0, 1)
SEED = whole(0, 2**32 - 1)  # the range of all random generators


@dataclass(frozen=True)
class Choice:
    """One of `names`; `advice`: (name, hint) pairs for other names that people use."""

    names: Names
    advice: tuple[tuple[str, str], ...] = ()

    def listed(self) -> list[str]:
        return _listed(self.names)

    def fault(self, value: Any) -> str | None:
        names = self.listed()
        if value in names:
            return None
        hint = dict(self.advice).get(str(value))
        hint = f" ({hint})" if hint else _near(value, names)
        return f"choose from {', '.join(names)}{hint}"

    def read(self, text: str) -> str:
        return text


@dataclass(frozen=True)
class Choices:
    """One or more of `names`, separated by commas, none twice; `ordered`: in their order."""

    names: Names
    ordered: bool = False

    def fault(self, value: Any) -> str | None:
        names = _listed(self.names)
        given = split(value) if isinstance(value, str) else ()
        unknown = [name for name in given if name not in names]
        if unknown or not given:
            return f"choose from {','.join(names)}" + (_near(unknown[0], names) if unknown else "")
        if twice := sorted({name for name in given if given.count(name) > 1}):
            return f"names {', '.join(twice)} more than once"
        in_order = [name for name in names if name in given]
        if self.ordered and list(given) != in_order:
            return f"they run in the order {','.join(names)}: write {','.join(in_order)}"
        return None

    def read(self, text: str) -> str:
        return text


@dataclass(frozen=True)
class Text:
    """Any non-empty text; `why` is the reason why it is not checked further."""

    why: str

    def fault(self, value: Any) -> str | None:
        return None if isinstance(value, str) and value.strip() else "must be text, not empty"

    def read(self, text: str) -> str:
        return text


@dataclass(frozen=True)
class Switch:
    """True or false."""

    def fault(self, value: Any) -> str | None:
        return None if isinstance(value, bool) else "must be true or false"

    def read(self, text: str) -> Any:
        values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        return values.get(text.strip().lower(), text)


def near(name: str, names: Iterable[str]) -> str | None:
    """The most likely intended name: the closest spelling, else the first that contains `name`."""
    names = list(names)
    if close := get_close_matches(name, names, n=1):
        return close[0]
    word = name.strip("-_")
    return next((one for one in names if len(word) > 2 and word in one), None)


def split(text: str) -> tuple[str, ...]:
    """The names in a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _listed(names: Names) -> list[str]:
    return list(names() if callable(names) else names)


def _near(value: Any, names: Sequence[str]) -> str:
    meant = near(str(value), names)
    return f" (did you mean {meant}?)" if meant else ""

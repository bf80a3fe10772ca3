"""Progress of drafting: a bar on a terminal, otherwise plain lines on stderr."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from tqdm import tqdm

from cpo_fast.counting import counted

EVERY_SECONDS = 30.0
"""Interval of the lines if stderr is not a terminal."""


@dataclass(slots=True)
class Tally:
    """Number of drafts, and of records by state; `open` records still need a draft."""

    drafts: int = 0
    passed: int = 0
    set_aside: int = 0
    open: int = 0


class DraftBar:
    """Shows the number of drafts on stderr, at most five times a second on a terminal, otherwise
    every `EVERY_SECONDS`, however often it is updated."""

    def __init__(self) -> None:
        self.studies = 0
        self._tally = Tally()
        self._tokens = ""
        self._bar: tqdm[None] | None = None
        self._is_terminal = sys.stderr.isatty()
        self._last_shown = time.monotonic()

    def show_tally(self, tally: Tally) -> None:
        self._tally, self._tokens = tally, ""
        self._show()

    def show_tokens(self, tokens: int, most: int) -> None:
        """Set the number of new tokens per draft of the current batch, and its maximum."""
        self._tokens = f", token {tokens} of at most {most}"
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._last_shown < (0.2 if self._is_terminal else EVERY_SECONDS):
            return
        self._last_shown = now
        if self._is_terminal:
            self._draw()
        else:
            line = f"counterfactuals: {self._tally.drafts} drafts, {self._describe()}"
            print(line, file=sys.stderr, flush=True)

    def _describe(self) -> str:
        tally = self._tally
        return (
            f"{tally.passed} passed, {tally.set_aside} set aside, {tally.open} open, "
            f"{counted(self.studies, 'study', 'studies')}{self._tokens}"
        )

    def _draw(self) -> None:
        if self._bar is None:
            self._bar = tqdm(desc="counterfactuals", unit=" drafts")
        self._bar.n = self._tally.drafts
        self._bar.set_postfix_str(self._describe())

    def close(self) -> None:
        if self._is_terminal:
            self._draw()
        if self._bar is not None:
            self._bar.close()

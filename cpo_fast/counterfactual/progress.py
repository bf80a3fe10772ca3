"""How far the drafting of counterfactuals is: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from tqdm import tqdm

from cpo_fast.counting import counted

EVERY_SECONDS = 30.0
"""Between two lines where stderr is no terminal."""


@dataclass(slots=True)
class Tally:
    """Drafts that were written, and what became of the records; `open` ones are drafted again."""

    drafts: int = 0
    passed: int = 0
    set_aside: int = 0
    open: int = 0


class DraftBar:
    """Counts drafts on stderr. `drafted` and `writing` are called as often as one likes: what they
    say is shown a few times a second on a terminal, every `EVERY_SECONDS` elsewhere."""

    def __init__(self) -> None:
        self.studies = 0
        self._tally = Tally()
        self._tokens = ""
        self._bar: tqdm[None] | None = None
        self._draws = sys.stderr.isatty()
        self._said = time.monotonic()

    def drafted(self, tally: Tally) -> None:
        self._tally, self._tokens = tally, ""
        self._show()

    def writing(self, tokens: int, most: int) -> None:
        """Each draft of the batch in work has `tokens` new tokens of `most` at most."""
        self._tokens = f", token {tokens} of at most {most}"
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._said < (0.2 if self._draws else EVERY_SECONDS):
            return
        self._said = now
        if self._draws:
            self._draw()
        else:
            line = f"counterfactuals: {self._tally.drafts} drafts, {self._words()}"
            print(line, file=sys.stderr, flush=True)

    def _words(self) -> str:
        tally = self._tally
        return (
            f"{tally.passed} passed, {tally.set_aside} set aside, {tally.open} open, "
            f"{counted(self.studies, 'study', 'studies')}{self._tokens}"
        )

    def _draw(self) -> None:
        if self._bar is None:
            self._bar = tqdm(desc="counterfactuals", unit=" drafts")
        self._bar.n = self._tally.drafts
        self._bar.set_postfix_str(self._words())

    def close(self) -> None:
        if self._draws:
            self._draw()
        if self._bar is not None:
            self._bar.close()

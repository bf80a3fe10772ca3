"""How far a stage is: a bar on a terminal, now and then a plain line anywhere else."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

EVERY_SECONDS = 30.0
LEFT_OUT = 2  # first steps of this process that say nothing about the next ones


class StageBar:
    """Steps of one stage on stderr; rank 0 alone has one. Evaluations and saving count as time:
    what is left of the stage holds its share of them."""

    def __init__(self, stage: str, total: int, done: int, *, shows: bool) -> None:
        self.stage = stage
        self.total = total
        self.done = done
        self.shows = shows
        self.loss: float | None = None
        self._bar = tqdm(total=total, initial=done, desc=stage, unit="step", smoothing=0.0,
                         disable=None if shows else True)  # fmt: skip
        self._lines = shows and self._bar.disable
        self._begun = self._said = time.monotonic()
        self._warm = done + LEFT_OUT

    def update(self, loss: float | None = None) -> None:
        """One step is done; `loss` is that of the newest row."""
        self.done += 1
        if loss is not None:
            self.loss = loss
            self._bar.set_postfix(loss=f"{loss:.4f}")
        self._bar.update()
        now = time.monotonic()
        if self.done == self._warm:
            self._begun = now
        if self._lines and (now - self._said >= EVERY_SECONDS or self.done == self.total):
            self._said = now
            print(self._line(now), file=sys.stderr, flush=True)

    def _line(self, now: float) -> str:
        words = [f"{self.stage}: step {self.done} of {self.total}"]
        if self.loss is not None:
            words.append(f"loss {self.loss:.4f}")
        if self.done > self._warm:
            pace = (now - self._begun) / (self.done - self._warm)
            words.append(f"{pace:.3g} s/step")
            if self.done < self.total:
                words.append(f"{duration(pace * (self.total - self.done))} left")
        return ", ".join(words)

    def close(self) -> None:
        self._bar.close()


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds, as one reads them."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"

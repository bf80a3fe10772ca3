"""Progress of a stage: a bar on a terminal, else a plain line every 30 seconds."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

EVERY_SECONDS = 30.0
WARM_UP_STEPS = 2  # first steps of a process, not used to estimate the time left


class StageBar:
    """Progress of one stage on stderr, shown by rank 0 only. The time left includes evaluations and
    checkpoints at their rate so far."""

    def __init__(self, stage: str, total: int, done: int, *, shows: bool) -> None:
        self.stage = stage
        self.total = total
        self.done = done
        self.shows = shows
        self.loss: float | None = None
        self._bar = tqdm(total=total, initial=done, desc=stage, unit="step", smoothing=0.0,
                         disable=None if shows else True)  # fmt: skip
        self._lines = shows and self._bar.disable
        self._start = self._printed = time.monotonic()
        self._warm_step = done + WARM_UP_STEPS

    def update(self, loss: float | None = None) -> None:
        """Count a finished step; `loss`: of the newest row, if there is a new one."""
        self.done += 1
        if loss is not None:
            self.loss = loss
            self._bar.set_postfix(loss=f"{loss:.4f}")
        self._bar.update()
        now = time.monotonic()
        if self.done == self._warm_step:
            self._start = now
        if self._lines and (now - self._printed >= EVERY_SECONDS or self.done == self.total):
            self._printed = now
            print(self._format_line(now), file=sys.stderr, flush=True)

    def _format_line(self, now: float) -> str:
        parts = [f"{self.stage}: step {self.done} of {self.total}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.done > self._warm_step:
            seconds_per_step = (now - self._start) / (self.done - self._warm_step)
            parts.append(f"{seconds_per_step:.3g} s/step")
            if self.done < self.total:
                parts.append(f"{format_duration(seconds_per_step * (self.total - self.done))} left")
        return ", ".join(parts)

    def close(self) -> None:
        self._bar.close()


def format_duration(seconds: float) -> str:
    """`2 h 03 min`, `1 min 01 s` or `59 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"

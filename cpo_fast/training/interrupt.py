"""SIGINT, SIGTERM and the time limit: finish the step, save, exit."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from cpo_fast.errors import CpoFastError

EXIT_STATUS = 3  # saved but not finished: a job queue can resume the run


class Interrupted(CpoFastError):
    """The run stopped early on request, after writing a checkpoint."""


class StopRequest:
    """A stop is requested by the first signal or after `max_minutes`; a second signal exits
    immediately."""

    def __init__(self, max_minutes: float | None = None) -> None:
        self.reason: str | None = None
        self._deadline = time.monotonic() + max_minutes * 60 if max_minutes else None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None:
            os._exit(128 + number)
        self.reason = signal.Signals(number).name

    def pending(self) -> bool:
        if self.reason is None and self._deadline and time.monotonic() >= self._deadline:
            self.reason = "max_minutes"
        return self.reason is not None

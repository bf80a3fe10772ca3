"""Units of work of the GPU check (key, time limit, result) and their settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def describe_error(error: Exception, limit: int = 200) -> str:
    """Class and first line of the message, at most `limit` characters of it."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:limit]}"


class NotHere(Exception):
    """A unit does not apply here, for the reason given: recorded as skipped, not as failed."""


@dataclass(frozen=True)
class Unit:
    """One check or measurement. `run` returns the figures of its record. AssertionError means
    failed, NotHere skipped, any other exception an error.

    The parent process consumes two figures, which are not recorded: `environment`, variables for
    all later processes, and `fresh_process`, whether the next units need a new process.
    """

    key: str
    run: Callable[[], dict[str, Any]] = field(compare=False)
    limit: float = 60.0  # seconds, then it is killed
    variant: str = ""  # the implementation it runs: after a timeout its other units are skipped
    phase: str = ""  # of its record; default: the phase that runs it


@dataclass(frozen=True)
class Setting:
    """Settings of a phase, passed to its worker processes."""

    device: str  # "cuda" or "cpu"
    quick: bool  # tiny shapes, a second each on a CPU
    out: str  # folder of results and other output
    red: tuple[str, ...] = ()  # variants that failed a check: not timed
    hung: tuple[str, ...] = ()  # variants that timed out: not run
    only: tuple[str, ...] = ()  # variants to run; empty: all
    best: tuple[str, ...] = ()  # variants that passed so far, fastest first
    patience: float = 1.0  # factor of all time limits
    kit: str = "gpu-kit"  # folder made by `make gpu-kit`
    scratch: str = "runs/gpu-check/kit"  # folder to unpack the kit in

    def runs(self, unit: Unit) -> bool:
        if unit.variant in self.hung:
            return False
        return not self.only or unit.variant in self.only

    def dumps(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def loads(text: str) -> Setting:
        """The inverse of `dumps`."""
        fields: Any = {
            k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()
        }
        return Setting(**fields)

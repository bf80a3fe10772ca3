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
    """Class and at most `limit` characters of the message's first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:limit]}"


class NotHere(Exception):
    """A unit does not apply on this machine; recorded as skipped with the reason, not as failed."""


@dataclass(frozen=True)
class Unit:
    """One check or measurement. `run` returns its record's figures. AssertionError means failed,
    NotHere skipped, any other exception an error.

    The parent process consumes two figures, which are not recorded: `environment`, variables for
    all later processes, and `fresh_process`, whether the next units need a new process.
    """

    key: str
    run: Callable[[], dict[str, Any]] = field(compare=False)
    limit: float = 60.0  # seconds until it is killed
    variant: str = ""  # its implementation; after a timeout the variant's other units are skipped
    phase: str = ""  # of its record; default: the phase that runs it


@dataclass(frozen=True)
class Setting:
    """A phase's settings, passed to its worker processes."""

    device: str  # "cuda" or "cpu"
    quick: bool  # tiny shapes, about a second each on a CPU
    out: str  # folder of results and other output
    red: tuple[str, ...] = ()  # variants that failed a check: not timed
    hung: tuple[str, ...] = ()  # variants that timed out: not run
    only: tuple[str, ...] = ()  # variants to run; empty: all
    best: tuple[str, ...] = ()  # variants that passed so far, fastest first
    patience: float = 1.0  # factor of all time limits
    kit: str = "gpu-kit"  # output folder of `make gpu-kit`
    scratch: str = "runs/gpu-check/kit"  # folder to unpack the kit into

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

"""What a phase of the GPU check is made of: units, each with a key, a time limit and a result."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class NotHere(Exception):
    """A unit has nothing to do here, for the reason given: counted as skipped, not as failed."""


@dataclass(frozen=True)
class Setting:
    """What the phases are told."""

    device: str  # "cuda" or "cpu"
    quick: bool  # shapes that a CPU does in a second
    out: str  # folder for what is written beside the results
    red: tuple[str, ...] = ()  # variants that broke a rule: nothing is timed of them

    def dumps(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def loads(text: str) -> Setting:
        fields = json.loads(text)
        return Setting(**{**fields, "red": tuple(fields["red"])})


@dataclass(frozen=True)
class Unit:
    """Something done at once. `run` returns figures for the record; AssertionError: a rule was
    broken; NotHere: skipped; anything else: an error."""

    key: str
    run: Callable[[], dict[str, Any]] = field(compare=False)
    limit: float = 60.0  # seconds until it is killed
    group: str = ""  # how keys begin that are not tried any more once it took too long

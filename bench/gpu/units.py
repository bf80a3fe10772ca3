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
class Unit:
    """Something done at once. `run` returns figures for the record; AssertionError: a rule was
    broken; NotHere: skipped; anything else: an error.

    Two figures are for the parent and not recorded: `environment`, variables for all later
    processes, and `fresh_process`, whether the units behind this one need a process of their own.
    """

    key: str
    run: Callable[[], dict[str, Any]] = field(compare=False)
    limit: float = 60.0  # seconds until it is killed
    variant: str = ""  # whose code it runs: once a unit of it hangs, its others are left out
    phase: str = ""  # under which it is recorded, where that is not the name of what runs it


@dataclass(frozen=True)
class Setting:
    """What the phases are told."""

    device: str  # "cuda" or "cpu"
    quick: bool  # shapes that a CPU does in a second
    out: str  # folder for what is written beside the results
    red: tuple[str, ...] = ()  # variants that broke a rule: nothing is timed of them
    hung: tuple[str, ...] = ()  # variants that hung: nothing is run of them
    only: tuple[str, ...] = ()  # variants to run; empty: all
    best: tuple[str, ...] = ()  # variants that passed so far, the fastest first
    patience: float = 1.0  # by which time limits are multiplied
    kit: str = "gpu-kit"  # folder with what `make gpu-kit` made
    scratch: str = "runs/gpu-check/kit"  # folder to unpack it in

    def runs(self, unit: Unit) -> bool:
        if unit.variant in self.hung:
            return False
        return not self.only or unit.variant in self.only

    def dumps(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def loads(text: str) -> Setting:
        fields: Any = {
            k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()
        }
        return Setting(**fields)

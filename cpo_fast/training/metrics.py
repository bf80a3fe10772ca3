"""metrics.jsonl: one JSON object per logged step, written immediately, and the sums of each row."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from cpo_fast.errors import CpoFastError
from cpo_fast.folders import write_jsonl
from cpo_fast.training.checkpoint import RESUME
from cpo_fast.training.stage_settings import TRAINING_STAGES


class MetricsLog:
    """Appends rows to metrics.jsonl and holds them for the log_history of checkpoints."""

    def __init__(
        self, path: Path, fresh: Iterable[str] = TRAINING_STAGES, *, writes: bool = True
    ) -> None:
        """Open `path` and drop the rows that an earlier run wrote for the stages in `fresh`.

        `writes=False` neither reads nor writes: one of several processes writes the log.
        """
        self.path = path
        self.writes = writes
        self.also: Callable[[dict[str, Any]], None] | None = None  # called with every new row
        self.rows: list[dict[str, Any]] = []
        if writes and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            # A row cut short by a kill has no line end; its step is computed again.
            self.rows = [json.loads(line) for line in lines if line.endswith("\n")]
        self.keep(lambda row: row["stage"] not in tuple(fresh))

    def rewind(self, stage: str, step: int) -> None:
        """Drop the rows of a stage after `step`; a resumed run writes them again."""
        self.keep(lambda row: row["stage"] != stage or row["step"] <= step)

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop all other rows, in the file too."""
        if not self.writes or not self.path.is_file():
            return
        self.rows = [row for row in self.rows if wanted(row)]
        write_jsonl(self.path, self.rows)

    def write(self, row: dict[str, Any]) -> None:
        if not self.writes:
            return
        clean = replace_nonfinite(row)
        self.rows.append(clean)
        if self.also is not None:
            self.also(clean)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(clean, allow_nan=False) + "\n")
        except OSError as error:
            raise CpoFastError(
                f"{self.path} cannot be written ({error}); the checkpoints are unchanged: "
                f"{RESUME} once it can"
            ) from error

    def rows_of_stage(self, stage: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["stage"] == stage]


def replace_nonfinite(value: Any) -> Any:
    """`value` with None for every float that is not finite, at any depth: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: replace_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [replace_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Sums:
    """Sums of values over the micro-steps since the last row; tensors stay on their device."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = defaultdict(float)

    def add(self, values: Mapping[str, torch.Tensor | float]) -> None:
        for name, value in values.items():
            detached = value.detach().double() if isinstance(value, torch.Tensor) else value
            self._sums[name] = self._sums[name] + detached

    def read(self) -> dict[str, float]:
        """The sums so far, for a checkpoint between two rows; `add` restores them."""
        return {name: float(value) for name, value in self._sums.items()}

    @staticmethod
    def merge(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
        """The total of the sums of several processes."""
        total = Sums()
        for part in parts:
            total.add(part)
        return total.take()

    def take(self) -> dict[str, float]:
        """The sums as floats (one synchronisation); they restart from zero."""
        taken = self.read()
        self._sums.clear()
        return taken

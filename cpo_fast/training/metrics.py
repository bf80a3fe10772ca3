"""metrics.jsonl: one JSON object per logged step, flushed at once, and the sums behind each row."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from cpo_fast.errors import CpoFastError

TIMING_FIELDS = ("pairs_per_second", "tokens_per_second_per_gpu",
                 "logical_tokens_per_second", "mfu", "peak_memory_gib", "time/data",
                 "time/forward", "time/backward", "time/wait", "time/optimiser",
                 "time/other")  # fmt: skip
"""The fields of a row that differ between two runs of the same command."""


class MetricsLog:
    """Appends rows to metrics.jsonl and keeps them (they are the log_history of a checkpoint)."""

    def __init__(
        self, path: Path, fresh: Iterable[str] = ("sft", "cpo"), *, writes: bool = True
    ) -> None:
        """Open `path`; rows of an earlier run stay, but for those of the stages in `fresh`.

        Without `writes` it neither reads nor writes: of several processes, one keeps the log.
        """
        self.path = path
        self.writes = writes
        self.also: Callable[[dict[str, Any]], None] | None = None  # gets every new row, too
        self.rows: list[dict[str, Any]] = []
        if writes and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            # A row that a kill cut short has no line end: its step is computed again.
            self.rows = [json.loads(line) for line in lines if line.endswith("\n")]
        self.keep(lambda row: row["stage"] not in tuple(fresh))

    def rewind(self, stage: str, step: int) -> None:
        """Forget the rows of a stage after `step`: a resumed run writes them again."""
        self.keep(lambda row: row["stage"] != stage or row["step"] <= step)

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop all other rows, from the file, too."""
        if not self.writes or not self.path.is_file():
            return
        self.rows = [row for row in self.rows if wanted(row)]
        partial = self.path.with_name(f".{self.path.name}.partial")
        lines = (json.dumps(row, allow_nan=False) + "\n" for row in self.rows)
        partial.write_text("".join(lines), encoding="utf-8")
        partial.rename(self.path)

    def write(self, row: dict[str, Any]) -> None:
        if not self.writes:
            return
        clean = finite(row)
        self.rows.append(clean)
        if self.also is not None:
            self.also(clean)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(clean, allow_nan=False) + "\n")
        except OSError as error:
            raise CpoFastError(
                f"{self.path} cannot be written ({error}); the checkpoints are unchanged: "
                "continue with resume_from_checkpoint auto once it can"
            ) from error

    def of_stage(self, stage: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["stage"] == stage]


def finite(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite is written as null, at any depth."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Sums:
    """Sums of numbers over the micro-steps since the last row; tensors stay on their device."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = defaultdict(float)

    def add(self, values: Mapping[str, torch.Tensor | float]) -> None:
        for name, value in values.items():
            detached = value.detach().double() if isinstance(value, torch.Tensor) else value
            self._sums[name] = self._sums[name] + detached

    def peek(self) -> dict[str, float]:
        """The sums so far, for a checkpoint between two rows; `add` takes them back."""
        return {name: float(value) for name, value in self._sums.items()}

    @staticmethod
    def together(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
        """The sums of several processes as one."""
        total = Sums()
        for part in parts:
            total.add(part)
        return total.take()

    def take(self) -> dict[str, float]:
        """The sums as floats (one synchronisation), then start again from zero."""
        taken = self.peek()
        self._sums.clear()
        return taken

"""metrics.jsonl: one JSON object per logged step, flushed at once, and the sums behind each row."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

TIMING_FIELDS = ("pairs_per_second", "samples_per_second", "tokens_per_second_per_gpu",
                 "logical_tokens_per_second", "seconds", "time")  # fmt: skip
"""The fields of a row that differ between two runs of the same command."""


class MetricsLog:
    """Appends rows to metrics.jsonl and keeps them (they are the log_history of a checkpoint)."""

    def __init__(self, path: Path, fresh: Iterable[str] = ("sft", "cpo")) -> None:
        """Open `path`; rows of an earlier run stay, but for those of the stages in `fresh`."""
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            earlier = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            self.rows = [row for row in earlier if row["stage"] not in tuple(fresh)]
        lines = (json.dumps(row, allow_nan=False) + "\n" for row in self.rows)
        path.write_text("".join(lines), encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        clean = {key: _plain(value) for key, value in row.items()}
        self.rows.append(clean)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean, allow_nan=False) + "\n")

    def of_stage(self, stage: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["stage"] == stage]


def _plain(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite is written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Sums:
    """Sums of numbers over the micro-steps since the last row; tensors stay on their device."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = defaultdict(float)

    def add(self, values: dict[str, torch.Tensor | float]) -> None:
        for name, value in values.items():
            detached = value.detach().double() if isinstance(value, torch.Tensor) else value
            self._sums[name] = self._sums[name] + detached

    def take(self) -> dict[str, float]:
        """The sums as floats (one synchronisation), then start again from zero."""
        taken = {name: float(value) for name, value in self._sums.items()}
        self._sums.clear()
        return taken

"""Settings of a run from flags, and the rows of its metrics.jsonl: shared by the tests of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cpo_fast.run.arguments import TrainArguments
from cpo_fast.run.settings import read_settings

TIMING_FIELDS = ("pairs_per_second", "tokens_per_second_per_gpu",
                 "logical_tokens_per_second", "mfu", "peak_memory_gib", "time/data",
                 "time/forward", "time/backward", "time/wait", "time/optimiser",
                 "time/other")  # fmt: skip
"""The fields of a row that differ between two runs of the same command."""


def parse_arguments(argv: list[str]) -> TrainArguments:
    """The settings of a run from its command line."""
    return read_settings(argv).args


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def read_rows_without_timing(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl with the fields that a second run repeats exactly."""
    return [{k: v for k, v in row.items() if k not in TIMING_FIELDS} for row in read_rows(folder)]

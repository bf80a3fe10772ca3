"""What a run folder holds, read with care: any file may be missing, cut short or not ours."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpo_fast.counting import counted
from cpo_fast.errors import UsageError

MAX_JSON_BYTES = 64_000_000
MAX_LINE_BYTES = 4_000_000
KEPT_RECORDS = 50


@dataclass(frozen=True)
class Run:
    """A run folder. `notes` say which files are missing or damaged; the page repeats them."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    drifts: list[dict[str, Any]] = field(default_factory=list)  # studies of the drift probe
    targets: Counter[str] = field(default_factory=Counter)  # counterfactuals per target disease
    rejected: list[dict[str, Any]] = field(default_factory=list)  # the first KEPT_RECORDS
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def stages(self) -> list[str]:
        """Names of the stages that logged metrics, in the order of their first row."""
        return list(dict.fromkeys(str(row["stage"]) for row in self.metrics))

    def series(self, stage: str, metric: str) -> tuple[list[float], list[float]]:
        """Steps and values of `metric`; rows without it, or where it is no number, are left out."""
        points = [
            (float(row["step"]), float(row[metric]))
            for row in self.metrics
            if row["stage"] == stage and _finite(row.get(metric))
        ]
        return [x for x, _ in points], [y for _, y in points]

    def part(self, *keys: str) -> dict[str, Any]:
        """A nested object of summary.json, {} where it is missing."""
        found: Any = self.summary
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else {}


def read_run(path: Path | str) -> Run:
    """Read a run folder. Raises UsageError when it is no folder or holds nothing of a run."""
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: name the output_dir of a run")
    notes: list[str] = []
    file = folder / "evaluation.json"  # which not every run has
    shown = _object(file, notes) if file.exists() else {}
    run = Run(
        path=folder,
        config=_object(folder / "config.json", notes),
        metrics=[
            row
            for row in _lines(folder / "metrics.jsonl", notes)
            if isinstance(row.get("stage"), str) and _finite(row.get("step"))
        ],
        summary=_object(folder / "summary.json", notes),
        examples=_list(shown.get("examples")) or _counterfactuals(folder),
        drifts=_list(shown.get("drift")),
        targets=Counter(
            str(row.get("target"))
            for row in _lines(folder / "counterfactuals.jsonl", notes)
            if row.get("target") and row.get("kind") != "perception"
        ),
        rejected=[
            row
            for row, _ in zip(
                _lines(folder / "rejected_records.jsonl", notes), range(KEPT_RECORDS), strict=False
            )
        ],
        notes=notes,
    )
    if not run.metrics and not run.summary:
        raise UsageError(
            f"{folder} has neither metrics.jsonl nor summary.json: name the output_dir of a run"
        )
    return run


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300


def _counterfactuals(folder: Path) -> list[dict[str, Any]]:
    """The first counterfactuals, as examples without any answers."""
    wanted = ("study_id", "report", "labels", "counterfactual", "target")
    rows = zip(_lines(folder / "counterfactuals.jsonl", []), range(4), strict=False)
    return [{key: row.get(key) for key in wanted} for row, _ in rows]


def _list(value: Any) -> list[dict[str, Any]]:
    """The members of a JSON list that are objects."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _object(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            notes.append(f"{path.name} is larger than {MAX_JSON_BYTES} bytes and was not read")
            return {}
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{path.name} is missing")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read ({type(error).__name__})")
        return {}
    return value if isinstance(value, dict) else {}


def _lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a .jsonl file; lines that are none are counted in `notes`."""
    if not path.is_file():
        return
    damaged = 0
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if isinstance(value, dict):
                yield value
            elif line.strip():
                damaged += 1
    if damaged:
        notes.append(f"{path.name}: {counted(damaged, 'damaged line')} left out")

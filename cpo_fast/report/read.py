"""The contents of a run folder. Any file can be missing, cut off or malformed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from cpo_fast.counting import counted
from cpo_fast.errors import UsageError

MAX_JSON_BYTES = 64_000_000
MAX_LINE_BYTES = 4_000_000
KEPT_RECORDS = 50
KEPT_COUNTERFACTUALS = 4


@dataclass(frozen=True)
class Run:
    """A run folder. `notes` name the missing or damaged files; the page repeats them."""

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
        """Steps and values of `metric`; rows without a finite value are left out."""
        points = [
            (float(row["step"]), float(row[metric]))
            for row in self.metrics
            if row["stage"] == stage and is_number(row.get(metric))
        ]
        return [x for x, _ in points], [y for _, y in points]

    def part(self, *keys: str) -> Mapping[str, Any]:
        """A nested object of summary.json, {} if it is missing."""
        return get(self.summary, *keys)


def read_run(path: Path | str) -> Run:
    """Read a run folder. Raises UsageError if it is no folder or contains no file of a run."""
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; name the output_dir of a run")
    notes: list[str] = []
    file = folder / "evaluation.json"  # optional
    shown = _read_object(file, notes) if file.exists() else {}
    run = Run(
        path=folder,
        config=_read_object(folder / "config.json", notes),
        metrics=[
            row
            for row in _read_lines(folder / "metrics.jsonl", notes)
            if isinstance(row.get("stage"), str) and is_number(row.get("step"))
        ],
        summary=_read_object(folder / "summary.json", notes),
        examples=_object_list(shown.get("examples")) or _read_counterfactuals(folder),
        drifts=_object_list(shown.get("drift")),
        targets=Counter(
            str(row.get("target"))
            for row in _read_lines(folder / "counterfactuals.jsonl", notes)
            if row.get("target") and row.get("kind") != "perception"
        ),
        rejected=list(islice(_read_lines(folder / "rejected_records.jsonl", notes), KEPT_RECORDS)),
        notes=notes,
    )
    if not run.metrics and not run.summary:
        raise UsageError(
            f"{folder} has neither metrics.jsonl nor summary.json; name the output_dir of a run"
        )
    return run


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def strings(value: Any) -> list[str]:
    """The members of a JSON list as text."""
    return [str(member) for member in value] if isinstance(value, list) else []


def objects(value: Any) -> dict[str, dict[str, Any]]:
    """The members of a JSON object that are objects themselves."""
    members = value.items() if isinstance(value, dict) else ()
    return {str(k): v for k, v in members if isinstance(v, dict)}


def counts(value: Any) -> dict[str, int | float]:
    """The members of a JSON object that are numbers."""
    members = value.items() if isinstance(value, dict) else ()
    return {str(k): v for k, v in members if is_number(v)}


def get(value: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """A nested JSON object, {} if a key is missing or its value is not an object."""
    for key in keys:
        found = value.get(key)
        value = found if isinstance(found, dict) else {}
    return value


def _object_list(value: Any) -> list[dict[str, Any]]:
    """The members of a JSON list that are objects."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _read_counterfactuals(folder: Path) -> list[dict[str, Any]]:
    """The first counterfactuals, as examples without answers."""
    wanted = ("study_id", "report", "labels", "counterfactual", "target")
    rows = islice(_read_lines(folder / "counterfactuals.jsonl", []), KEPT_COUNTERFACTUALS)
    return [{key: row.get(key) for key in wanted} for row in rows]


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
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


def _read_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a .jsonl file; at the end, `notes` gets the number of invalid lines."""
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

"""Tables of a report: their data types, how a figure is formatted, and a table as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

NAMES = {"majority": "Majority guess", "untrained": "Untrained", "sft": "SFT", "cpo": "CPO"} | {
    "images": "Image check",
    "graph": "Concept graph",
    "reference": "Reference",
    "counterfactual": "Counterfactuals",
    "evaluate": "Evaluation",
}
"""How models and stages are called in a report; others go by their own name."""

FIRST, LAST = ("cpo", "sft"), ("majority", "untrained")
NARROW_COLUMNS = 5
"""So many columns, the row heads included, fit a page of 390 pixels."""


@dataclass(frozen=True)
class Cell:
    text: str
    note: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    head: str
    cells: tuple[Cell, ...]
    note: str = ""


@dataclass(frozen=True)
class Table:
    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    words: bool = False  # the cells are words, not figures
    column_notes: tuple[str, ...] = ()  # one per column, or none at all

    @property
    def hidden(self) -> int | None:
        """The column that a narrow page leaves out: the untrained model's, of five or more."""
        last = len(self.columns) - 1
        full = last + 1 >= NARROW_COLUMNS and self.columns[last] == NAMES["untrained"]
        return last if full else None

    @property
    def stacked(self) -> bool:
        """Whether a narrow page shows each row as a list of its cells."""
        shown = len(self.columns) - (self.hidden is not None)
        return self.words or shown > NARROW_COLUMNS


def in_order(names: Iterable[str]) -> list[str]:
    """CPO, then SFT, then the others in their order, the baselines last."""

    def rank(name: str) -> int:
        if name in FIRST:
            return FIRST.index(name) - len(FIRST)
        return 1 + LAST.index(name) if name in LAST else 0

    return sorted(names, key=rank)


def name_of(model: str) -> str:
    return NAMES.get(model, model)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def number(value: Any) -> str:
    """Three significant digits, thousands apart; text as it stands; a dash for nothing."""
    if value is None:
        return "–"
    if not is_number(value):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\u202f").replace("-", "−")
    return f"{value:#.3g}".rstrip(".").replace("-", "−")


def percent(value: Any) -> str:
    return f"{100 * value:.1f}\u00a0%" if is_number(value) else "–"


def seconds(value: Any) -> str:
    if not is_number(value):
        return "–"
    if value < 120:
        return f"{value:.3g}\u00a0s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}\u00a0h" if hours else f"{minutes}:{rest:02d}\u00a0min"


def interval(figure: Mapping[str, Any], show: Callable[[Any], str] = percent) -> str:
    bounds = figure.get("interval")
    if not isinstance(bounds, list) or len(bounds) != 2 or not all(map(is_number, bounds)):
        return ""
    low, high = (show(bound).removesuffix("\u00a0%") for bound in bounds)
    return f"{low} to {high}" if low[0] in "+−" else f"{low}–{high}"


def significant(figure: Mapping[str, Any]) -> bool | None:
    """Whether the 95 % interval of a difference excludes 0; None without an interval."""
    bounds = figure.get("interval")
    if not isinstance(bounds, list) or len(bounds) != 2 or not all(map(is_number, bounds)):
        return None
    return bool(bounds[0] > 0 or bounds[1] < 0)


def points(value: Any) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−") if is_number(value) else "–"


def table_csv(table: Table) -> str:
    """RFC 4180 text of what the page shows; an interval or note has its own column after its cell.

    Plain "-" and no thousands separators; an empty field where there is no figure. Text that a
    spreadsheet would run as a formula begins with an apostrophe.
    """
    notes = table.column_notes or ("",) * len(table.columns)
    names = [
        f"{name} ({note})" if note else name
        for name, note in zip(table.columns, notes, strict=True)
    ]
    columns = [
        [names[0], *(row.head for row in table.rows)],
        ["Note", *(row.note for row in table.rows)],
    ]
    for i, name in enumerate(names[1:]):
        cells = [row.cells[i] if i < len(row.cells) else Cell("") for row in table.rows]
        columns.append([name, *(cell.text for cell in cells)])
        columns.append(
            [f"{table.columns[i + 1]}: interval or note", *(cell.note for cell in cells)]
        )
    kept = [c for i, c in enumerate(columns) if i % 2 == 0 or any(c[1:])]
    buffer = io.StringIO()
    csv.writer(buffer).writerows(map(_field, line) for line in zip(*kept, strict=True))
    return buffer.getvalue()


def _field(text: str) -> str:
    text = text.replace("\u00a0%", "%").replace("\u00a0", " ").replace("\u202f", "")
    text = "" if text == "–" else text.replace("−", "-")
    text = re.sub(r"(?<=\d)–(?=\d)", " to ", text)
    formula = text[:1] in "=+-@\t\r" and not re.match(r"[+-]?\d", text)
    return f"'{text}" if text and formula else text


def strings(value: Any) -> list[str]:
    """The members of a JSON list as text."""
    return [str(member) for member in value] if isinstance(value, list) else []


def objects(value: Any) -> dict[str, dict[str, Any]]:
    """The members of a JSON object that are objects themselves."""
    members = value.items() if isinstance(value, dict) else ()
    return {str(k): v for k, v in members if isinstance(v, dict)}


def counts(value: Any) -> dict[str, int | float]:
    members = value.items() if isinstance(value, dict) else ()
    return {str(k): v for k, v in members if is_number(v)}


def get(value: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """A nested JSON object, {} where any part of the way is missing or no object."""
    for key in keys:
        found = value.get(key)
        value = found if isinstance(found, dict) else {}
    return value

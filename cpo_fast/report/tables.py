"""Tables of a report, number formatting, and tables as CSV and Markdown."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cpo_fast.report.read import is_number

NAMES = {"majority": "Majority guess", "untrained": "Untrained", "sft": "SFT", "cpo": "CPO"} | {
    "images": "Image check",
    "graph": "Concept graph",
    "reference": "Reference",
    "counterfactual": "Counterfactuals",
    "evaluate": "Evaluation",
}
"""Display names of models and stages; others keep their own name."""

FIRST, LAST = ("cpo", "sft"), ("majority", "untrained")
NARROW_COLUMNS = 5
"""Number of columns, row heads included, that fit a page 390 pixels wide."""


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
    words: bool = False  # the cells hold words instead of figures
    column_notes: tuple[str, ...] = ()  # one per column, or empty

    @property
    def wide_only_column(self) -> int | None:
        """The column that a narrow page leaves out: the untrained model's, of five or more."""
        last = len(self.columns) - 1
        full = last + 1 >= NARROW_COLUMNS and self.columns[last] == NAMES["untrained"]
        return last if full else None

    @property
    def stacked(self) -> bool:
        """Whether a narrow page shows each row as a list of its cells."""
        shown = len(self.columns) - (self.wide_only_column is not None)
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


def format_number(value: Any) -> str:
    """Three significant digits and separated thousands; text unchanged; a dash for None."""
    if value is None:
        return "–"
    if not is_number(value):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\u202f").replace("-", "−")
    return f"{value:#.3g}".rstrip(".").replace("-", "−")


def format_percent(value: Any) -> str:
    return f"{100 * value:.1f}\u00a0%" if is_number(value) else "–"


def format_points(value: Any) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−") if is_number(value) else "–"


def format_seconds(value: Any) -> str:
    if not is_number(value):
        return "–"
    if value < 120:
        return f"{value:.3g}\u00a0s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}\u00a0h" if hours else f"{minutes}:{rest:02d}\u00a0min"


def bounds(figure: Mapping[str, Any]) -> tuple[float, float] | None:
    """The 95 % interval of a figure; None if it has none."""
    found = figure.get("interval")
    if not isinstance(found, list) or len(found) != 2 or not all(map(is_number, found)):
        return None
    return found[0], found[1]


def format_interval(figure: Mapping[str, Any], show: Callable[[Any], str] = format_percent) -> str:
    if (found := bounds(figure)) is None:
        return ""
    low, high = (show(bound).removesuffix("\u00a0%") for bound in found)
    return f"{low} to {high}" if low[0] in "+−" else f"{low}–{high}"


def number_cell(value: Any) -> Cell:
    return Cell(format_number(value))


def figure_cell(
    figure: Mapping[str, Any], show: Callable[[Any], str] = format_percent, best: bool = False
) -> Cell:
    """The value of a figure and its 95 % interval."""
    return Cell(show(figure.get("value")), format_interval(figure, show), best)


def significant(figure: Mapping[str, Any]) -> bool | None:
    """Whether the 95 % interval of a difference excludes 0; None without an interval."""
    if (found := bounds(figure)) is None:
        return None
    return found[0] > 0 or found[1] < 0


def shorten(text: str, length: int) -> str:
    """`text` in at most `length` characters; an ellipsis replaces the excess."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def table_csv(table: Table) -> str:
    """RFC 4180 text of a table; an interval or note has its own column after its cell.

    Numbers have a plain "-" and no thousands separators; a missing figure is an empty field. Text
    that a spreadsheet would run as a formula begins with an apostrophe.
    """
    names = [_with_note(*pair) for pair in _column_heads(table)]
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
    csv.writer(buffer).writerows(map(_csv_field, line) for line in zip(*kept, strict=True))
    return buffer.getvalue()


def table_markdown(table: Table) -> list[str]:
    """The table as Markdown, and its note if it has one."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    heads = [_with_note(name or " ", note) for name, note in _column_heads(table)]
    lines = [line(heads), "|" + "---|" * len(table.columns)]
    for row in table.rows:
        texts = [f"**{cell.text}**" if cell.best else cell.text for cell in row.cells]
        cells = [_with_note(text, cell.note) for text, cell in zip(texts, row.cells, strict=True)]
        lines.append(line([_with_note(row.head, row.note), *cells]))
    return ["\n".join(lines), *([table.note] if table.note else [])]


def _column_heads(table: Table) -> Iterable[tuple[str, str]]:
    notes = table.column_notes or ("",) * len(table.columns)
    return zip(table.columns, notes, strict=True)


def _with_note(text: str, note: str) -> str:
    return f"{text} ({note})" if note else text


def _csv_field(text: str) -> str:
    text = text.replace("\u00a0%", "%").replace("\u00a0", " ").replace("\u202f", "")
    text = "" if text == "–" else text.replace("−", "-")
    text = re.sub(r"(?<=\d)–(?=\d)", " to ", text)
    formula = text[:1] in "=+-@\t\r" and not re.match(r"[+-]?\d", text)
    return f"'{text}" if text and formula else text

"""Tables of a run (time, throughput, data), and tables that compare several runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cpo_fast.report.evaluation_tables import MEAN, METRIC_NAMES, figure_row, known_rows, unparsed
from cpo_fast.report.read import Run, counts, get, is_number, objects
from cpo_fast.report.tables import (
    Cell,
    Row,
    Table,
    format_number,
    format_percent,
    format_seconds,
    in_order,
    name_of,
    number_cell,
)

SHOWN_RECORDS = 12


def speed_table(run: Run) -> Table | None:
    """Steps, time and throughput of every stage in summary.json."""
    found = objects(run.part("stages"))
    stages = {name: found[name] for name in in_order(found)}
    rows_of = (
        ("steps", "Optimiser steps", format_number),
        ("seconds", "Wall time", format_seconds),
        ("pairs_per_second", "Pairs (SFT: samples) per second", format_number),
        ("physical_tokens_per_second", "Tokens computed per second", format_number),
        ("logical_tokens_per_second", "Logical tokens per second", format_number),
        ("packing_efficiency", "Share of packing_length filled", format_percent),
    )
    rows = tuple(
        Row(label, tuple(Cell(show(stage.get(key))) for stage in stages.values()))
        for key, label, show in rows_of
        if any(is_number(stage.get(key)) for stage in stages.values())
    )
    if not rows:
        return None
    columns = ("", *(name_of(stage) for stage in stages))
    note = (
        "Throughput leaves out start-up and two warm-up steps. A prompt that several answers share "
        "is computed once; logical tokens count it for every answer."
    )
    return Table("Stages", columns, rows, note)


def data_tables(run: Run) -> list[Table]:
    """Records read, used and set aside by reason; the first records set aside; targets."""
    data = run.part("data")
    tables = []
    reasons = counts(data.get("rejected"))
    totals = counts(data)
    if totals or reasons:
        rows = [Row(_label(k), (number_cell(v),)) for k, v in totals.items()]
        rows += [Row(f"Set aside: {name}", (number_cell(n),)) for name, n in reasons.items()]
        rows += [
            Row(f"{_label(k)}: {name_of(name)}", (number_cell(n),))
            for k, inner in data.items()
            if k != "rejected"
            for name, n in _nested_counts(inner)
        ]
        tables.append(Table("Records", ("", "Number"), tuple(rows)))
    if run.targets:
        rows = [Row(name, (number_cell(n),)) for name, n in run.targets.most_common()]
        total = f"{format_number(sum(run.targets.values()))} in all."
        tables.append(Table("Counterfactuals by target", ("", "Number"), tuple(rows), total))
    if run.rejected:
        rows = [
            Row(
                str(r.get("id") or "–"),
                tuple(Cell(str(r.get(key) or "")) for key in ("stage", "reason", "detail")),
                f"{r.get('file', '')}{':' + str(r['line']) if r.get('line') else ''}",
            )
            for r in sorted(run.rejected, key=lambda r: bool(r.get("stage")))[:SHOWN_RECORDS]
        ]
        more = "rejected_records.jsonl lists all." if len(run.rejected) > SHOWN_RECORDS else ""
        columns = ("Record", "Stage", "Reason", "Detail")
        tables.append(Table("Records set aside", columns, tuple(rows), more, words=True))
    return tables


def _nested_counts(value: Any) -> list[tuple[str, int | float]]:
    """The numbers of a JSON object and of the objects in it, with their names."""
    inner = [
        (f"{name}, {key}", n) for name, v in objects(value).items() for key, n in counts(v).items()
    ]
    return [*counts(value).items(), *inner]


def comparison_tables(runs: Sequence[Run], names: Sequence[str]) -> list[Table]:
    """One table per kind of figure with one column per run; only tables with rows."""
    columns = ("", *names)
    last_names, macro = zip(*map(_last_model, runs), strict=True)
    rows = [
        figure_row(label, [get(model, "macro", metric) for model in macro], note=MEAN)
        for metric, label in METRIC_NAMES.items()
    ]
    rows.append(figure_row("All findings right", [get(model, "exact_match") for model in macro]))
    preference = [objects(run.part("evaluation", "preference")) for run in runs]
    last = [models[in_order(models)[0]] if models else {} for models in preference]
    rows.append(figure_row("Held-out reward accuracy", [get(m, "accuracy") for m in last]))
    margins = [get(m, "margin") for m in last]
    rows.append(figure_row("Held-out reward margin", margins, format_number))
    note = "No run is marked as the best, because the runs can differ in their test studies."
    which = [
        ", ".join(filter(None, (name_of(name), unparsed(model))))
        for name, model in zip(last_names, macro, strict=True)
    ]
    models = ("", *which) if any(which) else ()
    caption = "Last model of each run"
    tables = [Table(caption, columns, known_rows(rows), note, column_notes=models)]
    speed = []
    for stage in dict.fromkeys(s for run in runs for s in objects(run.part("stages"))):
        pairs = "samples" if stage == "sft" else "pairs"
        for key, label, show in (
            ("seconds", "wall time", format_seconds),
            ("pairs_per_second", f"{pairs} per second", format_number),
            ("logical_tokens_per_second", "logical tokens per second", format_number),
        ):
            cells = tuple(Cell(show(run.part("stages", stage).get(key))) for run in runs)
            speed.append(Row(f"{name_of(stage)}: {label}", cells))
    tables.append(Table("Time and throughput", columns, known_rows(speed)))
    return [table for table in tables if table.rows]


def configuration_differences(runs: Sequence[Run], names: Sequence[str]) -> Table:
    """The configuration keys whose values differ between the runs."""
    configurations = [dict(flatten(run.config)) for run in runs]
    keys = dict.fromkeys(key for configuration in configurations for key in configuration)
    rows = tuple(
        Row(key, tuple(Cell(configuration.get(key, "–")) for configuration in configurations))
        for key in keys
        if len({configuration.get(key) for configuration in configurations}) > 1
    )
    return Table("Flags with different values", ("", *names), rows, words=True)


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested configuration as dotted keys and readable values."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield f"{prefix}{key}", ", ".join(map(str, value)) or "–"
        else:
            yield f"{prefix}{key}", "–" if value is None or value == "" else str(value)


def _label(key: str) -> str:
    return key.replace("_", " ").capitalize()


def _last_model(run: Run) -> tuple[str, Mapping[str, Any]]:
    """Name and figures of the last model evaluated; ("", {}) without an evaluation."""
    models = objects(run.part("evaluation", "classification"))
    return list(models.items())[-1] if models else ("", {})

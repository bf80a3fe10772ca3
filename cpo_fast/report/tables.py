"""The tables of a report: figures of summary.json put into rows, formatted once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpo_fast.report.read import Run

NAMES = {"majority": "Majority guess", "untrained": "Untrained", "sft": "SFT", "cpo": "CPO"} | {
    "graph": "Concept graph",
    "counterfactual": "Counterfactuals",
    "evaluate": "Evaluation",
}
"""How models and stages are called in a report; others go by their own name."""

METRIC_NAMES = {
    "accuracy": "Accuracy",
    "f1": "F1",
    "sensitivity": "Sensitivity",
    "precision": "Precision",
}
MEAN = "mean over findings"


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


def figure_row(
    head: str,
    figures: Sequence[Mapping[str, Any]],
    show: Callable[[Any], str] = percent,
    note: str = "",
) -> Row:
    """One metric across models; the highest is marked."""
    known = [f["value"] for f in figures if is_number(f.get("value"))]
    best = max(known) if len(known) > 1 and min(known) < max(known) else None
    cells = tuple(
        Cell(show(f.get("value")), interval(f, show), best is not None and f.get("value") == best)
        for f in figures
    )
    return Row(head, cells, note)


def evaluation_tables(evaluation: Mapping[str, Any]) -> list[Table]:
    """Overall, differences, per finding (accuracy, F1), preference, text, as far as they exist."""
    models = objects(evaluation.get("classification"))
    tables: list[Table] = []
    if models:
        columns = tuple(name_of(model) for model in models)
        rows = [
            figure_row(label, [get(m, "macro", metric) for m in models.values()], note=MEAN)
            for metric, label in METRIC_NAMES.items()
        ]
        rows.append(figure_row("F1, pooled", [get(m, "micro", "f1") for m in models.values()]))
        rows.append(
            figure_row("All findings right", [get(m, "exact_match") for m in models.values()])
        )
        unparsable = tuple(Cell(number(m.get("unparsable"))) for m in models.values())
        rows.append(Row("Answers not parsed", unparsable))
        guess = ", ".join(strings(evaluation.get("majority_guess"))) or "nothing"
        note = f"The majority guess always answers: {guess}." if "majority" in models else ""
        tables.append(Table("Diagnosis, overall", ("", *columns), tuple(rows), note))
        tables += _differences(objects(evaluation.get("differences")))
        found = findings_by_support(models)
        for metric, caption in (("accuracy", "Accuracy per finding"), ("f1", "F1 per finding")):
            per_finding = tuple(
                figure_row(
                    name,
                    [get(m, "findings", name, metric) for m in models.values()],
                    note=f"{support} stud{'y' if support == 1 else 'ies'}",
                )
                for name, support in found.items()
            )
            tables.append(Table(caption, ("", *columns), per_finding))
    tables += _preference(objects(evaluation.get("preference")))
    tables += _text(objects(evaluation.get("text")))
    tables += _zero_shot(objects(evaluation.get("zero_shot")))
    tables += _drift(objects(evaluation.get("drift")))
    tables += _progression(objects(evaluation.get("ms_cxr_t")))
    return tables


def findings_by_support(models: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """The findings that occur among the true labels with their number of studies, largest first."""
    findings = objects(next(iter(models.values()), {}).get("findings"))
    support = {name: figures.get("support") for name, figures in findings.items()}
    known = {name: n for name, n in support.items() if isinstance(n, int) and n > 0}
    return dict(sorted(known.items(), key=lambda item: -item[1]))


def _differences(pairs: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    def points(value: Any) -> str:
        return f"{100 * value:+.1f}".replace("-", "−") if is_number(value) else "–"

    rows = []
    for pair, figures in pairs.items():
        names = " − ".join(name_of(part) for part in pair.split(" - "))
        cells = []
        for metric in ("accuracy", "f1", "exact_match"):
            figure = get(figures, metric)
            cells.append(Cell(points(figure.get("value")), interval(figure, points)))
        rows.append(Row(names, tuple(cells)))
    columns = ("", "Accuracy", "F1", "All right")
    note = "Percentage points with 95 % intervals, paired by study."
    return [Table("Differences", columns, tuple(rows), note)] if rows else []


def _preference(models: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    if not models:
        return []
    models = {
        name if source is None else f"{name_of(name)}, {source}": figures
        for name, model in models.items()
        for source, figures in ((None, model), *objects(model.get("sources")).items())
    }
    columns = tuple(name_of(model) for model in models)
    wanted = (
        ("accuracy", "Reward accuracy", percent),
        ("margin", "Reward margin", number),
        ("policy_accuracy", "More likely than the rejected answer", percent),
    )
    rows = [
        figure_row(label, [get(m, key) for m in models.values()], show)
        for key, label, show in wanted
    ]
    pairs = tuple(Cell(number(m.get("pairs"))) for m in models.values())
    rows.append(Row("Held-out pairs", pairs))
    note = (
        "Reward: beta times the log-ratio to the reference model. A pair is won when the reward of "
        "the chosen answer is the higher one; the third row compares the model's own "
        "log-probabilities."
    )
    return [Table("Preference for the chosen answer", ("", *columns), tuple(rows), note)]


def _text(models: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    if not models:
        return []
    labels = {f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)} | {"rouge_l": "ROUGE-L"}
    labels |= {"meteor": "METEOR", "cider": "CIDEr-D", "label_f1": "Label F1, pooled"}

    def shown(model: Mapping[str, Any], key: str) -> dict[str, Any]:
        intervals = model.get("intervals")
        bounds = intervals.get(key) if isinstance(intervals, dict) else None
        return {"value": model.get(key), "interval": bounds}

    rows = [
        figure_row(label, [shown(model, key) for model in models.values()], number)
        for key, label in labels.items()
        if any(key in m for m in models.values())
    ]
    columns = ("", *(name_of(model) for model in models))
    note = str(next(iter(models.values())).get("variants", ""))
    note = note[:1].upper() + note[1:] + "." if note else ""
    if missing := strings(next(iter(models.values())).get("missing")):
        note += f" Not installed here: {', '.join(labels.get(name, name) for name in missing)}."
    return [Table("Thought against the radiologist's report", columns, tuple(rows), note)]


def _zero_shot(models: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """AUC per finding from likelihoods; findings without both cases and controls are left out."""
    if not models:
        return []
    findings = dict.fromkeys(f for m in models.values() for f in objects(m.get("findings")))
    rows = [figure_row("Mean", [get(m, "macro") for m in models.values()], number)]
    rows += [
        figure_row(f, [get(m, "findings", f) for m in models.values()], number) for f in findings
    ]
    columns = ("", *(name_of(model) for model in models))
    note = "Score: the likelihood of each finding's sentence after the model's own thought."
    return [Table("Zero-shot AUC", columns, _known(rows), note)]


def _drift(models: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    if not models:
        return []
    wanted = (
        ("studies", "Studies probed"),
        ("without_thought", "Answers without a thought, left out"),
        ("change_points", "Change points per thought"),
        ("mean_variation", "Mean variation per token"),
        ("largest_variation", "Largest variation in a thought, mean"),
    )
    rows = [
        Row(label, tuple(Cell(number(m.get(key))) for m in models.values()))
        for key, label in wanted
    ]
    kinds = dict.fromkeys(kind for m in models.values() for kind in objects(m.get("swaps")))
    labels = {"synonym": "a near-synonym", "side": "the other side", "negation": "a negation"}
    labels["hallmark"] = "another disease's hallmark"
    for kind in kinds:
        found = [get(m, "swaps", kind) for m in models.values()]
        cells = tuple(Cell(number(f.get("variation")), f"{f.get('swaps', 0)} swaps") for f in found)
        rows.append(Row(f"Variation by {labels.get(kind, kind)}", cells))
    note = (
        "Variation: total variation, 0 to 1, of the distribution over findings that the thought "
        "would end on; a change point moves it by 0.1 or more. Near-synonyms and sides should not "
        "move it, negations and another disease's hallmark should."
    )
    columns = ("", *(name_of(model) for model in models))
    return [Table("Drift of the diagnosis along the thought", columns, tuple(rows), note)]


def _progression(models: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """MS-CXR-T, one table per model: both protocols side by side."""
    tables = []
    for name, found in models.items():
        a, b = get(found, "A"), get(found, "B")
        columns = ((a, "micro"), (a, "macro"), (b, "top_1"))
        rows = [Row("Mean", tuple(_percent_cell(get(part, key)) for part, key in columns))]
        for finding, figures in objects(a.get("findings")).items():
            cells = tuple(_percent_cell(get(p, "findings", finding, key)) for p, key in columns)
            rows.append(Row(finding, cells, f"{figures.get('cases', 0)} cases"))
        heads = ("", "A, micro", "A, macro", "B, top-1")
        tables.append(Table(f"MS-CXR-T, {name_of(name)}", heads, tuple(rows)))
    return tables


def _percent_cell(figure: Mapping[str, Any]) -> Cell:
    return Cell(percent(figure.get("value")), interval(figure))


def speed_table(run: Run) -> Table | None:
    """Steps, time and throughput of every stage in summary.json."""
    stages = objects(run.part("stages"))
    rows_of = (
        ("steps", "Optimiser steps", number),
        ("seconds", "Wall time", seconds),
        ("pairs_per_second", "Pairs (SFT: samples) per second", number),
        ("physical_tokens_per_second", "Tokens computed per second", number),
        ("logical_tokens_per_second", "Tokens per second as if unshared", number),
        ("packing_efficiency", "Tokens in packs, of --packing_length", percent),
    )
    rows = tuple(
        Row(label, tuple(Cell(show(stage.get(key))) for stage in stages.values()))
        for key, label, show in rows_of
        if any(is_number(stage.get(key)) for stage in stages.values())
    )
    if not rows:
        return None
    columns = ("", *(name_of(stage) for stage in stages))
    note = "Throughput leaves out start-up and two warm-up steps."
    return Table("Stages", columns, rows, note)


def data_tables(run: Run) -> list[Table]:
    """What was read, used and set aside and why; the first set-aside records; targets."""
    data = run.part("data")
    tables = []
    reasons = counts(data.get("rejected"))
    counted = {k: v for k, v in data.items() if is_number(v)}
    if counted or reasons:
        rows = [Row(_words(k), (Cell(number(v)),)) for k, v in counted.items()]
        rows += [Row(f"Set aside: {reason}", (Cell(number(n)),)) for reason, n in reasons.items()]
        rows += [
            Row(f"{_words(k)}: {name}", (Cell(number(n)),))
            for k, inner in data.items()
            if k != "rejected"
            for name, n in _counted(inner)
        ]
        tables.append(Table("Records", ("", "Number"), tuple(rows)))
    if run.targets:
        rows = [Row(name, (Cell(number(n)),)) for name, n in run.targets.most_common()]
        total = f"{number(sum(run.targets.values()))} in all."
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
        more = "rejected_records.jsonl lists them all." if len(run.rejected) > SHOWN_RECORDS else ""
        columns = ("Record", "Stage", "Reason", "Detail")
        tables.append(Table("Records set aside", columns, tuple(rows), more, words=True))
    return tables


SHOWN_RECORDS = 12


def _counted(value: Any) -> list[tuple[str, int | float]]:
    """The numbers of a JSON object and of the objects in it, by their names."""
    inner = [
        (f"{name}, {key}", n) for name, v in objects(value).items() for key, n in counts(v).items()
    ]
    return [*counts(value).items(), *inner]


def comparison_tables(runs: Sequence[Run], names: Sequence[str]) -> list[Table]:
    """One table per kind of figure, runs across."""
    columns = ("", *names)
    macro = [_last_model(run) for run in runs]
    rows = [
        figure_row(label, [get(model, "macro", metric) for model in macro], note=MEAN)
        for metric, label in METRIC_NAMES.items()
    ]
    rows.append(figure_row("All findings right", [get(model, "exact_match") for model in macro]))
    preference = [list(objects(run.part("evaluation", "preference")).values()) for run in runs]
    last = [models[-1] if models else {} for models in preference]
    rows.append(figure_row("Held-out reward accuracy", [get(m, "accuracy") for m in last]))
    rows.append(figure_row("Held-out reward margin", [get(m, "margin") for m in last], number))
    tables = [Table("Last model of each run", columns, _known(rows))]
    speed = []
    for stage in dict.fromkeys(s for run in runs for s in objects(run.part("stages"))):
        for key, label, show in (
            ("seconds", "wall time", seconds),
            ("pairs_per_second", "pairs per second", number),
            ("logical_tokens_per_second", "tokens per second as if unshared", number),
        ):
            cells = tuple(Cell(show(run.part("stages", stage).get(key))) for run in runs)
            speed.append(Row(f"{name_of(stage)}: {label}", cells))
    tables.append(Table("Time and throughput", columns, _known(speed)))
    return [table for table in tables if table.rows]


def configuration_differences(runs: Sequence[Run], names: Sequence[str]) -> Table:
    """The configuration keys whose values are not the same in all runs."""
    configurations = [dict(flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for configuration in configurations for key in configuration)
    rows = tuple(
        Row(key, tuple(Cell(configuration.get(key, "–")) for configuration in configurations))
        for key in keys
        if len({configuration.get(key) for configuration in configurations}) > 1
    )
    return Table("Flags with different values", ("", *names), rows, words=True)


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested configuration as dotted keys and readable values."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield f"{prefix}{key}", ", ".join(map(str, value)) or "–"
        else:
            yield f"{prefix}{key}", "–" if value is None or value == "" else str(value)


def _words(key: str) -> str:
    return key.replace("_", " ").capitalize()


def _known(rows: Sequence[Row]) -> tuple[Row, ...]:
    return tuple(row for row in rows if any(cell.text != "–" for cell in row.cells))


def _last_model(run: Run) -> Mapping[str, Any]:
    models = list(objects(run.part("evaluation", "classification")).values())
    return models[-1] if models else {}


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

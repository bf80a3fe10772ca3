"""Tables of the `evaluation` part of summary.json, for the page and the model card."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cpo_fast.counting import counted
from cpo_fast.report.read import get, is_number, objects, strings
from cpo_fast.report.tables import (
    Cell,
    Row,
    Table,
    bounds,
    figure_cell,
    format_number,
    format_percent,
    format_points,
    in_order,
    name_of,
    number_cell,
    significant,
)

METRIC_NAMES = {
    "accuracy": "Accuracy",
    "f1": "F1",
    "sensitivity": "Sensitivity",
    "precision": "Precision",
}
MEAN = "mean over findings"
BEST = (
    "Bold: significantly better than every other column. The 95 % interval of the paired "
    "difference excludes 0; if no paired difference is known, the intervals do not overlap. "
    "A row without bold has no significantly best column."
)
NONE_PARSED = "no answer parsed"

Figure = Mapping[str, Any]
Find = Callable[[Mapping[str, Any]], Figure]
"""Finds one figure in the figures of a model, or of the difference of two models."""


def figure_row(
    head: str,
    figures: Sequence[Figure],
    show: Callable[[Any], str] = format_percent,
    note: str = "",
    best: int | None = None,
) -> Row:
    """One metric across models; the figure at index `best` is marked."""
    cells = (figure_cell(figure, show, i == best) for i, figure in enumerate(figures))
    return Row(head, tuple(cells), note)


def clear_best(
    figures: Mapping[str, Figure], differences: Mapping[str, Figure] | None = None
) -> int | None:
    """The index of the figure that is significantly higher than every other one, else None.

    `differences["a - b"]` is the paired difference of the figures of a and b. Two figures without a
    paired difference differ significantly if their intervals do not overlap.
    """
    known = {name: f for name, f in figures.items() if is_number(f.get("value"))}
    if len(known) < 2:
        return None
    best = max(known, key=lambda name: known[name]["value"])
    higher = (_higher(best, name, known, differences or {}) for name in known if name != best)
    return list(figures).index(best) if all(higher) else None


def _higher(
    best: str, other: str, figures: Mapping[str, Figure], differences: Mapping[str, Figure]
) -> bool:
    if figures[best]["value"] <= figures[other]["value"]:
        return False
    for pair in (f"{best} - {other}", f"{other} - {best}"):
        if (known := significant(differences.get(pair, {}))) is not None:
            return known
    high, low = bounds(figures[best]), bounds(figures[other])
    return high is not None and low is not None and high[0] > low[1]


def evaluation_tables(evaluation: Mapping[str, Any]) -> list[Table]:
    """The tables of all results that exist, for example diagnosis, differences, preference."""
    return [
        *_classification(evaluation),
        *_preference(objects(evaluation.get("preference"))),
        *_text(objects(evaluation.get("text"))),
        *_zero_shot(objects(evaluation.get("zero_shot"))),
        *_drift(objects(evaluation.get("drift"))),
        *_progression(objects(evaluation.get("ms_cxr_t"))),
    ]


def _ordered(models: Mapping[str, Any]) -> dict[str, Any]:
    return {name: models[name] for name in in_order(models)}


def _classification(evaluation: Mapping[str, Any]) -> list[Table]:
    models = _ordered(objects(evaluation.get("classification")))
    if not models:
        return []
    pairs = objects(evaluation.get("differences"))
    columns = ("", *(name_of(model) for model in models))
    lost = ("", *(unparsed(figures) for figures in models.values()))
    wrong = "An answer that cannot be parsed counts as wrong for every finding."
    wrong = wrong if any(lost) else ""

    def row(head: str, find: Find, note: str = "") -> Row:
        found = {model: find(figures) for model, figures in models.items()}
        best = clear_best(found, {pair: find(figures) for pair, figures in pairs.items()})
        return figure_row(head, list(found.values()), note=note, best=best)

    def table(caption: str, rows: Sequence[Row], *notes: str) -> Table:
        note = " ".join(filter(None, notes))
        return Table(caption, columns, tuple(rows), note, column_notes=lost if any(lost) else ())

    rows = [
        row(label, _first(("macro", metric), (metric,)), MEAN)
        for metric, label in METRIC_NAMES.items()
    ]
    rows.append(row("F1, pooled", _first(("micro", "f1"), ("micro_f1",))))
    rows.append(row("All findings right", _first(("exact_match",))))
    not_parsed = tuple(number_cell(m.get("unparsable")) for m in models.values())
    rows.append(Row("Answers not parsed", not_parsed))
    guess = ", ".join(strings(evaluation.get("majority_guess"))) or "none"
    majority = f"Majority guess: the findings of more than half of the training studies ({guess})."
    majority = majority if "majority" in models else ""
    tables = [table("Diagnosis, overall", rows, wrong, majority)]
    tables += _differences(pairs, models)
    found = findings_by_support(models)
    for metric, caption in (("accuracy", "Accuracy per finding"), ("f1", "F1 per finding")):
        per_finding = [
            row(
                name,
                _first(("findings", name, metric)),
                counted(support, "study", "studies"),
            )
            for name, support in found.items()
        ]
        tables.append(table(caption, per_finding, wrong))
    return tables


def _first(*paths: tuple[str, ...]) -> Find:
    """Finds a figure at the first of `paths` that exists; the figures of a model and of a
    difference have different paths."""

    def find(figures: Mapping[str, Any]) -> Figure:
        return next((found for path in paths if (found := get(figures, *path))), {})

    return find


def unparsed(figures: Mapping[str, Any]) -> str:
    """A note on a model's answers that cannot be parsed; "" if there are none."""
    share = unparsed_share(figures)
    if share and figures.get("unparsable") == figures.get("studies"):
        return NONE_PARSED
    return f"{share} not parsed" if share else ""


def unparsed_share(figures: Mapping[str, Any]) -> str:
    """The share of a model's answers that cannot be parsed; their number if the total is unknown;
    "" if there are none."""
    lost, studies = figures.get("unparsable"), figures.get("studies")
    if not is_number(lost) or not lost:
        return ""
    return format_percent(lost / studies) if is_number(studies) and studies else format_number(lost)


def findings_by_support(models: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """The findings among the true labels with their number of studies, largest first."""
    found = (objects(figures.get("findings")) for figures in models.values())
    findings: dict[str, dict[str, Any]] = next(filter(None, found), {})
    support = {name: figures.get("support") for name, figures in findings.items()}
    known = {name: n for name, n in support.items() if isinstance(n, int) and n > 0}
    return dict(sorted(known.items(), key=lambda item: -item[1]))


def _differences(
    pairs: Mapping[str, Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]]
) -> list[Table]:
    names = list(models)
    parts = {pair: pair.split(" - ") for pair in pairs}
    shown = [pair for pair in pairs if len(parts[pair]) == 2 and set(parts[pair]) <= set(names)]
    shown = [pair for pair in shown if parts[pair][0] != "untrained"]
    shown.sort(key=lambda pair: [names.index(part) for part in parts[pair]])
    rows = []
    for pair in shown:
        cells = []
        for metric in ("accuracy", "f1", "exact_match"):
            figure = get(pairs[pair], metric)
            cells.append(figure_cell(figure, format_points, bool(significant(figure))))
        lost = [
            f"{name_of(part)}: {share}" for part in parts[pair] if (share := unparsed(models[part]))
        ]
        rows.append(Row(" − ".join(map(name_of, parts[pair])), tuple(cells), "; ".join(lost)))
    columns = ("", "Accuracy", "F1", "All right")
    note = (
        "Percentage points with 95 % intervals, paired by study. Bold: the interval excludes 0, so "
        "the difference is significant. Accuracy and F1 are means over findings."
    )
    return [Table("Differences", columns, tuple(rows), note)] if rows else []


def _preference(models: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    if not models:
        return []
    shown = {
        name_of(name) if source is None else f"{name_of(name)}, {source}": figures
        for name, model in _ordered(models).items()
        for source, figures in ((None, model), *objects(model.get("sources")).items())
    }
    wanted = (
        ("accuracy", "Reward accuracy", format_percent),
        ("margin", "Reward margin", format_number),
        ("policy_accuracy", "Chosen answer more likely", format_percent),
    )
    rows = [
        figure_row(label, [get(m, key) for m in shown.values()], show)
        for key, label, show in wanted
    ]
    rows.append(Row("Pairs", tuple(number_cell(m.get("pairs")) for m in shown.values())))
    splits = sorted({str(m["split"]) for m in models.values() if m.get("split")})
    notes = [
        "Held-out pairs." if split == "validate" else f"Pairs of the {split} split."
        for split in splits
    ]
    if any(get(m, "accuracy") for m in shown.values()):
        notes.append(
            f"Reward: beta{_betas(shown)} times the log-ratio of the model to the reference, the "
            "model before this training. Reward accuracy: the share of pairs whose chosen answer "
            "has the higher reward."
        )
    notes.append(
        "Chosen answer more likely: the share of pairs whose chosen answer has the higher "
        "log-probability under the model itself. Log-probabilities are summed over the tokens of "
        "an answer and not divided by its length, which favours short answers."
    )
    table = Table(
        "Preference for the chosen answer", ("", *shown), known_rows(rows), " ".join(notes)
    )
    return [table] if table.rows else []


def _betas(models: Mapping[str, Mapping[str, Any]]) -> str:
    found = sorted({m["beta"] for m in models.values() if is_number(m.get("beta"))})
    return f" ({', '.join(map(format_number, found))})" if found else ""


def _text(models: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    if not models:
        return []
    models = _ordered(models)
    labels = {f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)} | {"rouge_l": "ROUGE-L"}
    labels |= {"meteor": "METEOR", "cider": "CIDEr-D", "label_f1": "Label F1, pooled"}

    def shown(model: Mapping[str, Any], key: str) -> dict[str, Any]:
        intervals = model.get("intervals")
        bounds = intervals.get(key) if isinstance(intervals, dict) else None
        return {"value": model.get(key), "interval": bounds}

    rows = [
        _marked_row(label, {name: shown(model, key) for name, model in models.items()})
        for key, label in labels.items()
        if any(key in m for m in models.values())
    ]
    columns = ("", *(name_of(model) for model in models))
    note = str(next(iter(models.values())).get("variants", ""))
    note = note[:1].upper() + note[1:] + "." if note else ""
    if missing := strings(next(iter(models.values())).get("missing")):
        note += f" Not installed here: {', '.join(labels.get(name, name) for name in missing)}."
    return [Table("Thought compared with the report", columns, tuple(rows), note)]


def _marked_row(head: str, figures: Mapping[str, Figure]) -> Row:
    return figure_row(head, list(figures.values()), format_number, best=clear_best(figures))


def _zero_shot(models: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """AUC per finding from likelihoods, for findings with both cases and controls."""
    if not models:
        return []
    models = _ordered(models)
    findings = dict.fromkeys(f for m in models.values() for f in objects(m.get("findings")))
    rows = [_marked_row("Mean", {name: get(m, "macro") for name, m in models.items()})]
    rows += [
        _marked_row(f, {name: get(m, "findings", f) for name, m in models.items()})
        for f in findings
    ]
    columns = ("", *(name_of(model) for model in models))
    note = (
        "AUC: area under the ROC curve; 0.5 is chance. The score is the likelihood of each "
        "finding's sentence after the model's own thought."
    )
    return [Table("Zero-shot AUC", columns, known_rows(rows), note)]


def _drift(models: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    if not models:
        return []
    models = _ordered(models)
    wanted = (
        ("studies", "Studies probed"),
        ("without_thought", "Answers without a thought, left out"),
        ("change_points", "Change points per thought"),
        ("mean_variation", "Mean variation per token"),
        ("largest_variation", "Largest variation in a thought, mean"),
    )
    rows = [
        Row(label, tuple(number_cell(m.get(key)) for m in models.values())) for key, label in wanted
    ]
    kinds = dict.fromkeys(kind for m in models.values() for kind in objects(m.get("swaps")))
    labels = {"synonym": "a near-synonym", "side": "the other side", "negation": "a negation"}
    labels["hallmark"] = "another disease's hallmark"
    for kind in kinds:
        found = [get(m, "swaps", kind) for m in models.values()]
        notes = (counted(f.get("swaps", 0), "swap") for f in found)
        cells = map(Cell, (format_number(f.get("variation")) for f in found), notes)
        rows.append(Row(f"Variation by {labels.get(kind, kind)}", tuple(cells)))
    note = (
        "Variation: total variation distance, 0 to 1, between the distributions over findings "
        "before and after the change. Change point: a token with a variation of 0.1 or more. "
        "Near-synonyms and sides should not change the distribution; negations and another "
        "disease's hallmark should."
    )
    columns = ("", *(name_of(model) for model in models))
    return [Table("Drift of the diagnosis along the thought", columns, tuple(rows), note)]


def _progression(models: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """MS-CXR-T: one table per model with both protocols side by side."""
    tables = []
    note = (
        "Progression (protocol A): improving, stable or worsening, by the likelihood of three "
        "sentences. Micro: the share of right cases. Macro: the mean of that share over the "
        "classes that occur. Presence (protocol B): the share of cases with the finding whose "
        "generated diagnosis names it."
    )
    for name in in_order(models):
        a, b = get(models[name], "A"), get(models[name], "B")
        columns = ((a, "micro"), (a, "macro"), (b, "top_1"))
        rows = [Row("Mean", tuple(figure_cell(get(part, key)) for part, key in columns))]
        for finding, figures in objects(a.get("findings")).items():
            cells = tuple(figure_cell(get(p, "findings", finding, key)) for p, key in columns)
            rows.append(Row(finding, cells, counted(figures.get("cases", 0), "case")))
        heads = ("", "Progression, micro", "Progression, macro", "Presence")
        tables.append(Table(f"MS-CXR-T, {name_of(name)}", heads, tuple(rows), note))
    return tables


def known_rows(rows: Sequence[Row]) -> tuple[Row, ...]:
    return tuple(row for row in rows if any(cell.text != "–" for cell in row.cells))

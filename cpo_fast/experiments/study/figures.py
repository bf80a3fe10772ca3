"""Means over seeds with intervals, in the layout of the paper's tables.

An interval is the 95 % interval of the mean over seeds (Student's t). Every seed draws phantom,
model and order, so the interval covers all three. Differences are paired by seed. The paper's
figures (arXiv 2505.13081, tables 2 and 5) are shown beside ours; data, scale and protocol differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cpo_fast.counting import counted
from cpo_fast.experiments.study.arms import ANSWERS, ARMS, CPO, MORE, PLUS, RANDOM, SFT, SFT_ANSWERS
from cpo_fast.experiments.study.measure import PAPER_FINDINGS
from cpo_fast.report.tables import (
    Cell,
    Row,
    Table,
    figure_cell,
    format_interval,
    format_number,
    format_percent,
    format_points,
    significant,
    table_markdown,
)

Figures = Mapping[str, float | None]
Figure = dict[str, Any]

PAPER_TABLE_2 = {
    SFT: (54.9, 71.7, 70.0, 95.9, 76.5, 73.8),
    RANDOM: (63.2, 72.4, 76.7, 93.5, 76.3, 76.4),
    CPO: (77.7, 72.7, 87.4, 95.8, 75.3, 81.8),
}
PAPER_TABLE_5 = {SFT_ANSWERS: 73.8, SFT: 74.9, ANSWERS: 78.3, CPO: 81.8}
OTHER = "the paper: 7B model, MIMIC-CXR, MS-CXR-T; other data, another scale and protocol"
NAMES = {"majority": "Majority guess"} | ARMS | MORE


def build_results(
    seeds: Mapping[int, Mapping[str, Figures]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """study.json: {"settings", "seeds", "arms" {arm: {figure: mean}}, "differences", "paper"}.

    A mean is {"value", "interval", "seeds"}; the interval is None for fewer than two seeds.
    """
    by_arm: dict[str, list[Figures]] = {}
    for measured in seeds.values():
        for arm, figures in measured.items():
            by_arm.setdefault(arm, []).append(figures)
    pairs = [(CPO, SFT), (CPO, RANDOM), (CPO, ANSWERS), (RANDOM, SFT), (ANSWERS, SFT_ANSWERS),
             (SFT, SFT_ANSWERS)]  # fmt: skip
    if PLUS in by_arm:
        pairs += [(PLUS, CPO), (PLUS, SFT)]
    return {
        "settings": dict(settings),
        "seeds": list(seeds),
        "arms": {arm: average_figures(figures, shares=True) for arm, figures in by_arm.items()},
        "differences": {
            f"{a} - {b}": average_figures(
                [_subtract(x, y) for x, y in zip(by_arm[a], by_arm[b], strict=True)]
            )
            for a, b in pairs
        },
        "paper": {"table 2": PAPER_TABLE_2, "table 5": PAPER_TABLE_5, "note": OTHER},
        "by_seed": by_arm,
    }


def average_figures(seeds: Sequence[Figures], *, shares: bool = False) -> dict[str, Figure]:
    """Mean over seeds of every figure, without seeds where it is undefined.

    `shares`: the figures (except counts) and their intervals are limited to 0..1.
    """
    return {
        key: average(
            [one.get(key) for one in seeds], shares=shares and not key.endswith("/studies")
        )
        for key in seeds[0]
    }


def average(values: Sequence[float | None], *, shares: bool = False) -> Figure:
    from scipy.stats import t

    known = [value for value in values if value is not None]
    if not known:
        return {"value": None, "interval": None, "seeds": 0}
    middle = sum(known) / len(known)
    bounds = None
    if len(known) > 1:
        spread = math.sqrt(sum((x - middle) ** 2 for x in known) / (len(known) - 1))
        half = float(t.ppf(0.975, len(known) - 1)) * spread / math.sqrt(len(known))
        bounds = [middle - half, middle + half]
        if shares:
            bounds = [max(0.0, bounds[0]), min(1.0, bounds[1])]
    return {"value": middle, "interval": bounds, "seeds": len(known)}


def _subtract(one: Figures, other: Figures) -> dict[str, float | None]:
    return {
        key: None if (a := one[key]) is None or (b := other[key]) is None else a - b for key in one
    }


def build_tables(outcome: Mapping[str, Any]) -> list[Table]:
    """The paper's tables 2 and 5 with our figures, drift, F1 and differences."""
    arms = outcome["arms"]
    seeds = len(outcome["seeds"])
    note = f"Means over {counted(seeds, 'seed')} with 95 % intervals (Student's t over seeds)."
    return [
        _build_table_2(arms, note),
        _build_table_5(arms),
        _build_drift(arms, note),
        _build_differences(outcome["differences"]),
        _build_per_finding(arms, "f1", "F1 per finding"),
    ]


def _build_table_2(arms: Mapping[str, Any], note: str) -> Table:
    rows = []
    for arm, figures in arms.items():
        keys = [*(f"accuracy/{name}" for name in PAPER_FINDINGS.values()), "accuracy/mean5"]
        rows.append(
            Row(NAMES[arm], tuple(figure_cell(figures.get(key, {})) for key in keys), "phantom")
        )
        if arm in PAPER_TABLE_2:
            cells = tuple(Cell(format_percent(value / 100)) for value in PAPER_TABLE_2[arm])
            rows.append(Row(NAMES[arm], cells, "the paper, other data and scale"))
    return Table(
        "Accuracy per finding, as the paper's table 2",
        ("", *PAPER_FINDINGS, "Mean"),
        tuple(rows),
        f"{note} Ours: presence of the finding, parsed from the generated diagnosis. "
        "The majority guess, which needs no model, is already right most of the time. "
        f"{OTHER[0].upper()}{OTHER[1:]}.",
    )


def _build_table_5(arms: Mapping[str, Any]) -> Table:
    def row(arm: str, thought: str, cpo: str) -> Row:
        own = [figure_cell(arms[arm].get(f"{metric}/mean5", {})) for metric in ("accuracy", "f1")]
        drift = figure_cell(arms[arm].get("swap/synonym", {}), format_number)
        paper = Cell(format_percent(PAPER_TABLE_5[arm] / 100))
        return Row(NAMES[arm], (Cell(thought), Cell(cpo), *own, drift, paper))

    rows = (
        row(SFT_ANSWERS, "", ""),
        row(SFT, "yes", ""),
        row(ANSWERS, "", "yes"),
        row(CPO, "yes", "yes"),
    )
    return Table(
        "Thought and CPO, as the paper's table 5",
        ("", "Thought", "CPO", "Accuracy", "F1", "Synonym drift", "Paper"),
        rows,
        "Means of the five findings. The two rows of SFT are one model, asked for the diagnosis "
        "with and without a thought; the arms start from it.",
    )


DRIFT_ROWS = (
    ("drifted/accuracy", "Accuracy, reports with a drifting word", format_percent),
    ("drifted/pairs", "Accuracy there, the drifting findings", format_percent),
    ("accuracy/mean", "Accuracy, whole test split", format_percent),
    ("exact", "All findings right", format_percent),
    ("unparsable", "Answers not parsed", format_percent),
    ("swap/synonym", "Variation by a near-synonym", format_number),
    ("swap/drifting", "Variation by a drifting near-synonym", format_number),
    ("swap/side", "Variation by the other side", format_number),
    ("swap/negation", "Variation by a negation", format_number),
    ("swap/hallmark", "Variation by another disease's hallmark", format_number),
    ("flip/synonym", "Likeliest finding changed by a near-synonym", format_percent),
    ("flip/negation", "Likeliest finding changed by a negation", format_percent),
    ("flip/hallmark", "Likeliest finding changed by a hallmark", format_percent),
)


def _build_drift(arms: Mapping[str, Any], note: str) -> Table:
    rows = tuple(
        Row(label, tuple(figure_cell(figures.get(key, {}), show) for figures in arms.values()))
        for key, label, show in DRIFT_ROWS
    )
    return Table(
        "The drifted test split, and drift under swaps",
        ("", *(NAMES[arm] for arm in arms)),
        rows,
        f"{note} The test split lies latest in time: two pairs of near-synonyms lean to other "
        "findings there than in training. Variation: total variation, 0 to 1, of the distribution "
        "over findings after the radiologist's report; near-synonyms and sides should not move "
        "it, negations and hallmarks should.",
    )


DIFFERENCE_COLUMNS = {
    "accuracy/mean5": "Accuracy, five",
    "accuracy/mean": "Accuracy, all",
    "f1/mean": "F1, all",
    "drifted/accuracy": "Accuracy, drifted",
    "swap/synonym": "Synonym variation",
    "swap/negation": "Negation variation",
}


def _build_differences(pairs: Mapping[str, Any]) -> Table:
    rows = [
        Row(
            " − ".join(NAMES[part] for part in pair.split(" - ")),
            tuple(figure_cell(figures.get(key, {}), format_points) for key in DIFFERENCE_COLUMNS),
        )
        for pair, figures in pairs.items()
    ]
    note = "In hundredths, paired by seed; an interval that holds 0 shows no difference."
    return Table("Differences", ("", *DIFFERENCE_COLUMNS.values()), tuple(rows), note)


def _build_per_finding(arms: Mapping[str, Any], metric: str, caption: str) -> Table:
    means = {"mean5": "Mean of the five", "mean": "Mean"}
    rows = []
    for key in (key for key in arms[SFT] if key.startswith(f"{metric}/")):
        name = key.removeprefix(f"{metric}/")
        cells = tuple(figure_cell(figures.get(key, {})) for figures in arms.values())
        rows.append(Row(means.get(name, name), cells))
    return Table(caption, ("", *(NAMES[arm] for arm in arms)), tuple(rows))


def summarise(outcome: Mapping[str, Any]) -> str:
    """The main results in one or two sentences, whether or not they support the claim."""
    sentences = []
    for key, label in (
        ("accuracy/mean5", "Accuracy, mean of the five findings"),
        ("swap/synonym", "Variation by near-synonyms"),
    ):
        parts = []
        for other in (SFT, RANDOM):
            figure = outcome["differences"][f"{CPO} - {other}"][key]
            if figure["value"] is None:
                continue
            known = format_interval(figure, format_points) or "one seed"
            word = "a difference" if significant(figure) else "no difference shown"
            parts.append(
                f"{format_points(figure['value'])} against {NAMES[other]} ({known}: {word})"
            )
        sentences.append(f"{label}: CPO {' and '.join(parts)}." if parts else "")
    return " ".join(sentence for sentence in sentences if sentence) + " In hundredths."


def format_markdown(outcome: Mapping[str, Any]) -> str:
    """The content of study.md: the tables of the page."""
    lines = ["# The study on the phantom", "", summarise(outcome), ""]
    settings = ", ".join(f"{name} {value}" for name, value in outcome["settings"].items())
    lines += [f"Seeds {', '.join(map(str, outcome['seeds']))}; {settings}.", ""]
    for table in build_tables(outcome):
        for part in (f"## {table.caption}", *table_markdown(table)):
            lines += [part, ""]
    return "\n".join(lines)

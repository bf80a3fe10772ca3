"""study.html: the tables and the figures per finding of a study, in one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpo_fast.counting import counted
from cpo_fast.experiments.study.arms import ARMS, MORE
from cpo_fast.experiments.study.figures import build_tables, summarise
from cpo_fast.experiments.study.measure import PAPER_FINDINGS
from cpo_fast.folders import write_private
from cpo_fast.report.figures import intervals
from cpo_fast.report.page import pictures, render


def write_study_page(path: Path, outcome: Mapping[str, Any]) -> Path:
    """Write `path` (0600) and its figures beside it from the content of study.json."""
    rows = [*PAPER_FINDINGS.values(), "Mean of the five"]
    keys = [*PAPER_FINDINGS.values(), "mean5"]
    arms = {arm: name for arm, name in (ARMS | MORE).items() if arm in outcome["arms"]}
    panels = [
        intervals(
            f"study_{metric}",
            title,
            rows,
            {arm: [outcome["arms"][arm][f"{metric}/{key}"] for key in keys] for arm in arms},
            arms,
        )
        for metric, title in (("accuracy", "Accuracy per finding"), ("f1", "F1 per finding"))
    ]
    context = {
        "title": "Counterfactuals against random negatives",
        "lead": summarise(outcome),
        "meta": [
            "phantom data (drawn and written, not medicine)",
            counted(len(outcome["seeds"]), "seed"),
            *(f"{name} {value}" for name, value in outcome["settings"].items()),
        ],
        "sections": [("figures", "Figures"), ("tables", "Tables")],
        "pictures": pictures(panels, path.parent / "figures"),
        "tables": build_tables(outcome),
    }
    write_private(path, render("study.html", context).encode())
    return path

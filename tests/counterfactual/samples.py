"""Synthetic reports in several styles for the tests of counterfactuals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from cpo_fast.concepts import load_graph
from cpo_fast.counterfactual.graph.rewrite import rewrite
from cpo_fast.types import ImageRef, Report, Study

GRAPH = load_graph()

NORMAL = Report(
    "Heart size and pulmonary vascularity are within normal limits. The mediastinal contour is "
    "normal. The lungs are clear. The pleural spaces are clear. No focal consolidation, "
    "pneumothorax, or pleural effusion is seen. There is an old healed fracture of the left "
    "clavicle.",
    "1. No acute cardiopulmonary abnormality. 2. Old left clavicle fracture.",
)
CAPITALS = Report(
    "THE HEART IS NORMAL IN SIZE. THE MEDIASTINUM IS UNREMARKABLE. THE LUNGS ARE CLEAR.",
    "NO ACUTE DISEASE.",
)
OPACITY = Report(
    "The cardiac and mediastinal silhouettes are normal. Patchy opacity is noted in the left lower "
    "lobe. The right lung is clear. There is no pneumothorax or pleural effusion.",
    "Left lower lobe opacity.",
)
INFLATED = Report(
    "The lungs are hyperinflated with flattening of the diaphragms. No focal airspace disease. "
    "Heart size normal. Degenerative changes of the spine.",
    "Emphysema. No acute disease.",
)
LOW_VOLUMES = Report(
    "Low lung volumes with bibasilar atelectasis. Heart size is normal. Median sternotomy wires "
    "are intact. No pneumothorax.",
    "Bibasilar atelectasis.",
)
IMPRESSION_ONLY = Report("", "Heart size is normal and the lungs are clear. No effusion.")
FINDINGS_ONLY = Report(
    "Lungs are clear without focal consolidation, effusion, or pneumothorax.", ""
)
REPORTS = (NORMAL, CAPITALS, OPACITY, INFLATED, LOW_VOLUMES, IMPRESSION_ONLY, FINDINGS_ONLY)


def study(report: Report, number: int = 0, **fields: object) -> Study:
    return Study(f"s{number}", f"p{number}", report, (ImageRef(f"p/{number}.jpg"),), **fields)  # type: ignore[arg-type]


def rewrite_prompt(prompt: str) -> Report:
    """The report in a prompt, rewritten by the graph generator for the prompt's target."""
    text = prompt.split("<report>\n")[1].split("\n</report>")[0]
    target = prompt.split("also had ")[1].split(".\n")[0]
    findings, impression = (
        text.split(f"{name}: ", 1)[1].split("\n\n")[0] if f"{name}: " in text else ""
        for name in ("FINDINGS", "IMPRESSION")
    )
    return rewrite(GRAPH, Report(findings, impression), target, "prompt", 1, 0)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_open_i(folder: Path, reports: tuple[Report, ...]) -> Path:
    """Write a folder of XML files in the format of Open-I, without labels."""
    folder.mkdir()
    for number, report in enumerate(reports):
        parts = "".join(
            f'<AbstractText Label="{label}">{escape(text)}</AbstractText>'
            for label, text in (("FINDINGS", report.findings), ("IMPRESSION", report.impression))
        )
        (folder / f"{number}.xml").write_text(
            f'<eCitation><uId id="CXR{number}"/><Abstract>{parts}</Abstract></eCitation>'
        )
    return folder

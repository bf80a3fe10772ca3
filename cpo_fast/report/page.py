"""Writes tables, figures and examples of a run into one self-contained HTML file.

jinja2 escapes all text. The content security policy forbids every request and allows one script by
its hash, which copies a table as CSV. Pictures are data URIs, light and dark.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpo_fast.errors import CpoFastError, UsageError
from cpo_fast.evaluation.settings import used_settings
from cpo_fast.folders import write_private
from cpo_fast.report import run_tables
from cpo_fast.report import tables as t
from cpo_fast.report.describe import describe_stage, is_evaluation, shared_stage_title
from cpo_fast.report.drift import prepare_drift
from cpo_fast.report.evaluation_tables import BEST, evaluation_tables, findings_by_support, unparsed
from cpo_fast.report.examples import data_uri, prepare_example
from cpo_fast.report.figures import DARK, LIGHT, Line, Panel, concept_graph, curves, intervals
from cpo_fast.report.headline import (
    cards,
    describe_environment,
    describe_protocol,
    headline,
    list_inputs,
)
from cpo_fast.report.read import Run, counts, get, objects, read_run

TEMPLATES = Path(__file__).with_name("templates")
SHOWN_EXAMPLES = 8
SHOWN_DRIFTS = 4


@dataclass(frozen=True)
class Picture:
    light: str
    dark: str
    alt: str
    width: int
    height: int


def write_report(run_dir: Path | str) -> Path:
    """Write run_dir/report.html (0600) and run_dir/figures/*.png from the files of a finished run.

    Missing parts (a stage, the evaluation, images) are left out and noted on the page. Raises
    UsageError if `run_dir` is no run folder.
    """
    run = read_run(run_dir)
    figures = run.path / "figures"
    evaluation = run.part("evaluation")
    classified = run.part("evaluation", "classification")
    used = used_settings(run.config) if is_evaluation(run) else run.config
    graph = _graph_panel(run)
    examples = [prepare_example(example, run.path) for example in run.examples[:SHOWN_EXAMPLES]]
    probed = [prepare_drift(entry, i) for i, entry in enumerate(run.drifts[:SHOWN_DRIFTS], start=1)]
    context = {
        "kicker": f"cpo_fast · {'evaluation' if is_evaluation(run) else 'run report'}",
        "title": run.name,
        "lead": headline(evaluation),
        "meta": list_inputs(run),
        "computed": describe_environment(run),
        "cards": cards(run),
        "evaluation": {
            "tables": evaluation_tables(evaluation),
            "pictures": pictures(_interval_panels(classified), figures),
            "notes": _evaluation_notes(evaluation),
        },
        "examples": examples,
        "edited": any(example.after for example in examples),
        "drifts": [(one, pictures(one.panels, figures)) for one in probed if one],
        "stages": _stages([run], [""], figures),
        "speed": {"table": run_tables.speed_table(run), "shares": _time_bars(run)},
        "data": {"tables": run_tables.data_tables(run)},
        "graph": pictures([graph], figures)[0] if graph else None,
        "configuration": list(run_tables.flatten(used)),
        "versions": list(run_tables.flatten(run.part("versions"))),
        "notes": run.notes,
    }
    context["sections"] = _sections(context)
    path = run.path / "report.html"
    write_private(path, render("run.html", context).encode())
    return path


def write_comparison(run_dirs: Sequence[Path | str], path: Path | str) -> Path:
    """Write one page (0600) with the figures and curves of several runs side by side.

    Raises UsageError for fewer than two runs, or for a folder without a run.
    """
    runs = [read_run(folder) for folder in run_dirs]
    if len(runs) < 2:
        raise UsageError("a comparison needs at least two runs")
    names = _distinct_names(runs)
    tables = run_tables.comparison_tables(runs, names)
    stages = _stages(runs, names, None)
    sections = [("figures", "Figures")] if tables else []
    sections += [(f"stage-{stage['id']}", stage["short"]) for stage in stages]
    context = {
        "title": " · ".join(names),
        "lead": "",
        "meta": [str(run.path) for run in runs],
        "tables": tables,
        "stages": stages,
        "differences": run_tables.configuration_differences(runs, names),
        "notes": [f"{n}: {note}" for n, run in zip(names, runs, strict=True) for note in run.notes],
        "sections": [*sections, ("configuration", "Configuration")],
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_private(path, render("comparison.html", context).encode())
    return path


def _stages(runs: Sequence[Run], names: Sequence[str], folder: Path | None) -> list[dict[str, Any]]:
    """The stages that have curves; the figures are saved in `folder`."""
    found = []
    for stage in dict.fromkeys(stage for run in runs for stage in run.stages()):
        if panels := stage_panels(runs, names, stage):
            found.append(
                {
                    "id": _anchor(stage),
                    "title": shared_stage_title(runs, stage),
                    "short": t.name_of(stage),
                    "note": describe_stage(runs[0], stage) if len(runs) == 1 else "",
                    "pictures": pictures(panels, folder),
                }
            )
    return found


def stage_panels(runs: Sequence[Run], names: Sequence[str], stage: str) -> list[Panel]:
    """The curves of one stage; several runs are overlaid, one colour each."""
    panels = []
    for slug, title, metrics, options in CURVES:
        if len(runs) > 1 and len(metrics) > 1:
            continue  # too many lines; the margin shows the same
        lines = []
        for color, (run, name) in enumerate(zip(runs, names, strict=True)):
            for k, (metric, label) in enumerate(metrics):
                shade = color if len(runs) > 1 else k
                for prefix, kind in (("", ""), ("eval_", "held out")):
                    steps, values = run.series(stage, prefix + metric)
                    if not steps or (slug == "loss" and prefix and not run.series(stage, metric)):
                        continue
                    parts = [name, label if len(metrics) > 1 else "", kind]
                    text = ", ".join(filter(None, parts)) or label
                    if prefix and len(runs) == len(metrics) == 1:
                        shade = 1
                    lines.append(Line(text, steps, values, shade, dots=bool(prefix)))
        if lines:
            full = f"{t.name_of(stage)}: {title}"
            panels.append(curves(f"{_anchor(stage)}_{slug}", full, lines, **options))
    return panels


CURVES: tuple[tuple[str, str, tuple[tuple[str, str], ...], dict[str, bool]], ...] = (
    ("loss", "loss", (("loss", "training"),), {}),
    ("reward_margin", "reward margin", (("rewards/margins", "training"),), {"zero_line": True}),
    ("reward_accuracy", "reward accuracy", (("rewards/accuracies", "training"),), {"share": True}),
    (
        "margin_of_source",
        "reward margin by source",
        (("rewards/margins/thinking", "thinking"), ("rewards/margins/perception", "perception")),
        {"zero_line": True},
    ),
    (
        "rewards",
        "rewards",
        (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")),
        {"zero_line": True},
    ),
    (
        "logps",
        "log-probability of the answer",
        (("logps/chosen", "chosen"), ("logps/rejected", "rejected")),
        {},
    ),
    ("grad_norm", "gradient norm", (("grad_norm", "gradient norm"),), {"log_scale": True}),
    ("learning_rate", "learning rate", (("learning_rate", "learning rate"),), {"smooth": False}),
    ("speed", "tokens per second per device", (("tokens_per_second_per_gpu", "tokens"),), {}),
)


def _interval_panels(classified: Mapping[str, Any]) -> list[Panel]:
    found = objects(classified)
    models = {name: found[name] for name in t.in_order(found)}
    rows = list(findings_by_support(models))
    shares = {model: unparsed(figures) for model, figures in models.items()}
    names = {m: t.name_of(m) + (f" ({share})" if share else "") for m, share in shares.items()}
    if not rows:
        return []
    panels = []
    for metric, title in (("accuracy", "Accuracy per finding"), ("f1", "F1 per finding")):
        values = {
            model: [get(figures, "findings", row, metric) for row in rows]
            for model, figures in models.items()
        }
        panels.append(intervals(metric, title, rows, values, names))
    return panels


def _graph_panel(run: Run) -> Panel | None:
    """The concept graph of the run; None without one or for a damaged one, which is noted."""
    path = run.path / "concept_graph.json"
    if not path.is_file():
        return None
    from cpo_fast.concepts import load_graph

    try:
        return concept_graph(load_graph(path))
    except CpoFastError as error:
        run.notes.append(f"concept_graph.json cannot be drawn: {error}")
        return None


def pictures(panels: Sequence[Panel], folder: Path | None) -> list[Picture]:
    """The panels rendered for both themes; the light ones are also saved in `folder`."""
    pictures = []
    for panel in panels:
        light, dark = panel.render(LIGHT, DARK)
        if folder is not None:
            folder.mkdir(mode=0o700, exist_ok=True)
            write_private(folder / f"{panel.slug}.png", light)
        width, height = (int.from_bytes(light[at : at + 4], "big") for at in (16, 20))
        pictures.append(Picture(data_uri(light), data_uri(dark), panel.alt, width, height))
    return pictures


def _evaluation_notes(evaluation: Mapping[str, Any]) -> list[str]:
    compared = len(objects(evaluation.get("classification"))) > 1
    return [note for note in (describe_protocol(evaluation), BEST if compared else "") if note]


def _time_bars(run: Run) -> list[dict[str, Any]]:
    """Bars of time: one over the stages, and one for each stage with parts (`time`)."""
    stages = objects(run.part("stages"))
    whole = counts({t.name_of(name): stage.get("seconds") for name, stage in stages.items()})
    bars = [("Time per stage", whole, True)] if len(whole) > 1 else []
    for name, stage in stages.items():
        bars.append((f"Time within {t.name_of(name)}", counts(stage.get("time")), False))
    result = []
    for title, parts, absolute in bars:
        total = sum(parts.values())
        if total > 0:
            shares = [
                {
                    "name": name.replace("_", " "),
                    "percent": f"{100 * value / total:.0f}",
                    "weight": f"{value / total:.4f}",
                    "detail": t.format_seconds(value) if absolute else "",
                }
                for name, value in parts.items()
            ]
            result.append({"title": title, "parts": shares})
    return result


def _sections(context: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [
        ("evaluation", "Evaluation", context["evaluation"]["tables"]),
        ("drift", "Drift", context["drifts"]),
        ("examples", "Examples", context["examples"]),
        *((f"stage-{s['id']}", s["short"], True) for s in context["stages"]),
        ("speed", "Throughput", context["speed"]["table"] or context["speed"]["shares"]),
        ("data", "Data", context["data"]["tables"]),
        ("graph", "Concept graph", context["graph"]),
        ("configuration", "Configuration", True),
    ]
    return [(id_, title) for id_, title, present in found if present]


def _distinct_names(runs: Sequence[Run]) -> list[str]:
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.path.resolve().parent.name}/{run.name}" for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} ({i})" for i, name in enumerate(names, start=1)]
    return names


def _anchor(stage: str) -> str:
    """A stage's name for use in an anchor or file name."""
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in stage)[:40]


def render(template: str, context: Mapping[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (TEMPLATES / "script.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {
        "table_csv": t.table_csv,
        "script": Markup(script),  # a file of this package; the policy allows no other script
        "script_hash": Markup(f"sha256-{digest}"),
    }
    return environment.get_template(template).render(context)

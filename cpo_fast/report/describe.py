"""Sentences about a run for the page and the model card, from the run's own files only."""

from __future__ import annotations

from collections.abc import Sequence

from cpo_fast.loss.options import LOSS_TYPES
from cpo_fast.report.read import Run, counts

REPORT_KINDS = frozenset({"phantom", "mimic-cxr", "open-i", "ccf", "counterfactuals"})
"""Kinds of data whose answers cpo_fast writes: a report in `<think>`, then the diagnosis."""

CHOSEN = "the chosen to the rejected answers of the data"


def is_evaluation(run: Run) -> bool:
    """Whether `cpo-fast evaluate` wrote the folder."""
    return "suite" in run.config and "stages" not in run.config


def data_kind(run: Run) -> str:
    """The kind of data, "" if unknown."""
    if run.config.get("dataset") == "phantom":
        return "phantom"
    return str(run.part("data").get("kind") or "")


def has_reports(run: Run) -> bool:
    """Whether the answers are known to be chest radiograph reports with a diagnosis."""
    return data_kind(run) in REPORT_KINDS


def records_by_stage(run: Run) -> dict[str, tuple[int, int]]:
    """Stage -> (records trained on, records held out); {} if unknown."""
    held_out = counts(run.part("data", "held_out"))
    trained_on = counts(run.part("data", "trained_on"))
    return {stage: (int(n), int(held_out.get(stage, 0))) for stage, n in trained_on.items()}


def stage_title(run: Run, stage: str) -> str:
    if stage == "sft":
        return "Supervised fine-tuning"
    if stage == "cpo":
        full = "Counterfactual preference optimisation"
        return full if has_reports(run) else "Preference optimisation"
    return stage


def shared_stage_title(runs: Sequence[Run], stage: str) -> str:
    """The title of a stage of several runs; "counterfactual" only if that is true of all."""
    return min((stage_title(run, stage) for run in runs), key=len)


def describe_stage(run: Run, stage: str) -> str:
    if stage == "sft":
        if has_reports(run):
            return "The model learns the report as its thought and the diagnosis as its answer."
        return "The model learns the chosen answers of the data."
    if stage == "cpo":
        return f"The model learns to prefer {describe_preference(run)}. {describe_reference(run)}"
    return ""


def describe_preference(run: Run) -> str:
    """The preferred and the rejected side of CPO's pairs, by source."""
    if not has_reports(run):
        return CHOSEN
    sources = counts(run.part("data", "counterfactual_sources")) or {"thinking": 1}
    parts = []
    if sources.get("thinking"):
        parts.append("a study's report and diagnosis to a counterfactual of them")
    if sources.get("perception"):
        parts.append("an answer with its own image to the same answer with another patient's image")
    return ", and ".join(parts) or CHOSEN


def describe_reference(run: Run) -> str:
    """The reference model of CPO, and the initial values of loss and rewards."""
    loss = run.config.get("loss_type", "sigmoid")
    if loss in LOSS_TYPES and not LOSS_TYPES[loss].reference:
        return f"The loss {loss} has no reference model."
    stages = str(run.config.get("stages") or "").split(",")
    sft = "sft" in stages or run.part("stages", "sft") or run.config.get("sft_checkpoint")
    start = "the SFT model" if sft else "the model that the run started from"
    if loss != "sigmoid":
        return f"The reference is {start}."
    return f"The reference is {start}, so {_initial_values(run)} at 0."


def _initial_values(run: Run) -> str:
    """Rewards start at 0. The loss starts at ln 2 if it is sigmoid alone with mean weight 1."""
    config = run.config
    weights = {config.get(f"{source}_weight", 1.0) for source in ("thinking", "perception")}
    alone = not config.get("rpo_alpha") and (
        config.get("normalize_source_weights", True) or weights == {1.0}
    )
    return "the loss starts at ln 2 = 0.693 and the rewards" if alone else "the rewards start"

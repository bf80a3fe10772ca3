"""What the page and the model card say of a run: only what the run's own files show."""

from __future__ import annotations

from collections.abc import Sequence

from cpo_fast.report.read import Run
from cpo_fast.report.tables import counts

OF_REPORTS = frozenset({"phantom", "mimic-cxr", "open-i", "ccf", "counterfactuals"})
"""Kinds of data whose answers this project makes: a report in `<think>`, then the diagnosis."""

WITHOUT_REFERENCE = frozenset({"simpo", "orpo"})
"""As in LOSS_TYPES of the loss op, which a page does without: importing it takes PyTorch."""


def data_kind(run: Run) -> str:
    """The kind of data that was read, "" where the run does not say."""
    if run.config.get("dataset") == "phantom":
        return "phantom"
    return str(run.part("data").get("kind") or "")


def of_reports(run: Run) -> bool:
    """Whether the answers are chest radiograph reports with a diagnosis, for sure."""
    return data_kind(run) in OF_REPORTS


def sides(run: Run) -> dict[str, tuple[int, int]]:
    """How many records each stage was trained on, and how many it held out; {} where the run does
    not say."""
    held_out = counts(run.part("data", "held_out"))
    trained_on = counts(run.part("data", "trained_on"))
    return {stage: (int(n), int(held_out.get(stage, 0))) for stage, n in trained_on.items()}


def stage_title(run: Run, stage: str) -> str:
    if stage == "sft":
        return "Supervised fine-tuning"
    if stage == "cpo":
        whole = "Counterfactual preference optimisation"
        return whole if of_reports(run) else "Preference optimisation"
    return stage


def title_of_all(runs: Sequence[Run], stage: str) -> str:
    """The title of a stage of several runs: the counterfactual one only where it holds for all."""
    return min((stage_title(run, stage) for run in runs), key=len)


def is_evaluation(run: Run) -> bool:
    """Whether `cpo-fast evaluate` wrote the folder."""
    return "suite" in run.config and "stages" not in run.config


def stage_note(run: Run, stage: str) -> str:
    if stage == "sft":
        if of_reports(run):
            return "The model learns the report as its thought and the diagnosis as its answer."
        return "The model learns the chosen answers of the data."
    if stage == "cpo":
        return f"The model learns to prefer {preferred(run)}. {reference(run)}"
    return ""


def preferred(run: Run) -> str:
    """What CPO prefers to what, by the sources of the pairs."""
    if not of_reports(run):
        return "the chosen to the rejected answers of the data"
    sources = counts(run.part("data", "counterfactual_sources")) or {"thinking": 1}
    said = []
    if sources.get("thinking"):
        said.append("a study's report and diagnosis to a counterfactual of them")
    if sources.get("perception"):
        said.append("an answer with its own image to the same answer with another patient's image")
    return ", and ".join(said) or "the chosen to the rejected answers of the data"


def reference(run: Run) -> str:
    """A sentence on the reference model of CPO, and on where loss and rewards start."""
    loss = run.config.get("loss_type", "sigmoid")
    if loss in WITHOUT_REFERENCE:
        return f"The loss {loss} has no reference model."
    asked = str(run.config.get("stages") or "").split(",")
    sft = "sft" in asked or run.part("stages", "sft") or run.config.get("sft_checkpoint")
    start = "the SFT model" if sft else "the model that the run started from"
    if loss != "sigmoid":
        return f"The reference is {start}."
    return f"The reference is {start}, so {_beginning(run)} at 0."


def _beginning(run: Run) -> str:
    """Rewards start at 0; the sigmoid loss alone, with weights that average to 1, at ln 2."""
    config = run.config
    weights = {config.get(f"{source}_weight", 1.0) for source in ("thinking", "perception")}
    alone = not config.get("rpo_alpha") and (
        config.get("normalize_source_weights", True) or weights == {1.0}
    )
    return "the loss starts at ln 2 = 0.693 and the rewards" if alone else "the rewards start"

"""What a page and a card may say of a run: only what the run's own files tell."""

from __future__ import annotations

from cpo_fast.report.read import Run

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


def stage_title(run: Run, stage: str) -> str:
    if stage == "sft":
        return "Supervised fine-tuning"
    if stage == "cpo":
        whole = "Counterfactual preference optimisation"
        return whole if of_reports(run) else "Preference optimisation"
    return stage


def stage_note(run: Run, stage: str) -> str:
    if stage == "sft":
        if of_reports(run):
            return "The model learns the report as its thought and the diagnosis as its answer."
        return "The model learns the chosen answers of the data."
    if stage == "cpo":
        preferred = (
            "the report to its counterfactual"
            if of_reports(run)
            else "the chosen to the rejected answers of the data"
        )
        return f"The model learns to prefer {preferred}. {reference(run)}"
    return ""


def reference(run: Run) -> str:
    """A sentence on what CPO compares the model with."""
    loss = run.config.get("loss_type", "sigmoid")
    if loss in WITHOUT_REFERENCE:
        return f"The loss {loss} has no reference model."
    asked = str(run.config.get("stages") or "").split(",")
    sft = "sft" in asked or run.part("stages", "sft") or run.config.get("sft_checkpoint")
    start = "the SFT model" if sft else "the model that the run started from"
    zero = ", so the loss starts at ln 2 = 0.693 and the rewards at 0" if loss == "sigmoid" else ""
    return f"The reference is {start}{zero}."

"""Counterfactuals as rows for other tools: CXR-CounterFact items, trl and ms-swift preferences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from cpo_fast.data.labels import DEFAULT_PROMPT, answer, question, thought
from cpo_fast.types import Counterfactual

FORMATS = ("jsonl", "ccf", "trl", "swift")


def ccf_item(cfs: Sequence[Counterfactual]) -> dict[str, Any]:
    """One item of CXR-CounterFact from all counterfactuals of one study."""
    first = cfs[0]
    return {
        "dicom_id": PurePath(first.images[0]).stem if first.images else "",
        "sid": first.study_id,
        "pid": first.patient_id,
        "report": first.report,
        "diagnose": answer(first.labels),
        "counterfact": {cf.target: cf.counterfactual for cf in cfs},
    }


def trl_row(cf: Counterfactual) -> dict[str, Any]:
    """A conversational preference row of trl, images by path."""
    return {
        "id": cf.id,
        "patient_id": cf.patient_id,
        **({"images": list(cf.images)} if cf.images else {}),  # [] would ask trl for a VLM
        "prompt": list(question(len(cf.images))),
        "chosen": [{"role": "assistant", "content": thought(cf.report, cf.labels)}],
        "rejected": [{"role": "assistant", "content": thought(cf.counterfactual, (cf.target,))}],
    }


def swift_row(cf: Counterfactual) -> dict[str, Any]:
    """A preference row of ms-swift: the last message is the chosen answer."""
    return {
        "messages": [
            {"role": "user", "content": "<image>" * len(cf.images) + DEFAULT_PROMPT},
            {"role": "assistant", "content": thought(cf.report, cf.labels)},
        ],
        "images": list(cf.images),
        "patient_id": cf.patient_id,
        "rejected_response": thought(cf.counterfactual, (cf.target,)),
    }


def rows(cfs: Sequence[Counterfactual], form: str) -> list[dict[str, Any]]:
    """The rows of one study's passing counterfactuals in format `form`."""
    if not cfs:
        return []
    if form == "ccf":
        return [ccf_item(cfs)]
    make = {"jsonl": Counterfactual.to_json, "trl": trl_row, "swift": swift_row}[form]
    return [make(cf) for cf in cfs]

"""Counterfactuals as rows for other tools: CXR-CounterFact items, trl and ms-swift preferences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from cpo_fast.data.export import ccf_item, swift_rows, trl_rows
from cpo_fast.data.labels import answer, question, thought
from cpo_fast.types import Counterfactual, ImageRef, Preference

FORMATS = ("jsonl", "ccf", "trl", "swift")


def format_rows(cfs: Sequence[Counterfactual], form: str) -> list[dict[str, Any]]:
    """The rows of one study's passed counterfactuals in format `form`.

    "ccf" has one item per study, the other formats one row per counterfactual. Raises RecordError
    as `cpo_fast.data.export`.
    """
    if not cfs:
        return []
    if form == "ccf":
        first = cfs[0]
        return [
            ccf_item(
                dicom_id=PurePath(first.images[0]).stem if first.images else "",
                sid=first.study_id,
                pid=first.patient_id,
                report=first.report,
                diagnose=answer(first.labels),
                counterfact={cf.target: cf.counterfactual for cf in cfs},
            )
        ]
    if form == "jsonl":
        return [cf.to_json() for cf in cfs]
    make = {"trl": trl_rows, "swift": swift_rows}[form]
    return [row for cf in cfs for row in make(_to_preference(cf))]


def _to_preference(cf: Counterfactual) -> Preference:
    return Preference(
        id=cf.id,
        prompt=question(len(cf.images)),
        chosen=thought(cf.report, cf.labels),
        rejected=(thought(cf.counterfactual, (cf.target,)),),
        images=tuple(map(ImageRef, cf.images)),
        patients=(cf.patient_id,),
    )

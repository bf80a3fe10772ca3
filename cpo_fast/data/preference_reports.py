"""Report rows: CXR-CounterFact items, and the lines of this project's counterfactuals.jsonl."""

from __future__ import annotations

import re
from typing import Any

from cpo_fast.data.labels import NO_FINDING, question, thought
from cpo_fast.data.preference_build import Row, assemble_preference
from cpo_fast.data.preference_values import image_refs, list_of, object_of, text_of
from cpo_fast.errors import RecordError
from cpo_fast.types import ImageRef, Preference

_DICOM = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{8}){4}")


def _ccf_ids(row: Row) -> tuple[str | None, str | None]:
    """(study, patient) from `sid` and `pid`, by their leading digit."""
    ids = [str(row.get(name) or "").lstrip("ps") for name in ("sid", "pid")]
    study = next((one for one in ids if re.fullmatch(r"5\d{7}", one)), None)
    return study, next((one for one in ids if re.fullmatch(r"1\d{7}", one)), None)


def _ccf_image(row: Row) -> tuple[str, str]:
    """(study id, image path relative to MIMIC-CXR's root)."""
    study, patient = _ccf_ids(row)
    dicom = row["dicom_id"]
    named = isinstance(dicom, str) and _DICOM.fullmatch(dicom)
    if study is None or patient is None or not named:
        raise RecordError("bad-id", "sid, pid or dicom_id is malformed")
    return f"s{study}", f"files/p{patient[:2]}/p{patient}/s{study}/{dicom}.jpg"


def _nonempty(value: Any, field: str) -> str:
    if not text_of(value, field).strip():
        raise RecordError("empty-response", f"{field} is empty")
    return str(value)


def parse_ccf(row: Row, root: str, id: str) -> Preference:
    """CXR-CounterFact: all counterfactuals of the item are rejected answers, in order.

    `sid` and `pid` are swapped in some releases: a patient id begins with 1, a study id with 5. The
    image path is MIMIC-CXR-JPG's, below `root`; an item without `dicom_id` has no image.
    """
    images: tuple[ImageRef, ...] = ()
    if row.get("dicom_id"):
        id, path = _ccf_image(row)
        images = (ImageRef(path, root),)
    elif sid := row.get("sid"):
        id = text_of(sid, "sid")[:200]
    report, diagnose = (text_of(row.get(name), name) for name in ("report", "diagnose"))
    if not report.strip() or not diagnose.strip():
        raise RecordError("empty-response", "report or diagnose is empty")
    rejected = [
        thought(_nonempty(text, "counterfact"), (text_of(name, "counterfact"),))
        for name, text in object_of(row.get("counterfact"), "counterfact").items()
    ]
    chosen = f"<think> {report} </think> {diagnose}"
    known = {**row, "patient_id": _ccf_ids(row)[1] or row.get("pid")}
    return assemble_preference(known, id, question(len(images)), chosen, rejected, images)


def parse_counterfactual(row: Row, root: str, id: str) -> Preference:
    """A line of counterfactuals.jsonl (`cpo_fast.types.Counterfactual`).

    Thinking: the rewritten report and its target against the original. Perception: the same answer
    with `rejected_images` instead of the images.
    """
    checks = object_of(row.get("checks") or {}, "checks")
    if failed := sum(passed is not True for passed in checks.values()):
        raise RecordError("counterfactual-checks", f"{failed} of {len(checks)} checks failed")
    images = image_refs(row.get("images"), root)
    names = [text_of(name, "labels") for name in list_of(row.get("labels"), "labels")]
    chosen = thought(_nonempty(row.get("report"), "report"), names or (NO_FINDING,))
    own = image_refs(row.get("rejected_images"), root, "rejected_images") or None
    if row.get("kind") == "perception":
        if own is None:
            raise RecordError("missing-field", "a perception row needs rejected_images")
        rejected = chosen
    else:
        own = None
        target = text_of(row.get("target"), "target")
        rejected = thought(_nonempty(row.get("counterfactual"), "counterfactual"), (target,))
    study = text_of(row.get("study_id"), "study_id")
    return assemble_preference(
        {**row, "id": study}, id, question(len(images)), chosen, (rejected,), images, own
    )

"""The patients of a row of a preference file, if it identifies them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cpo_fast.types import ImageRef

_PATIENT_NAME = re.compile(r"(?:deid)?(?:patient|subject)(?:id|number|no)?|mrn")
"""A field with a patient id, in lower case without `_`, `-`, `.` and spaces."""

_ID = re.compile(r"[\w.\-]{1,64}", re.ASCII)
_MIMIC = re.compile(r"p(1\d{7})")
_PATH = re.compile(r"(?:^|/)(?:p(1\d{7})|(patient\d+)|deid_png/([\w.\-]+))/", re.ASCII)
"""Folders of MIMIC-CXR (p10/p10000032), CheXpert (patient42) and ReXGradient (deid_png/ID)."""


def _id(value: Any) -> str | None:
    """A patient id as text: `10000032`, `10000032.0`, "10000032" and "p10000032" are equal."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 10**64 else None
    if not isinstance(value, str) or not _ID.fullmatch(text := value.strip()):
        return None
    text = text.removesuffix(".0") if text.removesuffix(".0").isdecimal() else text
    mimic = _MIMIC.fullmatch(text)
    return mimic[1] if mimic else text


def names_patient(field: str) -> bool:
    """Whether a field name denotes a patient id: `patient_id`, `PatientID`, `subject-id`, `mrn`."""
    return _PATIENT_NAME.fullmatch(re.sub(r"[\s_.-]", "", field.lower())) is not None


def is_patient(value: Any) -> bool:
    """Whether the value of a field with `names_patient` is an id or a list of ids, not text."""
    values = value if isinstance(value, list) else [value]
    return all(_id(one) is not None for one in values)


def patients_of(row: Mapping[str, Any], images: Sequence[ImageRef]) -> tuple[str, ...]:
    """The sorted ids of the row's patients, from fields with `names_patient` and from image paths;
    () without any.
    """
    found: set[str] = set()
    for value in (value for name, value in row.items() if names_patient(name)):
        for one in value if isinstance(value, list) else [value]:
            if (id := _id(one)) is not None:
                found.add(id)
    for ref in images:
        if match := _PATH.search(ref.path):
            found.add(next(id for id in match.groups() if id))
    return tuple(sorted(found))

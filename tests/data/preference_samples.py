"""Rows of preference files, and readers of them, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cpo_fast.data import open_preferences
from cpo_fast.types import Preference
from tests.data.samples import SECRET, dicom

IMAGE = {"type": "image"}


USER = {"role": "user", "content": "What is it?"}


def said(text: str, role: str = "assistant") -> dict[str, Any]:
    return {"role": role, "content": text}


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def read(tmp_path: Path, *rows: Any, **options: str) -> tuple[list[Preference], list[str], str]:
    """Preferences, reasons and kind of a JSONL file with `rows`."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_preferences(str(path), **options)
    found = list(source)
    assert source.read == len(found) + len(source.rejected)
    assert SECRET not in str(source.rejected)
    return found, [record.reason for record in source.rejected], source.kind


def one(tmp_path: Path, row: dict[str, Any], kind: str) -> Preference:
    (found,), reasons, told = read(tmp_path, row)
    assert (reasons, told) == ([], kind)
    return found


RANKED = [{"rank": 0, "completion": "x"}, {"rank": 1, "completion": "y"}]


CCF = {
    "dicom_id": dicom(7),
    "sid": "50414267",
    "pid": "10000032",
    "report": "FINDINGS: x",
    "diagnose": "The disease of this patient is Edema.",
    "counterfact": {"Pneumonia": "FINDINGS: y", "Fracture": "FINDINGS: z"},
}


GOOD = {"prompt": [USER], "chosen": [said("x")], "rejected": [said("y")]}

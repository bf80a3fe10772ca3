"""Rows of preference files, and readers of them, for tests."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpo_fast.data import open_preferences
from cpo_fast.types import Preference
from tests.data.samples import SECRET, dicom

IMAGE = {"type": "image"}


USER = {"role": "user", "content": "What is it?"}


def turn(text: str, role: str = "assistant") -> dict[str, Any]:
    return {"role": role, "content": text}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def normalise(preference: Preference) -> Preference:
    """Without fields that only some formats have (id, weight, patients); texts as parts."""
    prompt = tuple(
        {**m, "content": [text(m["content"])]}
        if isinstance(m["content"], str) and not preference.plain
        else m
        for m in preference.prompt
    )
    return replace(preference, id="", weight=1.0, prompt=prompt, patients=())


def read(tmp_path: Path, *rows: Any, **options: str) -> tuple[list[Preference], list[str], str]:
    """Preferences, reasons and kind of a JSONL file with `rows`."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_preferences(str(path), **options)
    found = list(source)
    assert source.read == len(found) + len(source.rejected)
    assert SECRET not in str(source.rejected)
    return found, [record.reason for record in source.rejected], source.kind


def read_one(tmp_path: Path, row: dict[str, Any], kind: str) -> Preference:
    (found,), reasons, detected = read(tmp_path, row)
    assert (reasons, detected) == ([], kind)
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


GOOD = {"prompt": [USER], "chosen": [turn("x")], "rejected": [turn("y")]}

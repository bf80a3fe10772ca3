"""Files of the counterfactual stage are read back as its preferences in memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cpo_fast.counterfactual import build_preference
from cpo_fast.counterfactual.formats import FORMATS, format_rows
from cpo_fast.data import open_preferences
from cpo_fast.types import Counterfactual, ImageRef, Preference, Report, Study
from tests.data.samples import dicom


def study_and_counterfactuals(image: bool, root: str) -> tuple[Study, list[Counterfactual]]:
    path = f"files/p10/p10000032/s50414267/{dicom(5)}.jpg"
    study = Study(
        study_id="s50414267" if image else "CXR7",
        patient_id="p10000032" if image else "CXR7",
        report=Report("The heart is large.", "Cardiomegaly."),
        images=(ImageRef(path, root),) if image else (),
        labels={"Cardiomegaly": 1, "Edema": -1, "Fracture": 0},
    )
    made = [
        Counterfactual(
            id=f"{study.study_id}/{target}",
            study_id=study.study_id,
            patient_id=study.patient_id,
            images=tuple(ref.path for ref in study.images),
            report=study.report.text,
            labels=("Cardiomegaly",),
            target=target,
            counterfactual=f"FINDINGS: {target}.",
            counterfactual_labels=("Cardiomegaly", target),
            checks={"asserted": True},
        )
        for target in ("Pneumothorax", "Edema")
    ]
    return study, made


def in_parts(one: Preference) -> Preference:
    """With every content as a list of parts, and without id, since trl has one per row."""
    prompt: list[dict[str, Any]] = []
    for message in one.prompt:
        said = message["content"]
        parts = [{"type": "text", "text": said}] if isinstance(said, str) else said
        prompt.append({**message, "content": parts})
    return replace(one, id="", prompt=tuple(prompt), patients=())


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_comes_back(tmp_path: Path, form: str, image: bool) -> None:
    study, made = study_and_counterfactuals(image, str(tmp_path))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in format_rows(made, form)))
    source = open_preferences(str(path))
    (found,) = source
    kinds = {"jsonl": "counterfactuals", "ccf": "ccf", "trl": "trl", "swift": "ms-swift"}
    assert source.kind == kinds[form]
    assert in_parts(found) == in_parts(build_preference(study, made))
    assert found.patients == (study.patient_id.removeprefix("p"),)
    if form in ("jsonl", "ccf"):
        assert found.id == study.study_id

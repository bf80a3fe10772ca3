"""Files of the counterfactual stage are read back as the preferences that it builds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpo_fast.counterfactual import pair_with_counterfactuals
from cpo_fast.counterfactual.formats import FORMATS, format_rows
from cpo_fast.data import open_preferences
from cpo_fast.types import Counterfactual, ImageRef, Report, Study
from tests.data.preference_samples import normalise
from tests.data.samples import dicom


def build_records(image: bool, root: str) -> tuple[Study, list[Counterfactual]]:
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


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_round_trips(tmp_path: Path, form: str, image: bool) -> None:
    study, made = build_records(image, str(tmp_path))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in format_rows(made, form)))
    source = open_preferences(str(path))
    (found,) = source
    kinds = {"jsonl": "counterfactuals", "ccf": "ccf", "trl": "trl", "swift": "ms-swift"}
    assert source.kind == kinds[form]
    assert normalise(found) == normalise(pair_with_counterfactuals(study, made))
    assert found.patients == (study.patient_id.removeprefix("p"),)
    if form in ("jsonl", "ccf"):
        assert found.id == study.study_id

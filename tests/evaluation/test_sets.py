"""CSV sets: ChestXray14, CheXpert, PadChest and MS-CXR-T, as synthetic files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from cpo_fast.errors import DataError, UsageError
from cpo_fast.evaluate import main
from cpo_fast.evaluation.classification import auc
from cpo_fast.evaluation.csv_sets import read_labelled_csv
from cpo_fast.evaluation.ms_cxr_t import (
    CLASSES,
    TemporalCase,
    presence_accuracy,
    progression_accuracy,
    read_ms_cxr_t,
)
from cpo_fast.model.build import save_model
from cpo_fast.testing.samples import images, text_model, tokenizer, vision_language_model

CHEST_XRAY_14 = """Image Index,Finding Labels,Follow-up #,Patient ID
a.png,Effusion|Pleural_Thickening,0,1
b.png,No Finding,1,1
c.png,Mass,0,2
"""
CHEXPERT = """Path,Sex,No Finding,Edema,Pleural Effusion
CheXpert-v1.0-small/valid/patient64541/study1/a.png,M,,1.0,-1.0
valid/patient64542/study1/b.png,F,1.0,0.0,
"""
PADCHEST = """,ImageID,ImageDir,PatientID,Labels
0,a.png,0,p1,"['cardiomegaly', 'pleural effusion']"
1,b.png,0,p2,['normal']
2,c.png,0,p2,"['cut off"
"""
TEMPORAL = (
    "subject_id,study_id,dicom_id,previous_study_id,previous_dicom_id,consolidation_progression,"
    "edema_progression,pleural_effusion_progression,pneumonia_progression,"
    "pneumothorax_progression\n"
    "10000001,50000002,a.png,50000001,b,,improving,stable,,\n"
    "10000002,50000004,b.png,50000003,a.png,worsening,,,,\n"
    "10000003,50000006,b.png,50000005,a.png,,,,,\n"
)


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("a.png", "b.png", "c.png", "b.jpg")):
        noise = np.random.default_rng(number).integers(0, 256, (60, 60), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "random"
    save_model(vision_language_model(), path, tokenizer=tokenizer(), images=images())
    return path


def write(folder, text, name="set.csv"):
    (folder / name).write_text(text)
    return folder / name


def test_chest_xray_14_keeps_its_label_names(folder):
    found = read_labelled_csv(write(folder, CHEST_XRAY_14), folder)
    assert found.kind == "ChestXray14"
    assert found.findings == ("Mass", "Pleural Effusion", "Pleural Thickening")
    assert [one.names for one in found.images][1:] == [(), ("Mass",)]
    assert [one.patient for one in found.images] == ["1", "1", "2"]


def test_chexpert_has_patients_and_uncertain_labels(folder):
    path = write(folder, CHEXPERT)
    found = read_labelled_csv(path, folder)
    assert found.findings == ("Edema", "Pleural Effusion")
    assert found.images[0].image.path == "valid/patient64541/study1/a.png"
    assert [one.patient for one in found.images] == ["patient64541", "patient64542"]
    assert found.images[0].names == ("Edema",) and found.images[1].names == ()
    positive = read_labelled_csv(path, folder, uncertain="positive")
    assert positive.images[0].names == ("Edema", "Pleural Effusion")


def test_padchest_lists_must_be_literals(folder):
    found = read_labelled_csv(write(folder, PADCHEST), folder)
    assert found.findings == ("Cardiomegaly", "Pleural effusion")
    assert len(found.images) == 2
    assert [(one.line, one.reason) for one in found.rejected] == [(4, "labels-unreadable")]
    hostile = "ImageID,Labels\na.png,\"__import__('os').getcwd()\"\n"
    with pytest.raises(DataError, match="no row"):
        read_labelled_csv(write(folder, hostile), folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a,b\n1,2\n", "match none of ChestXray14"), ("Image Index,Finding Labels\n", "no row")],
)
def test_unknown_columns_and_empty_sets_are_named(folder, text, message):
    with pytest.raises(DataError, match=message):
        read_labelled_csv(write(folder, text), folder)


def test_unusable_rows_are_set_aside_with_their_line(folder):
    text = CHEST_XRAY_14 + ",Mass,0,3\nd.png,,0,4\n"
    found = read_labelled_csv(write(folder, text), folder)
    assert len(found.images) == 3
    assert [(o.line, o.reason) for o in found.rejected] == [(5, "no-image"), (6, "no-labels")]
    text = CHEXPERT + "valid/patient64543/study1/c.png,F,,yes,\n"
    found = read_labelled_csv(write(folder, text), folder)
    assert [(o.line, o.reason) for o in found.rejected] == [(4, "label-value")]
    assert "yes" not in found.rejected[0].detail


def test_auc_intervals_draw_whole_patients():
    truth = [("Edema",), ()] * 20
    scores = np.array([[0.9], [0.1]] * 20) + np.random.default_rng(0).normal(0, 0.4, (40, 1))
    by_study = auc(truth, scores, findings=("Edema",))["macro"]
    by_patient = auc(truth, scores, findings=("Edema",), patients=[str(i // 8) for i in range(40)])
    assert by_patient["macro"]["value"] == by_study["value"]
    assert by_patient["macro"]["interval"] != by_study["interval"]
    alone = auc(truth, scores, findings=("Edema",), patients=list(map(str, range(40))))
    assert alone["macro"]["interval"] == pytest.approx(by_study["interval"], abs=0.05)
    with pytest.raises(UsageError, match=r"40 studies, but 1 patient$"):
        auc(truth, scores, findings=("Edema",), patients=["1"])


def test_ms_cxr_t_is_read(folder):
    (first, second), aside = read_ms_cxr_t(write(folder, TEMPORAL))
    assert [(one.line, one.reason) for one in aside] == [(4, "no-progression-label")]
    (only,), aside = read_ms_cxr_t(write(folder, TEMPORAL.replace("improving", "better")))
    assert only == second
    assert (aside[0].line, aside[0].id, aside[0].reason) == (2, "50000002", "progression-value")
    assert first.progression == {"Edema": "improving", "Pleural Effusion": "stable"}
    assert (second.subject_id, second.previous_dicom_id) == ("10000002", "a.png")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEMPORAL.replace("edema_progression", "edema"), "lacks the columns edema_progression"),
        (TEMPORAL.split("10000001")[0], "no usable row with a progression label"),
    ],
)
def test_damaged_ms_cxr_t_is_named(folder, text, message):
    with pytest.raises(DataError, match=message):
        read_ms_cxr_t(write(folder, text))


def build_cases(*labels):
    return [TemporalCase(str(i), "s", "d", "p", "q", {"Edema": c}) for i, c in enumerate(labels)]


def test_both_protocols_equal_hand_computation():
    three = build_cases("stable", "stable", "stable", "improving")
    answers = [{"Edema": "stable"}] * 3 + [{"Edema": "worsening"}]
    a = progression_accuracy(three, answers, bootstrap=50)
    assert a["protocol"].startswith("A:")
    assert a["findings"]["Edema"]["cases"] == 4
    assert a["micro"]["value"] == 0.75, "three of four"
    assert a["macro"]["value"] == 0.5, "all of the stable, none of the improving"
    assert a["findings"]["Pneumonia"]["micro"]["value"] is None
    b = presence_accuracy(three, [("Edema",), None, ("Pneumonia",), ("Edema", "Fracture")])
    assert b["protocol"].startswith("B:") and b["top_1"]["value"] == 0.5
    with pytest.raises(UsageError, match=r"4 cases, but 1 answer$"):
        presence_accuracy(three, [None])


def test_accuracies_agree_with_scikit_learn():
    from sklearn.metrics import accuracy_score, balanced_accuracy_score

    draw = np.random.default_rng(5)
    truth, answers = (list(draw.choice(CLASSES, 60)) for _ in range(2))
    found = progression_accuracy(
        build_cases(*truth), [{"Edema": one} for one in answers], bootstrap=2
    )
    assert found["micro"]["value"] == pytest.approx(accuracy_score(truth, answers), abs=1e-12)
    expected = balanced_accuracy_score(truth, answers)
    assert found["macro"]["value"] == pytest.approx(expected, abs=1e-12)


def evaluate(model, dataset, out, **more) -> int:
    flags = {"model": model, "dataset": dataset, "output_dir": out, "max_new_tokens": 4} | more
    return main([str(word) for name, value in flags.items() for word in (f"--{name}", value)])


def test_command_on_a_labelled_set(folder, model):
    out = folder / "out"
    (folder / "damaged.png").write_bytes((folder / "a.png").read_bytes()[:200])
    path = write(folder, CHEST_XRAY_14 + ",Mass,0,3\ngone.png,Mass,0,3\ndamaged.png,Mass,0,3\n")
    assert evaluate(model, path, out, image_root=folder) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["data"] == {
        "read": 6, "used": 3, "left_out": 0, "samples_set_aside": {},
        "rejected": {"no-image": 1, "image-missing": 1, "image-unreadable": 1}}  # fmt: skip
    lines = (out / "rejected_records.jsonl").read_text().splitlines()
    assert {json.loads(line)["id"] for line in lines} == {"", "gone.png", "damaged.png"}
    evaluation = summary["evaluation"]
    assert evaluation["split"] == "ChestXray14" and evaluation["studies"] == 3
    assert set(evaluation["zero_shot"]["random"]["findings"]) == {
        "Mass", "Pleural Effusion", "Pleural Thickening"}  # fmt: skip
    assert "Zero-shot AUC" in (out / "report.html").read_text()


def test_command_on_ms_cxr_t_has_both_protocols(folder, model):
    out = folder / "out"
    assert evaluate(model, write(folder, TEMPORAL), out, image_root=folder) == 0
    found = json.loads((out / "summary.json").read_text())["evaluation"]["ms_cxr_t"]["random"]
    assert found["A"]["findings"]["Edema"]["cases"] == 1
    assert found["B"]["findings"]["Consolidation"]["cases"] == 1
    assert "MS-CXR-T, random" in (out / "report.html").read_text()


def test_bad_input_is_named(folder, model, capsys):
    path, out = write(folder, CHEST_XRAY_14), folder / "out"
    assert evaluate(model, path, out) == 2
    assert "needs --image_root" in capsys.readouterr().err
    (folder / "empty").mkdir()
    assert evaluate(model, path, out, image_root=folder / "empty") == 1
    assert "no usable image" in capsys.readouterr().err
    blind = folder / "blind"
    save_model(text_model(), blind, tokenizer=tokenizer())
    assert evaluate(blind, path, out, image_root=folder) == 2
    assert "is a text-only model" in capsys.readouterr().err

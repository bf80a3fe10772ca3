"""The labeller on synthetic sentences: mentions, negation, uncertainty, normal statements."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import fill

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpo_fast.concepts import label_report
from cpo_fast.concepts.__main__ import main
from cpo_fast.concepts.labeller import (
    _MENTIONS,
    LABELLED,
    find_clear_side,
    find_opposed,
    find_ruled_out,
    split_sentences,
)
from cpo_fast.concepts.labeller_phrases import STEMS
from cpo_fast.types import FINDINGS

SENTENCES = [
    ("There is a small left pleural effusion.", "Pleural Effusion", 1),
    ("No pleural effusion or pneumothorax.", "Pleural Effusion", 0),
    ("No pleural effusion or pneumothorax.", "Pneumothorax", 0),
    ("Lungs show no consolidation, effusion, or pneumothorax.", "Pneumothorax", 0),
    ("Opacity at the left base may represent pneumonia.", "Pneumonia", -1),
    ("Opacity at the left base may represent pneumonia.", "Lung Opacity", 1),
    ("Pneumonia cannot be excluded.", "Pneumonia", -1),
    ("Findings suggestive of emphysema.", "Emphysema", -1),
    ("Findings consistent with emphysema.", "Emphysema", 1),
    ("Subcutaneous emphysema along the chest wall.", "Emphysema", None),
    ("Right basilar atelectasis or scarring.", "Atelectasis", 1),
    ("The heart is mildly enlarged.", "Cardiomegaly", 1),
    ("The heart is not enlarged.", "Cardiomegaly", 0),
    ("Stable cardiomegaly without edema.", "Cardiomegaly", 1),
    ("Stable cardiomegaly without edema.", "Edema", 0),
    ("Borderline cardiomegaly.", "Cardiomegaly", -1),
    ("Possible enlarged heart.", "Cardiomegaly", -1),
    ("The heart may be enlarged.", "Cardiomegaly", -1),
    ("Heart size is borderline enlarged.", "Cardiomegaly", -1),
    ("The heart is normal.", "Cardiomegaly", 0),
    ("Heart size is normal.", "Cardiomegaly", 0),
    ("Normal heart size.", "Cardiomegaly", 0),
    ("Heart size is at the upper limits of normal.", "Cardiomegaly", None),
    ("The cardiac silhouette is not normal.", "Cardiomegaly", None),
    ("Mild cardiomegaly with normal mediastinal contour.", "Cardiomegaly", 1),
    ("The heart is large and the lungs are normal.", "Cardiomegaly", 1),
    ("Heart size and mediastinal contours are normal.", "Cardiomegaly", 0),
    ("Heart size and mediastinal contours are normal.", "Enlarged Cardiomediastinum", 0),
    ("Mediastinal contours are normal.", "Enlarged Cardiomediastinum", 0),
    ("The heart is normal but the mediastinum is widened.", "Enlarged Cardiomediastinum", 1),
    ("Pulmonary vascular congestion is seen.", "Edema", 1),
    ("Soft tissue edema of the arm.", "Edema", None),
    ("The pneumothorax has resolved.", "Pneumothorax", 0),
    ("No change in the large right effusion.", "Pleural Effusion", 1),
    ("No pneumothorax, but a small effusion is present.", "Pleural Effusion", 1),
    ("No evidence of acute fracture.", "Fracture", 0),
    ("A right chest port ends in the cava.", "Support Devices", 1),
    ("A visceral pleural line is seen at the right apex.", "Support Devices", None),
    ("The cardiomediastinal silhouette is not enlarged.", "Enlarged Cardiomediastinum", None),
    ("The mediastinum is widened.", "Enlarged Cardiomediastinum", 1),
    ("Smooth apical pleural thickening on both sides.", "Pleural Other", 1),
    ("A 9 mm nodule projects over the right upper lobe.", "Lung Lesion", 1),
    ("No suspicious nodules or masses.", "Lung Lesion", 0),
    ("Left central venous catheter fracture is seen.", "Fracture", None),
    ("No enlargement of the heart.", "Cardiomegaly", 0),
    ("Mild nonconsolidating airspace disease.", "Consolidation", None),
]


@pytest.mark.parametrize(("text", "finding", "label"), SENTENCES)
def test_sentence_has_the_expected_label(text: str, finding: str, label: int | None) -> None:
    assert label_report(text)[finding] == label
    assert label_report(text.upper())[finding] == label


CASES = [
    json.loads(line)
    for line in (Path(__file__).with_name("labeller_cases.jsonl")).read_text().splitlines()
]
"""{text, accept: {finding: labels acceptable to radiologists}}: negation, lists, change,
resolution, uncertainty, values after a colon, in the style of MIMIC-CXR."""


@pytest.mark.parametrize("change", [str, str.upper, partial(fill, width=40)])
def test_cases_have_accepted_labels(change: Callable[[str], str]) -> None:
    wrong = []
    for case in CASES:
        labels = label_report(change(case["text"]))
        for finding, accepted in case["accept"].items():
            if labels[finding] not in accepted:
                wrong.append((case["text"], finding, labels[finding], accepted))
    assert wrong == []


def test_every_mention_contains_a_stem_of_its_finding() -> None:
    texts = [text for text, _, _ in SENTENCES] + [case["text"] for case in CASES]
    for line in (line for text in texts for line in split_sentences(text)):
        for name, stems in STEMS.items():
            assert not _MENTIONS[name].search(line) or any(stem in line for stem in stems)


@pytest.mark.parametrize("line", ["negative.", "unremarkable radiographs of the chest.", "normal."])
def test_normal_chest_rules_out_every_finding(line: str) -> None:
    assert {"Edema", "Pleural Other", "Emphysema"} <= find_ruled_out(line)
    assert not find_ruled_out("otherwise " + line) and not find_ruled_out("normal chest wall.")


def test_positive_beats_uncertain_beats_negative() -> None:
    no, maybe, yes = "No pneumonia.", "Possible pneumonia.", "Right lower lobe pneumonia."
    assert label_report(f"{no} {maybe}")["Pneumonia"] == -1
    assert label_report(f"{maybe} {no} {yes}")["Pneumonia"] == 1


def test_no_finding_allows_devices_only() -> None:
    assert label_report("Lungs are clear. A pacemaker is in place.")["No Finding"] == 1
    assert label_report("Possible effusion.")["No Finding"] is None
    assert label_report("Emphysema.")["No Finding"] is None


RULED_OUT = [
    ("the lungs are clear.", {"Pneumonia", "Edema", "Atelectasis", "Lung Lesion"}, {"Emphysema"}),
    ("the lungs are otherwise clear.", set(), {"Pneumonia"}),
    ("the left lung is clear.", set(), {"Pneumonia"}),
    ("heart size is normal.", {"Cardiomegaly"}, {"Pneumonia"}),
    (
        "no acute cardiopulmonary abnormality.",
        {"Pneumonia", "Edema"},
        {"Cardiomegaly", "Atelectasis"},
    ),
    ("no acute bony abnormality.", set(), {"Pneumonia"}),
    ("the visualized bony structures reveal no acute abnormalities.", set(), {"Pneumonia"}),
    ("pulmonary vascularity is within normal limits.", {"Edema"}, {"Cardiomegaly"}),
    ("normal chest.", {"Cardiomegaly", "Pneumothorax", "Pleural Other"}, set()),
    ("no pneumothorax.", {"Pneumothorax"}, {"Pleural Effusion"}),
]


@pytest.mark.parametrize(("text", "out", "left"), RULED_OUT)
def test_normal_statement_rules_out_its_findings(text: str, out: set[str], left: set[str]) -> None:
    assert out <= find_ruled_out(text)
    assert not left & find_ruled_out(text)


def test_clear_side_and_opposed_volumes() -> None:
    assert find_clear_side("the left lung is clear.") == "left"
    assert find_clear_side("clear right lung.") == "right"
    assert find_clear_side("the lungs are clear.") == ""
    assert "Emphysema" in find_opposed("low lung volumes.")
    assert "Atelectasis" in find_opposed("the lungs are hyperinflated.")
    assert not find_opposed("no hyperinflation.")


def test_sentences_end_at_full_stops_and_list_marks() -> None:
    text = "1. No effusion.  2. Small nodule\n\nIMPRESSION: Clear lungs."
    assert split_sentences(text) == ["no effusion.", "small nodule", "clear lungs."]


@given(st.text(max_size=300))
def test_any_text_has_valid_labels(text: str) -> None:
    labels = label_report(text)
    assert tuple(labels) == LABELLED
    assert set(FINDINGS) < set(labels)
    assert set(labels.values()) <= {1, 0, -1, None}


@given(st.permutations([s for s, _, _ in SENTENCES[:12]]))
def test_labels_do_not_depend_on_sentence_order(order: list[str]) -> None:
    assert label_report(" ".join(order)) == label_report(" ".join(s for s, _, _ in SENTENCES[:12]))


def test_command_labels_lines(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    source.write_text(
        '{"id": "a", "report": "Small effusion."}\n\n{"id": 7, "report": "No effusion."}\n'
    )
    assert main(["label", "--input", str(source), "--output", str(target)]) == 0
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["a", 7]
    assert [row["labels"]["Pleural Effusion"] for row in rows] == [1, 0]
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert stat.S_IMODE(target.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "line", ["nonsense", "[1]", '{"id": 1}', '{"id": 1, "report": 3}', "[" * 9999]
)
def test_command_names_a_bad_line(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    good = '{"id": "a", "report": "SECRET effusion."}\n'
    source.write_text(good + line + "\n" + good + "x" * (5 << 20) + "\n" + good)
    assert main(["label", "--input", str(source), "--output", str(tmp_path / "o")]) == 1
    assert len((tmp_path / "o").read_text().splitlines()) == 3
    message = capsys.readouterr().err
    assert "2 lines set aside" in message
    assert f"{source}, line 2" in message and f"{source}, line 4: more than 4 MiB" in message
    assert "SECRET" not in message


def test_command_names_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["label", "--input", str(tmp_path / "no"), "--output", str(tmp_path / "o")]) == 2
    assert str(tmp_path / "no") in capsys.readouterr().err

"""Splits of preference files hold out whole questions and patients."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cpo_fast.data import open_preferences
from cpo_fast.data.patients import patients_of
from cpo_fast.errors import UsageError
from cpo_fast.model.checkpoint import Checkpoint
from cpo_fast.run.arguments import TrainArguments
from cpo_fast.run.context import RunContext
from cpo_fast.run.corpus import Texts, build_texts, read_corpus
from cpo_fast.run.samples import tokenise
from cpo_fast.run.split import Split, split_by_question
from cpo_fast.testing.runs import parse_arguments
from cpo_fast.testing.samples import tokenizer
from cpo_fast.types import ImageRef, Preference
from tests.data.samples import dicom


def row(question: str, rejected: str = "wrong", **fields: Any) -> dict[str, Any]:
    asked = [{"role": "user", "content": question}]
    return {"prompt": asked, "chosen": f"right {question}", "rejected": rejected, **fields}


def preferences(tmp_path: Path, rows: list[dict[str, Any]]) -> list[Preference]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    source = open_preferences(str(path))
    found = list(source)
    assert not source.rejected
    return found


def asked(side: list[Preference]) -> set[str]:
    return {str(one.prompt) for one in side}


def both(split: Split) -> tuple[set[str], set[str]]:
    return asked(split.train), asked(split.held_out)


def test_questions_stay_on_one_side(tmp_path: Path) -> None:
    rows = [row(f"Q{i}", f"wrong {k}") for i in range(300) for k in range(3)]
    random.Random(1).shuffle(rows)
    split = split_by_question(preferences(tmp_path, rows), 1 / 6, 42)
    train, held_out = both(split)
    assert not train & held_out
    assert len(train | held_out) == 300 and len(held_out) == 50
    assert len(split.train) + len(split.held_out) == len(preferences(tmp_path, rows))
    random.Random(2).shuffle(rows)
    again = split_by_question(preferences(tmp_path, rows), 1 / 6, 42)
    assert asked(again.held_out) == held_out
    assert asked(split_by_question(preferences(tmp_path, rows), 1 / 6, 7).held_out) != held_out


def test_rows_with_shared_answer_beginnings_form_one_question(tmp_path: Path) -> None:
    """In a row without a prompt field the prompt depends on the rejected answer."""
    rows = [
        {"chosen": f"Q{i}: the heart is large", "rejected": f"Q{i}: the {other}"}
        for i in range(20)
        for other in ("lungs", "heart was large", "heart is small")
    ]
    random.Random(1).shuffle(rows)
    split = split_by_question(preferences(tmp_path, rows), 0.25, 42)
    sides = [
        {(str(p.prompt[0]["content"]) + str(p.chosen)).split(":")[0] for p in side}
        for side in (split.train, split.held_out)
    ]
    assert [len(side) for side in sides] == [15, 5] and not sides[0] & sides[1]


def test_patients_and_images_stay_on_one_side(tmp_path: Path) -> None:
    rows = [
        row(f"Q{k} of {i}", patient_id=100 + i, images=[f"{i}-{k}.png"])
        for i in range(40)
        for k in range(2)
    ]
    found = preferences(tmp_path, rows)
    split = split_by_question(found, 0.2, 42)
    ids = [{id for one in side for id in one.patients} for side in (split.train, split.held_out)]
    assert [len(side) for side in ids] == [32, 8] and not ids[0] & ids[1]
    images = [row(f"Q{k}", images=[f"{i}.png"]) for i in range(40) for k in range(3)]
    split = split_by_question(preferences(tmp_path, images), 0.2, 42)
    shown = [{ref for one in side for ref in one.images} for side in (split.train, split.held_out)]
    assert [len(side) for side in shown] == [32, 8] and not shown[0] & shown[1]


def test_rows_are_joined_through_other_rows(tmp_path: Path) -> None:
    """A and B share a patient, B and C a question: all three are on one side, D on the other."""
    rows = [
        row("Q1", patient_id="A"), row("Q2", patient_id="A"), row("Q2", "bad", patient_id="C"),
        row("Q3", patient_id="C"), row("Q4", patient_id="D"),
    ]  # fmt: skip
    split = split_by_question(preferences(tmp_path, rows), 0.5, 42)
    assert [one.patients for one in split.held_out] == [("D",)]


def test_prompt_shared_by_all_images_gives_one_question_per_image(tmp_path: Path) -> None:
    rows = [row("What is seen?", images=[f"{i}.png"]) for i in range(100)]
    split = split_by_question(preferences(tmp_path, rows), 0.05, 42)
    assert (len(split.train), len(split.held_out), split.note) == (95, 5, "")


def test_files_that_cannot_be_split_by_question(tmp_path: Path) -> None:
    one_question = [row("Q", chosen=f"right {i}", rejected=f"wrong {i}") for i in range(20)]
    split = split_by_question(preferences(tmp_path, one_question), 0.25, 42)
    assert len(split.held_out) == 5 and "same question" in split.note
    assert not {p.chosen for p in split.train} & {p.chosen for p in split.held_out}
    one_patient = [row(f"Q{i}", subject_id=10000032.0) for i in range(20)]
    split = split_by_question(preferences(tmp_path, one_patient), 0.25, 42)
    assert len(split.held_out) == 5 and "patient" in split.note
    one_image = [row(f"Q{i % 10}", images=["legend.png", f"{i}.png"]) for i in range(20)]
    split = split_by_question(preferences(tmp_path, one_image), 0.25, 42)
    assert len(split.held_out) == 5 and "image" in split.note
    alone = split_by_question(preferences(tmp_path, [row("Q")]), 0.25, 42)
    assert (len(alone.train), alone.held_out) == (1, []) and "nothing is held out" in alone.note


@pytest.mark.parametrize("questions", [2, 3, 19])
def test_small_share_holds_out_at_least_one_row(tmp_path: Path, questions: int) -> None:
    rows = [row(f"Q{i}", f"wrong {k}") for i in range(questions) for k in range(4)]
    split = split_by_question(preferences(tmp_path, rows), 0.01, 42)
    assert [len(side) for side in both(split)] == [questions - 1, 1]
    nearly_all = split_by_question(preferences(tmp_path, rows), 0.99, 42)
    assert [len(side) for side in both(nearly_all)] == [1, questions - 1]


def test_pairs_are_held_out_of_a_mixed_file(tmp_path: Path) -> None:
    rows = [row(f"Q{i}") for i in range(10)]
    rows += [{"prompt": f"S{i}", "completion": "x"} for i in range(990)]
    split = split_by_question(preferences(tmp_path, rows), 0.05, 42)
    assert len(split.held_out) == 51  # 5 % of 990 is 50, of 10 at least 1
    assert sum(bool(one.rejected) for one in split.held_out) == 1


@pytest.mark.parametrize(
    ("fields", "images", "ids"),
    [
        ({"patient_id": "p10000032"}, (), ("10000032",)),
        ({"subject_id": 10000032.0}, (), ("10000032",)),
        ({"subject_id": "10000032.0"}, (), ("10000032",)),
        ({"patientId": "p7"}, (), ("p7",)),
        ({"PatientID": 7}, (), ("7",)),
        ({"Subject-Id": "7", "patient_name": "x"}, (), ("7",)),
        ({}, (f"files/p10/p10000032/s50414267/{dicom(1)}.jpg",), ("10000032",)),
        ({}, ("train/patient00042/study1/view1_frontal.jpg",), ("patient00042",)),
        ({}, ("../deid_png/GRDN1/A1/studies/u/1.png",), ("GRDN1",)),
        ({"patient": "a man of 60 with cough"}, ("a.png",), ()),
        ({"patient": ["B", "A"], "patient_id": None, "subject_id": True}, (), ("A", "B")),
        ({"patient_id": 10**400, "subject_id": float("inf")}, (), ()),
    ],
)
def test_patients_of_a_row(
    fields: dict[str, Any], images: tuple[str, ...], ids: tuple[str, ...]
) -> None:
    assert patients_of(fields, [ImageRef(path) for path in images]) == ids


def test_patients_in_other_formats(tmp_path: Path) -> None:
    ccf = {"sid": "10000032", "pid": "50414267", "report": "r", "diagnose": "d"}
    path = tmp_path / "rows.json"
    for extra in ({"counterfact": {"Edema": "x"}}, {"counterfact": {}, "dicom_id": dicom(2)}):
        path.write_text(json.dumps([{**ccf, **extra}]))
        (found,) = open_preferences(str(path))
        assert found.patients == ("10000032",)


def open_run(args: TrainArguments) -> RunContext:
    run = RunContext(args)
    run.checkpoint = Checkpoint(run.folder.path, tokenizer())
    return run


def texts_of(tmp_path: Path, rows: list[dict[str, Any]], *flags: str) -> tuple[Texts, Any]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    args = parse_arguments(
        ["--dataset", str(path), "--output_dir", str(tmp_path / "out"), "--stages", "cpo", *flags]
    )
    run = RunContext(args)
    return build_texts(run, read_corpus(run)), run.folder.summary["data"]


def test_run_prints_held_out_sizes(tmp_path: Path, capsys: Any) -> None:
    rows = [row(f"Q{i}", f"wrong {k}", patient_id=i // 2) for k in range(3) for i in range(40)]
    texts, _ = texts_of(tmp_path, rows, "--eval_fraction", "0.1")
    printed = capsys.readouterr().out
    assert "to train on: 36 questions of 18 patients in 108 records" in printed
    assert "held out (--eval_fraction 0.1): 4 questions of 2 patients in 12 records" in printed
    assert not asked(texts.cpo["train"]) & asked(texts.cpo["validate"])


def test_max_train_samples_of_a_preference_file(tmp_path: Path, capsys: Any) -> None:
    rows = [row(f"Q{i}", f"wrong {k}") for k in range(3) for i in range(40)]
    flags = ("--eval_fraction", "0.1", "--max_train_samples", "20", "--overwrite_output_dir")
    texts, data = texts_of(tmp_path, rows, *flags)
    train = texts.cpo["train"]
    assert len(train) == len(texts.sft["train"]) == 18 and len(asked(train)) == 6
    assert len(texts.cpo["validate"]) == 12
    assert "90 training records left out by --max_train_samples 20" in capsys.readouterr().out
    assert (data["read"], data["used"], data["left_out"]) == (120, 30, 90)
    again, _ = texts_of(tmp_path, rows, *flags)
    assert again.cpo == texts.cpo
    with pytest.raises(UsageError, match="every question has more rows"):
        texts_of(tmp_path, rows, "--max_train_samples", "2", "--overwrite_output_dir")


def test_record_failing_in_both_stages_counts_once(tmp_path: Path, capsys: Any) -> None:
    """1 of 11 records is over-long in SFT and in CPO: less than --max_bad_fraction 0.1."""
    rows = [row(f"Q{i}", id=i) for i in range(10)]
    rows.append({**row("long " * 90), "id": "long"})
    flags = ["--max_length", "80", "--sft_max_length", "80", "--eval_fraction", "0",
             "--max_bad_fraction", "0.1"]  # fmt: skip
    texts, _ = texts_of(tmp_path, rows, *flags)
    args = parse_arguments(
        ["--dataset", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "two"), *flags]
    )
    run = open_run(args)
    folder = run.folder
    samples = tokenise(run, texts)
    assert (len(samples.sft["train"]), len(samples.cpo["train"])) == (10, 10)
    assert [(one.id, one.reason) for one in folder.rejected] == [("long", "over-long")]
    printed = capsys.readouterr().out
    assert "data: 1 set aside: over-long (rejected_records.jsonl)" in printed
    assert "sft: 10 records to train on, 0 held out\n" in printed
    assert "cpo: 10 records to train on, 0 held out\n" in printed
    data = folder.summary["data"]
    assert data["trained_on"] == {"sft": 10, "cpo": 10} and data["held_out"]["cpo"] == 0


def test_stages_print_their_record_counts(tmp_path: Path, capsys: Any) -> None:
    """CPO has fewer records than SFT; stages that are not trained print nothing."""
    flags = ["--eval_fraction", "0.3"]
    texts, _ = texts_of(tmp_path, [row(f"Q{i}", id=i) for i in range(10)], *flags)
    del texts.cpo["train"][:2], texts.cpo["validate"][:1]  # as for answers without a rejected one
    want = {"sft": (7, 3), "cpo": (5, 2)}
    capsys.readouterr()
    for name, stages in (("both", "sft,cpo"), ("one", "cpo")):
        out = ["--output_dir", str(tmp_path / name), "--stages", stages]
        args = parse_arguments(["--dataset", str(tmp_path / "rows.jsonl"), *out, *flags])
        run = open_run(args)
        folder = run.folder
        tokenise(run, texts)
        data, printed = folder.summary["data"], capsys.readouterr().out
        shown = stages.split(",")
        for side, number in (("trained_on", 0), ("held_out", 1)):
            assert data[side] == {stage: want[stage][number] for stage in shown}
        for stage, (trained, held) in want.items():
            line = f"{stage}: {trained} records to train on, {held} held out"
            assert (line in printed) is (stage in shown)


def test_held_out_side_can_be_empty(tmp_path: Path, capsys: Any) -> None:
    """A single over-long held-out row does not end the run."""
    texts, _ = texts_of(tmp_path, [row("Q")], "--eval_fraction", "0")
    texts.cpo["validate"] = [replace(texts.cpo["train"][0], chosen="<|im_end|>")]
    args = parse_arguments(
        ["--dataset", "rows", "--output_dir", str(tmp_path / "two"), "--max_bad_fraction", "1"]
    )
    samples = tokenise(open_run(args), texts)
    assert (len(samples.cpo["train"]), samples.cpo["validate"]) == (1, [])
    assert "no sample of split validate is left" in capsys.readouterr().out

"""Preference rows: rejected rows, several messages, marked answers, questions, media."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from cpo_fast.data import is_preference_file, open_preferences
from cpo_fast.data.images import load_image
from cpo_fast.errors import DataError, RecordError, UsageError
from tests.data.preference_samples import CCF, GOOD, IMAGE, RANKED, USER, read, read_one, text, turn
from tests.data.samples import SECRET, image_bytes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rejected": [turn("x ")]}, "chosen-equals-rejected"),
        ({"chosen": [turn(" ")]}, "empty-response"),
        ({"chosen": None}, "missing-field"),
        ({"chosen": 5}, "wrong-type"),
        ({"prompt": {"a": SECRET}}, "wrong-type"),
        ({"prompt": []}, "empty-prompt"),
        ({"prompt": [turn(SECRET, "judge")]}, "unknown-role"),
        ({"prompt": [turn(SECRET, "system")], "images": ["a"]}, "no-user-message"),
        ({"prompt": [{"role": "user", "content": [{"type": "video"}]}]}, "unsupported-medium"),
        ({"prompt": [{"role": "user", "content": [{"type": "smell"}]}]}, "unknown-content"),
        ({"prompt": [{"role": "user", "content": [IMAGE]}]}, "image-placeholder-mismatch"),
        ({"chosen": [turn("a"), turn(SECRET, "judge")]}, "unknown-role"),
        ({"chosen": [turn("a"), {"role": "user", "content": [IMAGE]}]}, "image-in-response"),
        ({"chosen": [turn("a"), 5]}, "wrong-type"),
        ({"chosen": []}, "empty-response"),
        ({"tools": SECRET}, "wrong-type"),
        ({"tools": 5}, "wrong-type"),
        ({"chat_template_kwargs": [SECRET]}, "wrong-type"),
        ({"chat_template_kwargs": {"chat_template": SECRET}}, "bad-template-option"),
        ({"chosen": [turn(SECRET, "user")]}, "unknown-role"),
        ({"chosen": [{"role": "assistant", "content": [IMAGE]}]}, "image-in-response"),
        ({"chosen": [turn("half a pair \ud800 " + SECRET)]}, "bad-unicode"),
        ({"images": [{"bytes": "#", "path": None}]}, "image-unreadable"),
        ({"images": [{}]}, "image-missing"),
        ({"images": [None]}, "missing-field"),
        ({"images": 7}, "wrong-type"),
        ({"weight": -1}, "bad-weight"),
        ({"weight": 1e999}, "json-nan"),
        ({"weight": True}, "bad-weight"),
        ({"weight": 10**400}, "bad-weight"),
        ({"prompt": "", "chosen": "x", "rejected": "y"}, "empty-prompt"),
        ({"prompt": " \n", "chosen": "x", "rejected": "y"}, "empty-prompt"),
        ({"prompt": [turn(" ", "user")]}, "empty-prompt"),
        ({"prompt": None, "chosen": "yes", "rejected": "no"}, "empty-prompt"),
    ],
)
def test_bad_rows_are_set_aside_by_reason(tmp_path: Path, changes: dict, reason: str) -> None:
    found, reasons, _ = read(tmp_path, GOOD, {**GOOD, **changes})
    assert len(found) == 1
    assert reasons == [reason]


def test_images_inside_a_row(tmp_path: Path) -> None:
    data = base64.b64encode(image_bytes()).decode()
    for image in ({"bytes": data, "path": "a"}, f"data:image/jpeg;base64,{data}"):
        (found,), _, _ = read(tmp_path, {**GOOD, "images": [image]})
        assert load_image(found.images[0]).size == (8, 6)


def test_image_root_limits_paths(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.jpg").write_bytes(image_bytes())
    row = {**GOOD, "images": ["a.jpg"]}
    (found,), _, _ = read(tmp_path, row, image_root=str(tmp_path / "pictures"))
    assert load_image(found.images[0]).size == (8, 6)
    (outside,), _, _ = read(tmp_path, {**GOOD, "images": ["../a.jpg"]})
    with pytest.raises(RecordError, match="path-outside-root"):
        load_image(outside.images[0])
    with pytest.raises(DataError, match="image_root"):
        open_preferences(str(tmp_path / "rows.jsonl"), image_root=str(tmp_path / "none"))


def test_first_valid_record_or_flag_sets_the_format(tmp_path: Path) -> None:
    found, reasons, kind = read(tmp_path, {"x": 1}, [1], GOOD, CCF)
    assert (len(found), kind) == (1, "trl")
    assert reasons == ["missing-field", "not-an-object", "missing-field"]
    assert read(tmp_path, GOOD, dataset_format="ranked")[1] == ["missing-field"]
    with pytest.raises(DataError, match=r"unknown format.*counterfact") as caught:
        read(tmp_path, {SECRET: SECRET})
    assert SECRET not in str(caught.value)
    with pytest.raises(DataError, match="rejeced: did you mean rejected") as caught:
        read(tmp_path, {"prompt": "Q", "chosen": SECRET, "rejeced": "No.", "images": []})
    assert SECRET not in str(caught.value) and str(caught.value).count("did you mean") == 1
    with pytest.raises(UsageError, match="dataset_format"):
        read(tmp_path, GOOD, dataset_format="csv")


def test_what_counts_as_a_preference_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.touch()
    assert is_preference_file(str(path))
    assert is_preference_file("nowhere", "trl")
    assert not is_preference_file(str(tmp_path))
    assert not is_preference_file("open-i")
    assert not is_preference_file(str(path), "mimic-cxr")
    assert not is_preference_file(str(tmp_path / "nowhere.jsonl"))


def test_answers_of_several_messages(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "ratio"}]}
    turns = (turn("a"), turn("why", "user"), turn("b"))
    row = {**GOOD, "chosen": [*turns], "rejected": [call], "tools": '[{"name": "ratio"}]'}
    found = read_one(
        tmp_path, {**row, "chat_template_kwargs": {"mood": "calm", "none": None}}, "trl"
    )
    assert (found.chosen, found.rejected) == (turns, ((call,),))
    assert found.template == {"tools": [{"name": "ratio"}], "mood": "calm"}
    _, reasons, _ = read(tmp_path, {**GOOD, "chosen": [*turns], "rejected": [*turns]})
    assert reasons == ["chosen-equals-rejected"]
    others = {**GOOD, "chosen": [*turns], "rejected": [turn("c"), turn("d", "user")]}
    (both,), reasons, _ = read(tmp_path, {**GOOD, "chosen": [*turns]}, others)
    assert (len(both.rejected), reasons) == (2, [])


def test_rejected_response_of_several_messages_has_its_own_prompt(tmp_path: Path) -> None:
    row = {"messages": [USER, turn("x")], "rejected_response": [turn("y"), turn("z")]}
    found = read_one(tmp_path, row, "ms-swift")
    assert (found.chosen, found.rejected) == ("x", ("z",))
    assert found.rejected_prompts == ((*found.prompt, turn("y")),)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": [USER], "completion": [turn("x")]}, "trl"),
        ({"prompt": [USER], "chosen": "x", "rejected_responses": []}, "preferences"),
        ({"messages": [USER, turn("x")]}, "ms-swift"),
        ({"report": "r", "diagnose": "d", "counterfact": {}}, "ccf"),
    ],
)
def test_answers_without_a_pair(tmp_path: Path, row: dict, kind: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    source = open_preferences(str(path))
    found = list(source)
    assert [(f.rejected, bool(f.chosen)) for f in found] == [((), True)] * 2
    assert (source.kind, source.alone, source.merged, source.rejected) == (kind, 2, 0, [])


def test_swift_row_with_null_rejected_answer_is_set_aside(tmp_path: Path) -> None:
    row = {"messages": [USER, turn("x")], "rejected_response": "y"}
    _, reasons, _ = read(tmp_path, row, {**row, "rejected_response": None})
    assert reasons == ["no-rejected"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "completion": "x"},
        {"messages": [USER, turn("x")]},
        {"instruction": "Q", "output": "x"},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "x"}]},
        {"prompt": [USER], "chosen": "x", "rejected_responses": []},
    ],
)
def test_answers_marked_bad_are_set_aside(tmp_path: Path, row: dict) -> None:
    name = "kto_tag" if {"instruction", "conversations"} & row.keys() else "label"
    marks = [True, False, 1, 0, "good", None, 2, True]
    found, reasons, _ = read(tmp_path, *({**row, "id": n, name: m} for n, m in enumerate(marks)))
    assert [(one.id, one.rejected) for one in found] == [("0", ()), ("2", ()), ("7", ())]
    assert reasons == ["answer-marked-bad"] * 2 + ["unclear-label"] * 3
    good = {**row, "kto_tag": True} if "conversations" in row else row
    _, reasons, _ = read(tmp_path, {**good, "is_correct": False}, good)
    assert reasons == ["answer-marked-bad"]


def test_other_marks_of_bad_answers(tmp_path: Path) -> None:
    turns = [USER, {**turn("x"), "loss": False}]
    assert read(tmp_path, {"messages": turns})[1] == ["answer-marked-bad"]
    assert read(tmp_path, {**GOOD, "label": False})[1] == ["unclear-label"]
    assert read(tmp_path, {**GOOD, "label": "Pneumonia"}, {**GOOD, "label": 0})[1] == [
        "duplicate-record"
    ]
    for high, low in (("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating")):
        rows = [{**GOOD, "prompt": [turn(f"Q{n}", "user")], high: n, low: 2} for n in (1, 2, 3)]
        assert read(tmp_path, *rows)[1] == ["scores-contradict"]
    listed = [{"rank": -1, "answer": "failed"}, {"rank": 0, "answer": "x"}]
    ranked = {"prompt": "Q", "answers": listed}
    assert read(tmp_path, ranked)[1] == ["bad-rank"]
    listed[0] |= {"rank": 10**400}
    assert read(tmp_path, ranked)[1] == ["bad-rank"]
    listed[0] |= {"rank": 1}
    listed[1]["label"] = False
    assert read(tmp_path, ranked)[1] == ["answer-marked-bad"]
    null = {"prompt": "Q", "chosen": None, "rejected": "y"}
    assert read(tmp_path, GOOD, null)[1] == ["missing-field"]
    (found,), reasons, _ = read(tmp_path, {**null, "rejected": None, "completion": "x"})
    assert (found.chosen, found.rejected, reasons) == ("x", (), [])


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Q", "input": "I"}, [turn("Q\nI", "user")]),
        ({"instruction": "Q", "input": ""}, [turn("Q", "user")]),
        ({"input": "I", "system": None}, [turn("I", "user")]),
        ({"system": "S", "question": "Q"}, [turn("S", "system"), turn("Q", "user")]),
        ({"system": "", "question": "Q"}, [turn("Q", "user")]),
        ({"system": "S", "prompt": "Q"}, [turn("S", "system"), turn("Q", "user")]),
        ({"system": "S", "prompt": [USER]}, [turn("S", "system"), USER]),
        ({"system": "S", "prompt": [turn("S", "system"), USER]}, [turn("S", "system"), USER]),
        (
            {"query": "R", "history": [["Q", "A"]], "system": "S"},
            [turn("S", "system"), turn("Q", "user"), turn("A"), turn("R", "user")],
        ),
        ({"question": "Q", "prompt": "the Q"}, [turn("the Q", "user")]),
    ],
)
def test_names_of_question_fields(tmp_path: Path, row: dict, prompt: list) -> None:
    (found,), reasons, kind = read(tmp_path, {**row, "chosen": "It is x", "rejected": "It is y"})
    assert [list(found.prompt), found.chosen, found.rejected] == [prompt, "It is x", ("It is y",)]
    assert reasons == [] and kind == ("trl" if "prompt" in row else "alpaca")
    assert found.plain is (row.keys() == {"question", "prompt"})


def test_rows_with_question_fields(tmp_path: Path) -> None:
    swift = {"query": "<image>Q", "response": "x", "rejected_response": "y", "images": ["a"]}
    found = read_one(tmp_path, swift, "alpaca")
    assert (found.prompt[0]["content"], found.rejected) == ([IMAGE, text("Q")], ("y",))
    talk = {"chosen": [USER, turn("x")], "rejected": [USER, turn("y")]}
    for field in ("question", "prompt", "instruction"):  # the same question twice
        assert read_one(tmp_path, {**talk, field: "What is it?"}, "trl").prompt == (USER,)
    turns = {"prompt": "Q", "chosen": [turn("x")], "rejected": [turn("y")]}
    assert read_one(tmp_path, turns, "trl").prompt == (turn("Q", "user"),)
    ultrafeedback = {**talk, "prompt": "What is it?", "messages": [USER, turn("x")]}
    assert read_one(tmp_path, ultrafeedback, "trl").rejected == ("y",)
    both = {"chosen": "x", "rejected": "y", "instruction": "Q", "question": "R"}
    assert read(tmp_path, both)[1] == ["unclear-question"]
    assert read(tmp_path, {"query": "Q", "response": "x", "rejected_response": None})[1] == [
        "no-rejected"
    ]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": "Q", "context": SECRET}, "context"),
        ({"prompt": "Q", "document": [SECRET]}, "document"),
        ({"prompt": [USER], "history": [["a", SECRET]]}, "history"),
        ({"prompt": "Q", "input": SECRET}, "input"),
        ({"prompt": "Q", "patient": "a man of 60"}, "patient"),
        ({"prompt": "Q", "image_path": "a.png"}, "image_path"),
        ({"prompt": "Q", "functions": [{"function": {"name": "ratio"}}]}, "functions"),
        ({"title": f"about {SECRET}"}, "title"),  # beside an implicit prompt
        ({"system": "S"}, "system"),
    ],
)
def test_unread_text_sets_the_row_aside(tmp_path: Path, row: dict, field: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**row, "chosen": "It is x", "rejected": "It is y"}))
    source = open_preferences(str(path), dataset_format="trl")
    assert list(source) == []
    (record,) = source.rejected
    assert record.reason == "unread-field" and record.detail.startswith(field)
    assert SECRET not in str(source.rejected)


def test_other_unread_fields_are_counted(tmp_path: Path) -> None:
    more = {"source": "a web page", "score": 3.5, "patient_id": "P1", "rationale": "it is so"}
    path = tmp_path / "rows.jsonl"
    rows = [{**GOOD, **more}, {**GOOD, **more, "rationale": "x", SECRET + " x": "two words"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_preferences(str(path))
    list(source)
    assert source.unread == {"rationale": 1, "a field": 1}
    assert "1 row with text in the field rationale, which is not read" in source.remarks()


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": [turn("<video>Q", "user"), turn("x")], "rejected_response": "y"}, "ms-swift"),
        ({"messages": [USER, turn("x")], "rejected_response": "y", "videos": ["a"]}, "ms-swift"),
        ({**GOOD, "audios": ["a.wav"]}, "trl"),
        ({**GOOD, "prompt": [turn("<audio>", "user")]}, "trl"),
        ({**GOOD, "prompt": [turn("<|video_pad|>Q", "user")]}, "trl"),
        ({**GOOD, "prompt": [{"role": "user", "content": [{"type": "image_url"}]}]}, "trl"),
        ({"instruction": "<video>Q", "chosen": "x", "rejected": "y"}, "alpaca"),
        ({"context": "<audio>Q", "completions": RANKED}, "ranked"),
    ],
)
def test_video_and_audio_set_the_row_aside(tmp_path: Path, row: dict, kind: str) -> None:
    found, reasons, detected = read(tmp_path, row)
    assert (found, detected) == ([], kind)
    assert reasons == ["unsupported-medium"]


def test_repeated_id_with_another_answer_is_reported(tmp_path: Path) -> None:
    rows = [
        {**GOOD, "id": "a"},
        {**GOOD, "id": "a", "rejected": [turn("z")]},  # the same question and answer
        {**GOOD, "id": "a", "chosen": [turn("other")]},
        {**GOOD, "id": "b", "prompt": [turn("Q", "user")]},
        {**GOOD, "id": "b"},
        {**GOOD, "prompt": [turn("R", "user")]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_preferences(str(path))
    assert len(list(source)) == 5
    assert source.repeated_ids == 2
    assert source.remarks() == ["2 rows with an id repeated for another question or answer"]

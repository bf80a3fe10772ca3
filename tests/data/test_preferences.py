"""Preference files: formats detected by fields, bad rows set aside with reasons."""

from __future__ import annotations

import base64
import contextlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpo_fast.data import is_preference_file, open_preferences
from cpo_fast.data.images import load_image
from cpo_fast.data.labels import DEFAULT_PROMPT
from cpo_fast.data.preference_rows import PARSERS, detect_format
from cpo_fast.data.preference_values import answer_text
from cpo_fast.data.tokens import token_ids
from cpo_fast.data.unread_fields import unread_fields
from cpo_fast.errors import DataError, RecordError, UsageError
from cpo_fast.testing.samples import tokenizer
from cpo_fast.types import Counterfactual, ImageRef, Preference
from tests.data.samples import SECRET, dicom, image_bytes

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


# --- trl -----------------------------------------------------------------------------------------


def test_trl_conversation_with_an_image(tmp_path: Path) -> None:
    row = {"images": ["a.png"], "prompt": [USER], "chosen": [said("x")], "rejected": [said("y")]}
    found = one(tmp_path, row, "trl")
    assert found == Preference(
        id="rows:1",
        prompt=({"role": "user", "content": [IMAGE, text("What is it?")]},),
        chosen="x",
        rejected=("y",),
        images=(ImageRef("a.png", str(tmp_path)),),
    )
    single = one(tmp_path, {**row, "images": None, "image": "a.png"}, "trl")
    assert single == found


def test_trl_content_in_parts(tmp_path: Path) -> None:
    parts = [text("Look"), IMAGE, text("here")]
    row = {
        "images": ["a.png"],
        "prompt": [said("Be brief.", "system"), {"role": "user", "content": parts}],
        "chosen": [{"role": "assistant", "content": [text("x"), text("y")]}],
        "rejected": [said("z")],
    }
    found = one(tmp_path, row, "trl")
    assert [message["content"] for message in found.prompt] == ["Be brief.", parts]
    assert found.chosen == "xy"


def test_trl_text_and_implicit_prompts(tmp_path: Path) -> None:
    explicit = one(tmp_path, {"prompt": "Q?", "chosen": "x", "rejected": "y"}, "trl")
    assert (explicit.prompt, explicit.chosen) == ((said("Q?", "user"),), "x")
    talk = {"chosen": [USER, said("x")], "rejected": [USER, said("y")]}
    for row in (talk, {**talk, "prompt": "What is it?"}):
        found = one(tmp_path, row, "trl")
        assert (found.prompt, found.chosen, found.rejected) == ((USER,), "x", ("y",))
    found = one(tmp_path, {"chosen": "It is big", "rejected": "It is small"}, "trl")
    assert (found.prompt[0]["content"], found.chosen, found.rejected) == (
        "It is", " big", (" small",),
    )  # fmt: skip


def test_strings_are_plain_text_and_messages_are_not(tmp_path: Path) -> None:
    strings = {"prompt": "Q?", "chosen": "x", "rejected": "y"}
    ours = {"prompt": "Q?", "chosen": "x", "rejected_responses": ["y", "z"]}
    implicit = {"chosen": "It is big", "rejected": "It is small"}
    for row in (strings, ours, implicit):
        assert read(tmp_path, row)[0][0].plain
    mixed = {"prompt": [USER], "chosen": "x", "rejected": "y"}
    pictured = {**strings, "images": ["a"]}  # no placeholder in the text
    for row in (mixed, {**strings, "chosen": [USER, said("x")], "rejected": [USER, said("y")]}):
        assert not read(tmp_path, row)[0][0].plain
    assert read(tmp_path, pictured)[0][0].prompt[0]["content"] == [IMAGE, text("Q?")]
    placed = {**pictured, "prompt": "<|image_pad|>Q?"}
    assert read(tmp_path, placed)[0][0].plain
    placed["images"] = ["a", "b"]
    assert read(tmp_path, placed)[1] == ["image-placeholder-mismatch"]


def test_reference_log_probs_are_counted_and_not_used(tmp_path: Path) -> None:
    row = {"prompt": "Q", "chosen": "x", "rejected": "y"}
    logps = {**row, "ref_chosen_logps": -3.5, "ref_rejected_logps": -4.5}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (row, {**logps, "prompt": "R"})))
    source = open_preferences(str(path))
    assert len(list(source)) == 2
    assert (source.ref_logps, source.kind, source.rejected) == (1, "trl", [])


@pytest.mark.slow  # importing trl is
@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, said("x")], "rejected": [USER, said("y")]},
        {"prompt": "Q", "chosen": [USER, said("x")], "rejected": [USER, said("y")]},
        {"prompt": [USER], "chosen": [said("x")], "rejected": [said("y")]},
        {"images": ["a", "b"], "prompt": [USER, said("Hm."), USER], "chosen": [said("x")],
         "rejected": [said("y")]},
        {"images": ["a"], "prompt": [said("S", "system"), USER], "chosen": [said("x")],
         "rejected": [said("y")]},
        {"images": ["a"], "prompt": [{"role": "user", "content": [text("Q"), IMAGE]}],
         "chosen": [said("x")], "rejected": [said("y")]},
    ],
)  # fmt: skip
def test_trl_itself_makes_the_same_conversation(tmp_path: Path, row: dict) -> None:
    pytest.importorskip("trl")
    from trl.data_utils import maybe_extract_prompt, prepare_multimodal_messages

    theirs = {**row, **maybe_extract_prompt(dict(row))}
    images = row.get("images", [])
    expected = prepare_multimodal_messages(theirs["prompt"], images)
    for message in expected:
        for part in message["content"]:
            part.pop("image", None)
    found = one(tmp_path, row, "trl")
    got = [
        m if isinstance(m["content"], list) else {**m, "content": [text(m["content"])]}
        for m in found.prompt
    ]
    assert got == expected
    assert [found.chosen, *found.rejected] == [
        theirs[name][0]["content"] for name in ("chosen", "rejected")
    ]


# --- the others ----------------------------------------------------------------------------------


def test_ms_swift(tmp_path: Path) -> None:
    talk = {"messages": [said("<image>Q <image>?", "user"), said("x")], "images": ["a", "b"]}
    found = one(tmp_path, {**talk, "rejected_response": "y"}, "ms-swift")
    assert found.prompt[0]["content"] == [IMAGE, text("Q "), IMAGE, text("?")]
    assert (found.chosen, found.rejected) == ("x", ("y",))
    assert one(tmp_path, {**talk, "rejected_response": [said("y")]}, "ms-swift") == found
    other = {**talk, "rejected_messages": [*talk["messages"][:-1], said("y")]}
    assert one(tmp_path, other, "ms-swift") == found


def test_ms_swift_rejected_messages_with_a_prompt_of_their_own(tmp_path: Path) -> None:
    row = {
        "system": "Be brief.",
        "messages": [said("<image>Q", "user"), said("x")],
        "images": ["a"],
        "rejected_messages": [said("R", "user"), said("x")],
        "rejected_images": ["b", "c"],
    }
    found = one(tmp_path, row, "ms-swift")
    (own,) = found.rejected_prompts
    assert own is not None
    assert own[0] == found.prompt[0] == said("Be brief.", "system")
    assert own[1]["content"] == [IMAGE, IMAGE, text("R")]
    assert [ref.path for ref in found.rejected_images[0] or ()] == ["b", "c"]
    assert (found.chosen, found.rejected) == ("x", ("x",))


def test_ms_swift_missing_tags_stand_in_front(tmp_path: Path) -> None:
    row = {"messages": [USER, said("x")], "images": [{"path": "a"}], "rejected_response": "y"}
    assert one(tmp_path, row, "ms-swift").prompt[0]["content"] == [IMAGE, text("What is it?")]


def test_ms_swift_rejected_images_alone_are_perception(tmp_path: Path) -> None:
    row = {"messages": [USER, said("x")], "images": ["a"], "rejected_images": ["b"]}
    found = one(tmp_path, row, "ms-swift")
    assert (found.chosen, found.rejected, found.source) == ("x", ("x",), "perception")
    assert found.rejected_images == ((ImageRef("b", str(tmp_path)),),)


def test_llama_factory(tmp_path: Path) -> None:
    row = {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "<image>Q"},
            {"from": "gpt", "value": "Hm."},
            {"from": "human", "value": "And?"},
        ],
        "chosen": {"from": "gpt", "value": "x"},
        "rejected": {"from": "gpt", "value": "y"},
        "images": ["a"],
    }
    found = one(tmp_path, row, "llama-factory")
    assert [message["role"] for message in found.prompt] == ["system", "user", "assistant", "user"]
    assert found.prompt[1]["content"] == [IMAGE, text("Q")]
    assert (found.chosen, found.rejected) == ("x", ("y",))
    found, reasons, _ = read(tmp_path, {**row, "images": []})
    assert (found, reasons) == ([], ["image-placeholder-mismatch"])


RANKED = [{"rank": 0, "completion": "x"}, {"rank": 1, "completion": "y"}]


def test_ranked_lists(tmp_path: Path) -> None:
    def ranked(*ranks: float) -> list[dict[str, Any]]:
        return [{"rank": r, "completion": [said(f"{n}")]} for n, r in enumerate(ranks)]

    row = {"context": [USER], "completions": ranked(2, 0, 1, 0)}
    found = one(tmp_path, row, "ranked")
    assert (found.prompt, found.chosen, found.rejected) == ((USER,), "1", ("2", "0"))
    nectar = {
        "prompt": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: What is it?\n\nAssistant: ",
        "answers": [{"answer": "y", "rank": 7.0}, {"answer": "x", "rank": 1.0}],
    }
    found = one(tmp_path, nectar, "ranked")
    assert [m["content"] for m in found.prompt] == ["Hi", "Yes?", "What is it?"]
    assert (found.chosen, found.rejected) == ("x", ("y",))
    assert one(tmp_path, {**nectar, "prompt": "Q"}, "ranked").prompt == (said("Q", "user"),)
    ties = read(tmp_path, {"context": [USER], "completions": ranked(1, 1)})
    assert ties[1] == ["no-rejected"]


CCF = {
    "dicom_id": dicom(7),
    "sid": "50414267",
    "pid": "10000032",
    "report": "FINDINGS: x",
    "diagnose": "The disease of this patient is Edema.",
    "counterfact": {"Pneumonia": "FINDINGS: y", "Fracture": "FINDINGS: z"},
}


@pytest.mark.parametrize("ids", [{}, {"sid": "10000032", "pid": 50414267}, {"sid": "s50414267"}])
def test_ccf(tmp_path: Path, ids: dict) -> None:
    found = one(tmp_path, {**CCF, **ids}, "ccf")
    assert found.id == "s50414267"
    assert found.prompt[0]["content"] == [IMAGE, text(DEFAULT_PROMPT)]
    assert found.images[0].path == f"files/p10/p10000032/s50414267/{dicom(7)}.jpg"
    assert found.chosen == "<think> FINDINGS: x </think> The disease of this patient is Edema."
    assert found.rejected == (
        "<think> FINDINGS: y </think> The disease of this patient is Pneumonia.",
        "<think> FINDINGS: z </think> The disease of this patient is Fracture.",
    )


def counterfactual(target: str, study: str = "s1", **changes: Any) -> dict[str, Any]:
    record = Counterfactual(
        id=f"{study}/{target}",
        study_id=study,
        patient_id="p1",
        images=("a.png",),
        report="FINDINGS: x",
        labels=("Edema",),
        target=target,
        counterfactual=f"FINDINGS: {target}",
        counterfactual_labels=("Edema", target),
        checks={"asserted": True},
    )
    return {**record.to_json(), **changes}


def test_our_counterfactual_rows(tmp_path: Path) -> None:
    rows = [counterfactual("Pneumonia"), counterfactual("Fracture"), counterfactual("Edema", "s2")]
    found, reasons, kind = read(tmp_path, *rows)
    assert (reasons, kind, [p.id for p in found]) == ([], "counterfactuals", ["s1", "s2"])
    assert found[0].chosen.endswith("</think> The disease of this patient is Edema.")
    assert found[0].rejected == (
        "<think> FINDINGS: Pneumonia </think> The disease of this patient is Pneumonia.",
        "<think> FINDINGS: Fracture </think> The disease of this patient is Fracture.",
    )


def test_our_counterfactual_rows_that_fail_or_show_another_image(tmp_path: Path) -> None:
    found, reasons, _ = read(
        tmp_path,
        counterfactual("Pneumonia", checks={"asserted": False, SECRET: False}),
        counterfactual("Pneumonia", kind="perception"),
        counterfactual("Pneumonia", kind="perception", rejected_images=["b.png"]),
    )
    assert reasons == ["counterfactual-checks", "missing-field"]
    (perception,) = found
    assert perception.rejected == (perception.chosen,)
    assert perception.rejected_images == ((ImageRef("b.png", str(tmp_path)),),)


def test_our_preference_rows(tmp_path: Path) -> None:
    row = {"id": "s1", "images": ["a"], "prompt": [USER], "chosen": "x",
           "rejected_responses": ["y", "z"], "weight": 2}  # fmt: skip
    found = one(tmp_path, row, "preferences")
    assert (found.id, found.rejected, found.weight) == ("s1", ("y", "z"), 2.0)


# --- merged rows ---------------------------------------------------------------------------------


def test_adjacent_rows_with_one_question_are_grouped(tmp_path: Path) -> None:
    def row(rejected: str, prompt: str = "Q", image: str = "a") -> dict[str, Any]:
        return {"images": [image], "prompt": prompt, "chosen": "x", "rejected": rejected}

    rows = [row("y"), row("z"), row("y"), row("y", "R"), row("y"), row("z", image="b")]
    found, reasons, _ = read(tmp_path, *rows)
    assert [p.rejected for p in found] == [("y", "z"), ("y",), ("y",), ("z",)]
    assert reasons == ["duplicate-record"]
    assert [p.id for p in found] == ["rows:1", "rows:4", "rows:5", "rows:6"]
    path = tmp_path / "rows.jsonl"
    source = open_preferences(str(path))
    assert (len(list(source)), source.merged, source.read) == (4, 1, 5)


GOOD = {"prompt": [USER], "chosen": [said("x")], "rejected": [said("y")]}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rejected": [said("x ")]}, "chosen-equals-rejected"),
        ({"chosen": [said(" ")]}, "empty-response"),
        ({"chosen": None}, "missing-field"),
        ({"chosen": 5}, "wrong-type"),
        ({"prompt": {"a": SECRET}}, "wrong-type"),
        ({"prompt": []}, "empty-prompt"),
        ({"prompt": [said(SECRET, "judge")]}, "unknown-role"),
        ({"prompt": [said(SECRET, "system")], "images": ["a"]}, "no-user-message"),
        ({"prompt": [{"role": "user", "content": [{"type": "video"}]}]}, "unsupported-medium"),
        ({"prompt": [{"role": "user", "content": [{"type": "smell"}]}]}, "unknown-content"),
        ({"prompt": [{"role": "user", "content": [IMAGE]}]}, "image-placeholder-mismatch"),
        ({"chosen": [said("a"), said(SECRET, "judge")]}, "unknown-role"),
        ({"chosen": [said("a"), {"role": "user", "content": [IMAGE]}]}, "image-in-response"),
        ({"chosen": [said("a"), 5]}, "wrong-type"),
        ({"chosen": []}, "empty-response"),
        ({"tools": SECRET}, "wrong-type"),
        ({"tools": 5}, "wrong-type"),
        ({"chat_template_kwargs": [SECRET]}, "wrong-type"),
        ({"chat_template_kwargs": {"chat_template": SECRET}}, "bad-template-option"),
        ({"chosen": [said(SECRET, "user")]}, "unknown-role"),
        ({"chosen": [{"role": "assistant", "content": [IMAGE]}]}, "image-in-response"),
        ({"chosen": [said("half a pair \ud800 " + SECRET)]}, "bad-unicode"),
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
        ({"prompt": [said(" ", "user")]}, "empty-prompt"),
        ({"prompt": None, "chosen": "yes", "rejected": "no"}, "empty-prompt"),
    ],
)
def test_bad_rows_are_set_aside_by_reason(tmp_path: Path, changes: dict, reason: str) -> None:
    found, reasons, _ = read(tmp_path, GOOD, {**GOOD, **changes})
    assert len(found) == 1
    assert reasons == [reason]


def test_images_in_the_row(tmp_path: Path) -> None:
    data = base64.b64encode(image_bytes()).decode()
    for image in ({"bytes": data, "path": "a"}, f"data:image/jpeg;base64,{data}"):
        (found,), _, _ = read(tmp_path, {**GOOD, "images": [image]})
        assert load_image(found.images[0]).size == (8, 6)


def test_image_root(tmp_path: Path) -> None:
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


def test_kind_is_told_by_the_first_good_record_or_forced(tmp_path: Path) -> None:
    found, reasons, kind = read(tmp_path, {"x": 1}, [1], GOOD, CCF)
    assert (len(found), kind) == (1, "trl")
    assert reasons == ["missing-field", "not-an-object", "missing-field"]
    assert read(tmp_path, GOOD, dataset_format="ranked")[1] == ["missing-field"]
    with pytest.raises(DataError, match=r"unknown format.*counterfact") as caught:
        read(tmp_path, {SECRET: SECRET})
    assert SECRET not in str(caught.value)
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


@pytest.mark.parametrize("array", [False, True])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, array: bool) -> None:
    path = tmp_path / "rows.json"
    with path.open("w") as file:
        file.write("[" if array else "")
        for i in range(4_000):
            row = {"prompt": f"Q{i}", "chosen": "x" * 3000, "rejected": "y" * 3000}
            file.write((",\n" if i and array else "") + json.dumps(row) + ("" if array else "\n"))
        file.write("]" if array else "")
    source = open_preferences(str(path))
    tracemalloc.start()
    count = sum(1 for _ in source)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 4_000
    assert peak < 8_000_000 < path.stat().st_size // 2


FIELDS = (
    "answers chat_template_kwargs chosen completion completions context conversations counterfact "
    "counterfactual dicom_id history id image "
    "images input instruction kind label kto_tag labels messages pid prompt rejected "
    "rejected_images rejected_messages query question rejected_response rejected_responses report "
    "response sid study_id system target tools weight"
)
LEAVES = (st.none() | st.booleans() | st.integers() | st.floats()
          | st.sampled_from(["x", "y", "", " ", "\0", 10**400]))  # fmt: skip
KEYS = st.sampled_from(["role", "content", "type", "text", "from", "value", "rank", "completion",
                        "answer", "bytes", "path", "tool_calls", "function", "name", "messages",
                        "chat_template"])  # fmt: skip
WORDS = st.sampled_from(["user", "assistant", "human", "gpt", "image", "text", "<image>"])
TOKENIZER = tokenizer()
VALUES = st.recursive(
    LEAVES | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)


@given(
    st.dictionaries(st.sampled_from(FIELDS.split()), VALUES, max_size=8),
    st.sampled_from(sorted(PARSERS)),
)
def test_any_row_is_a_preference_or_a_reason(row: dict, kind: str) -> None:
    assert detect_format(row) in (None, *PARSERS)
    try:
        found = PARSERS[kind](row, "/root", "id")
        unread_fields(row, found, kind)
    except RecordError:
        return
    assert all(answer_text(answer).strip() for answer in (found.chosen, *found.rejected))
    with contextlib.suppress(RecordError):  # refused messages
        ids = token_ids(found, TOKENIZER)
        assert len(ids.rejected) == len(found.rejected)
    if found.plain:
        assert isinstance(found.prompt[0]["content"], str)
        return
    placeholders = sum(
        part["type"] == "image"
        for message in found.prompt
        if isinstance(message["content"], list)
        for part in message["content"]
    )
    assert placeholders == len(found.images)


def test_answers_of_several_messages(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "ratio"}]}
    turns = (said("a"), said("why", "user"), said("b"))
    row = {**GOOD, "chosen": [*turns], "rejected": [call], "tools": '[{"name": "ratio"}]'}
    found = one(tmp_path, {**row, "chat_template_kwargs": {"mood": "calm", "none": None}}, "trl")
    assert (found.chosen, found.rejected) == (turns, ((call,),))
    assert found.template == {"tools": [{"name": "ratio"}], "mood": "calm"}
    _, reasons, _ = read(tmp_path, {**GOOD, "chosen": [*turns], "rejected": [*turns]})
    assert reasons == ["chosen-equals-rejected"]
    others = {**GOOD, "chosen": [*turns], "rejected": [said("c"), said("d", "user")]}
    (both,), reasons, _ = read(tmp_path, {**GOOD, "chosen": [*turns]}, others)
    assert (len(both.rejected), reasons) == (2, [])


def test_a_rejected_response_of_several_messages_has_a_prompt_of_its_own(tmp_path: Path) -> None:
    row = {"messages": [USER, said("x")], "rejected_response": [said("y"), said("z")]}
    found = one(tmp_path, row, "ms-swift")
    assert (found.chosen, found.rejected) == ("x", ("z",))
    assert found.rejected_prompts == ((*found.prompt, said("y")),)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": [USER], "completion": [said("x")]}, "trl"),
        ({"prompt": [USER], "chosen": "x", "rejected_responses": []}, "preferences"),
        ({"messages": [USER, said("x")]}, "ms-swift"),
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


def test_a_swift_row_whose_rejected_answer_is_null_has_none(tmp_path: Path) -> None:
    row = {"messages": [USER, said("x")], "rejected_response": "y"}
    _, reasons, _ = read(tmp_path, row, {**row, "rejected_response": None})
    assert reasons == ["no-rejected"]


# --- answers that are marked ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "completion": "x"},
        {"messages": [USER, said("x")]},
        {"instruction": "Q", "output": "x"},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "x"}]},
        {"prompt": [USER], "chosen": "x", "rejected_responses": []},
    ],
)
def test_answers_marked_bad_are_not_learned(tmp_path: Path, row: dict) -> None:
    name = "kto_tag" if {"instruction", "conversations"} & row.keys() else "label"
    marks = [True, False, 1, 0, "good", None, 2, True]
    found, reasons, _ = read(tmp_path, *({**row, "id": n, name: m} for n, m in enumerate(marks)))
    assert [(one.id, one.rejected) for one in found] == [("0", ()), ("2", ()), ("7", ())]
    assert reasons == ["answer-marked-bad"] * 2 + ["unclear-label"] * 3
    good = {**row, "kto_tag": True} if "conversations" in row else row
    _, reasons, _ = read(tmp_path, {**good, "is_correct": False}, good)
    assert reasons == ["answer-marked-bad"]


def test_other_marks_of_bad_answers(tmp_path: Path) -> None:
    turns = [USER, {**said("x"), "loss": False}]
    assert read(tmp_path, {"messages": turns})[1] == ["answer-marked-bad"]
    assert read(tmp_path, {**GOOD, "label": False})[1] == ["unclear-label"]
    assert read(tmp_path, {**GOOD, "label": "Pneumonia"}, {**GOOD, "label": 0})[1] == [
        "duplicate-record"
    ]
    for high, low in (("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating")):
        rows = [{**GOOD, "prompt": [said(f"Q{n}", "user")], high: n, low: 2} for n in (1, 2, 3)]
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


# --- questions and media that must not be lost ----------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Q", "input": "I"}, [said("Q\nI", "user")]),
        ({"instruction": "Q", "input": ""}, [said("Q", "user")]),
        ({"input": "I", "system": None}, [said("I", "user")]),
        ({"system": "S", "question": "Q"}, [said("S", "system"), said("Q", "user")]),
        ({"system": "", "question": "Q"}, [said("Q", "user")]),
        ({"system": "S", "prompt": "Q"}, [said("S", "system"), said("Q", "user")]),
        ({"system": "S", "prompt": [USER]}, [said("S", "system"), USER]),
        ({"system": "S", "prompt": [said("S", "system"), USER]}, [said("S", "system"), USER]),
        (
            {"query": "R", "history": [["Q", "A"]], "system": "S"},
            [said("S", "system"), said("Q", "user"), said("A"), said("R", "user")],
        ),
        ({"question": "Q", "prompt": "the Q"}, [said("the Q", "user")]),
    ],
)
def test_questions_by_other_names(tmp_path: Path, row: dict, prompt: list) -> None:
    (found,), reasons, kind = read(tmp_path, {**row, "chosen": "It is x", "rejected": "It is y"})
    assert [list(found.prompt), found.chosen, found.rejected] == [prompt, "It is x", ("It is y",)]
    assert reasons == [] and kind == ("trl" if "prompt" in row else "alpaca")
    assert found.plain is (row.keys() == {"question", "prompt"})


def test_rows_of_questions_in_all_their_forms(tmp_path: Path) -> None:
    swift = {"query": "<image>Q", "response": "x", "rejected_response": "y", "images": ["a"]}
    found = one(tmp_path, swift, "alpaca")
    assert (found.prompt[0]["content"], found.rejected) == ([IMAGE, text("Q")], ("y",))
    talk = {"chosen": [USER, said("x")], "rejected": [USER, said("y")]}
    for field in ("question", "prompt", "instruction"):  # the same question twice
        assert one(tmp_path, {**talk, field: "What is it?"}, "trl").prompt == (USER,)
    turns = {"prompt": "Q", "chosen": [said("x")], "rejected": [said("y")]}
    assert one(tmp_path, turns, "trl").prompt == (said("Q", "user"),)
    ultrafeedback = {**talk, "prompt": "What is it?", "messages": [USER, said("x")]}
    assert one(tmp_path, ultrafeedback, "trl").rejected == ("y",)
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
def test_text_that_nobody_reads_sets_the_row_aside(tmp_path: Path, row: dict, field: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**row, "chosen": "It is x", "rejected": "It is y"}))
    source = open_preferences(str(path), dataset_format="trl")
    assert list(source) == []
    (record,) = source.rejected
    assert record.reason == "unread-field" and record.detail.startswith(field)
    assert SECRET not in str(source.rejected)


def test_other_fields_are_counted(tmp_path: Path) -> None:
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
        ({"messages": [said("<video>Q", "user"), said("x")], "rejected_response": "y"}, "ms-swift"),
        ({"messages": [USER, said("x")], "rejected_response": "y", "videos": ["a"]}, "ms-swift"),
        ({**GOOD, "audios": ["a.wav"]}, "trl"),
        ({**GOOD, "prompt": [said("<audio>", "user")]}, "trl"),
        ({**GOOD, "prompt": [said("<|video_pad|>Q", "user")]}, "trl"),
        ({**GOOD, "prompt": [{"role": "user", "content": [{"type": "image_url"}]}]}, "trl"),
        ({"instruction": "<video>Q", "chosen": "x", "rejected": "y"}, "alpaca"),
        ({"context": "<audio>Q", "completions": RANKED}, "ranked"),
    ],
)
def test_video_and_audio_set_the_row_aside(tmp_path: Path, row: dict, kind: str) -> None:
    found, reasons, told = read(tmp_path, row)
    assert (found, told) == ([], kind)
    assert reasons == ["unsupported-medium"]


def test_a_repeated_id_with_another_answer_is_mentioned(tmp_path: Path) -> None:
    rows = [
        {**GOOD, "id": "a"},
        {**GOOD, "id": "a", "rejected": [said("z")]},  # the same question and answer
        {**GOOD, "id": "a", "chosen": [said("other")]},
        {**GOOD, "id": "b", "prompt": [said("Q", "user")]},
        {**GOOD, "id": "b"},
        {**GOOD, "prompt": [said("R", "user")]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_preferences(str(path))
    assert len(list(source)) == 5
    assert source.repeated_ids == 2
    assert source.remarks() == ["2 rows with an id repeated for another question or answer"]

"""Preference files: formats detected by fields, bad rows set aside with reasons."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpo_fast.data import open_preferences
from cpo_fast.data.labels import DEFAULT_PROMPT
from cpo_fast.data.preference_rows import PARSERS, detect_format
from cpo_fast.data.preference_values import answer_text
from cpo_fast.data.tokens import token_ids
from cpo_fast.data.unread_fields import unread_fields
from cpo_fast.errors import RecordError
from cpo_fast.testing.samples import tokenizer
from cpo_fast.types import Counterfactual, ImageRef, Preference
from tests.data.preference_samples import CCF, IMAGE, USER, read, read_one, text, turn
from tests.data.samples import SECRET, dicom


def test_trl_conversation_with_an_image(tmp_path: Path) -> None:
    row = {"images": ["a.png"], "prompt": [USER], "chosen": [turn("x")], "rejected": [turn("y")]}
    found = read_one(tmp_path, row, "trl")
    assert found == Preference(
        id="rows:1",
        prompt=({"role": "user", "content": [IMAGE, text("What is it?")]},),
        chosen="x",
        rejected=("y",),
        images=(ImageRef("a.png", str(tmp_path)),),
    )
    single = read_one(tmp_path, {**row, "images": None, "image": "a.png"}, "trl")
    assert single == found


def test_trl_content_in_parts(tmp_path: Path) -> None:
    parts = [text("Look"), IMAGE, text("here")]
    row = {
        "images": ["a.png"],
        "prompt": [turn("Be brief.", "system"), {"role": "user", "content": parts}],
        "chosen": [{"role": "assistant", "content": [text("x"), text("y")]}],
        "rejected": [turn("z")],
    }
    found = read_one(tmp_path, row, "trl")
    assert [message["content"] for message in found.prompt] == ["Be brief.", parts]
    assert found.chosen == "xy"


def test_trl_text_and_implicit_prompts(tmp_path: Path) -> None:
    explicit = read_one(tmp_path, {"prompt": "Q?", "chosen": "x", "rejected": "y"}, "trl")
    assert (explicit.prompt, explicit.chosen) == ((turn("Q?", "user"),), "x")
    talk = {"chosen": [USER, turn("x")], "rejected": [USER, turn("y")]}
    for row in (talk, {**talk, "prompt": "What is it?"}):
        found = read_one(tmp_path, row, "trl")
        assert (found.prompt, found.chosen, found.rejected) == ((USER,), "x", ("y",))
    found = read_one(tmp_path, {"chosen": "It is big", "rejected": "It is small"}, "trl")
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
    with_images = {**strings, "images": ["a"]}  # no placeholder in the text
    for row in (mixed, {**strings, "chosen": [USER, turn("x")], "rejected": [USER, turn("y")]}):
        assert not read(tmp_path, row)[0][0].plain
    assert read(tmp_path, with_images)[0][0].prompt[0]["content"] == [IMAGE, text("Q?")]
    placed = {**with_images, "prompt": "<|image_pad|>Q?"}
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


@pytest.mark.slow  # importing trl is slow
@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, turn("x")], "rejected": [USER, turn("y")]},
        {"prompt": "Q", "chosen": [USER, turn("x")], "rejected": [USER, turn("y")]},
        {"prompt": [USER], "chosen": [turn("x")], "rejected": [turn("y")]},
        {"images": ["a", "b"], "prompt": [USER, turn("Hm."), USER], "chosen": [turn("x")],
         "rejected": [turn("y")]},
        {"images": ["a"], "prompt": [turn("S", "system"), USER], "chosen": [turn("x")],
         "rejected": [turn("y")]},
        {"images": ["a"], "prompt": [{"role": "user", "content": [text("Q"), IMAGE]}],
         "chosen": [turn("x")], "rejected": [turn("y")]},
    ],
)  # fmt: skip
def test_conversation_equals_trl(tmp_path: Path, row: dict) -> None:
    pytest.importorskip("trl")
    from trl.data_utils import maybe_extract_prompt, prepare_multimodal_messages

    theirs = {**row, **maybe_extract_prompt(dict(row))}
    images = row.get("images", [])
    expected = prepare_multimodal_messages(theirs["prompt"], images)
    for message in expected:
        for part in message["content"]:
            part.pop("image", None)
    found = read_one(tmp_path, row, "trl")
    got = [
        m if isinstance(m["content"], list) else {**m, "content": [text(m["content"])]}
        for m in found.prompt
    ]
    assert got == expected
    assert [found.chosen, *found.rejected] == [
        theirs[name][0]["content"] for name in ("chosen", "rejected")
    ]


def test_ms_swift(tmp_path: Path) -> None:
    talk = {"messages": [turn("<image>Q <image>?", "user"), turn("x")], "images": ["a", "b"]}
    found = read_one(tmp_path, {**talk, "rejected_response": "y"}, "ms-swift")
    assert found.prompt[0]["content"] == [IMAGE, text("Q "), IMAGE, text("?")]
    assert (found.chosen, found.rejected) == ("x", ("y",))
    assert read_one(tmp_path, {**talk, "rejected_response": [turn("y")]}, "ms-swift") == found
    other = {**talk, "rejected_messages": [*talk["messages"][:-1], turn("y")]}
    assert read_one(tmp_path, other, "ms-swift") == found


def test_ms_swift_rejected_messages_with_their_own_prompt(tmp_path: Path) -> None:
    row = {
        "system": "Be brief.",
        "messages": [turn("<image>Q", "user"), turn("x")],
        "images": ["a"],
        "rejected_messages": [turn("R", "user"), turn("x")],
        "rejected_images": ["b", "c"],
    }
    found = read_one(tmp_path, row, "ms-swift")
    (own,) = found.rejected_prompts
    assert own is not None
    assert own[0] == found.prompt[0] == turn("Be brief.", "system")
    assert own[1]["content"] == [IMAGE, IMAGE, text("R")]
    assert [ref.path for ref in found.rejected_images[0] or ()] == ["b", "c"]
    assert (found.chosen, found.rejected) == ("x", ("x",))


def test_ms_swift_missing_tags_are_put_first(tmp_path: Path) -> None:
    row = {"messages": [USER, turn("x")], "images": [{"path": "a"}], "rejected_response": "y"}
    assert read_one(tmp_path, row, "ms-swift").prompt[0]["content"] == [IMAGE, text("What is it?")]


def test_ms_swift_rejected_images_alone_are_perception(tmp_path: Path) -> None:
    row = {"messages": [USER, turn("x")], "images": ["a"], "rejected_images": ["b"]}
    found = read_one(tmp_path, row, "ms-swift")
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
    found = read_one(tmp_path, row, "llama-factory")
    assert [message["role"] for message in found.prompt] == ["system", "user", "assistant", "user"]
    assert found.prompt[1]["content"] == [IMAGE, text("Q")]
    assert (found.chosen, found.rejected) == ("x", ("y",))
    found, reasons, _ = read(tmp_path, {**row, "images": []})
    assert (found, reasons) == ([], ["image-placeholder-mismatch"])


def test_ranked_lists(tmp_path: Path) -> None:
    def ranked(*ranks: float) -> list[dict[str, Any]]:
        return [{"rank": r, "completion": [turn(f"{n}")]} for n, r in enumerate(ranks)]

    row = {"context": [USER], "completions": ranked(2, 0, 1, 0)}
    found = read_one(tmp_path, row, "ranked")
    assert (found.prompt, found.chosen, found.rejected) == ((USER,), "1", ("2", "0"))
    nectar = {
        "prompt": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: What is it?\n\nAssistant: ",
        "answers": [{"answer": "y", "rank": 7.0}, {"answer": "x", "rank": 1.0}],
    }
    found = read_one(tmp_path, nectar, "ranked")
    assert [m["content"] for m in found.prompt] == ["Hi", "Yes?", "What is it?"]
    assert (found.chosen, found.rejected) == ("x", ("y",))
    assert read_one(tmp_path, {**nectar, "prompt": "Q"}, "ranked").prompt == (turn("Q", "user"),)
    ties = read(tmp_path, {"context": [USER], "completions": ranked(1, 1)})
    assert ties[1] == ["no-rejected"]


@pytest.mark.parametrize("ids", [{}, {"sid": "10000032", "pid": 50414267}, {"sid": "s50414267"}])
def test_ccf(tmp_path: Path, ids: dict) -> None:
    found = read_one(tmp_path, {**CCF, **ids}, "ccf")
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


def test_counterfactual_rows(tmp_path: Path) -> None:
    rows = [counterfactual("Pneumonia"), counterfactual("Fracture"), counterfactual("Edema", "s2")]
    found, reasons, kind = read(tmp_path, *rows)
    assert (reasons, kind, [p.id for p in found]) == ([], "counterfactuals", ["s1", "s2"])
    assert found[0].chosen.endswith("</think> The disease of this patient is Edema.")
    assert found[0].rejected == (
        "<think> FINDINGS: Pneumonia </think> The disease of this patient is Pneumonia.",
        "<think> FINDINGS: Fracture </think> The disease of this patient is Fracture.",
    )


def test_failed_and_perception_counterfactual_rows(tmp_path: Path) -> None:
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


def test_preference_rows(tmp_path: Path) -> None:
    row = {"id": "s1", "images": ["a"], "prompt": [USER], "chosen": "x",
           "rejected_responses": ["y", "z"], "weight": 2}  # fmt: skip
    found = read_one(tmp_path, row, "preferences")
    assert (found.id, found.rejected, found.weight) == ("s1", ("y", "z"), 2.0)


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
    with contextlib.suppress(RecordError):  # invalid messages
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

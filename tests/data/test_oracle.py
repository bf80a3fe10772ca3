"""Token ids equal those of trl's DPOTrainer for the same rows; its own code is the oracle."""

from __future__ import annotations

import base64
import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cpo_fast.data import open_preferences
from cpo_fast.packing import encode
from cpo_fast.testing.samples import image, images, tokenizer
from tests.model.test_qwen_vocabulary import qwen as rebuilt

pytest.importorskip("trl")

USER = {"role": "user", "content": "What does the heart show?"}
PARTS = {
    "role": "user",
    "content": [{"type": "text", "text": "The heart"}, {"type": "text", "text": " is?"}],
}
SYSTEM = {"role": "system", "content": "Be brief."}


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "ratio", "arguments": {"side": 2}}}],
}
TOOL = {"type": "function", "function": {"name": "ratio", "parameters": {"type": "object"}}}
TEMPLATE = """
{%- if tools %}{{ tools | tojson }}{% endif %}{{ mood }}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if not loop.last and m.role == "assistant" %}({% endif %}{{ m.content or "" }}
{%- if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""Renders tools, options and calls, and a turn differently once another follows."""


TEXT_ROWS: dict[str, dict[str, Any]] = {
    "conversation": {
        "prompt": [SYSTEM, USER],
        "chosen": said("Cardiomegaly."),
        "rejected": said("Lungs are clear."),
    },
    "parts": {"prompt": [PARTS], "chosen": said("Effusion"), "rejected": said("Edema ")},
    "turns": {
        "prompt": [USER, *said("Which?"), USER],
        "chosen": said(" a"),
        "rejected": said("b "),
    },
    "new-line-first": {"prompt": [USER], "chosen": said("\n\nEdema"), "rejected": said("\nNone")},
    "implicit": {"chosen": [USER, *said("Enlarged.")], "rejected": [USER, *said("Clear.")]},
    "implicit-longer": {
        "chosen": [USER, *said("Enlarged.")],
        "rejected": [USER, *said("Enlarged."), USER, *said("Clear.")],
    },
    "several-messages": {
        "prompt": [SYSTEM, USER],
        "chosen": [*said("Which view?"), USER, *said("Cardiomegaly.")],
        "rejected": [*said(" Clear."), USER],
    },
    "implicit-turns": {
        "chosen": [USER, *said("Which?"), USER, *said("Edema."), USER, *said("Large.")],
        "rejected": [USER, *said("Which?"), USER, *said("Clear."), USER, *said("Small.")],
    },
    "goes-on": {"prompt": [USER, *said("The")], "chosen": said("heart"), "rejected": said("lung")},
    "tools": {
        "prompt": [USER],
        "chosen": [CALL, {"role": "tool", "content": "0.6"}, *said("Enlarged.")],
        "rejected": [CALL],
        "tools": json.dumps([TOOL]),
        "chat_template_kwargs": {"mood": "calm"},
    },
    "strings": {"prompt": "The heart is", "chosen": " enlarged.", "rejected": " small."},
    "strings-longer": {"chosen": "The heart", "rejected": "The heart is"},
    "strings-implicit": {"chosen": "The heart is enlarged.", "rejected": "The heart is clear."},
    "strings-with-end": {"prompt": "Q: ", "chosen": "A.<|im_end|>", "rejected": "B."},
    "strings-that-merge": {"prompt": "The heart is enlar", "chosen": "ged.", "rejected": "ge"},
}


def theirs(row: dict[str, Any], words: Any) -> tuple[list[int], list[int], list[int]]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir="unused", max_length=None, use_cpu=True, bf16=False, report_to="none"
    )
    made = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=words),
        Dataset.from_list([row]),
        words,
        config,
        "train",
    )[0]
    return made["prompt_ids"], made["chosen_ids"], made["rejected_ids"]


def ours(folder: Path, row: dict[str, Any], words: Any) -> tuple[list[int], list[int], list[int]]:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row))
    source = open_preferences(str(path), dataset_format="trl")
    found = list(source)
    assert source.rejected == []
    group = encode(found[0], words, images().grid, max_length=5000)
    return list(group.prompt.input_ids), list(group.chosen), list(group.rejected[0])


@pytest.mark.slow  # importing trl is
@pytest.mark.parametrize("name", TEXT_ROWS)
def test_text(tmp_path: Path, name: str) -> None:
    row = TEXT_ROWS[name]
    prompt, chosen, rejected = ours(tmp_path, row, tokenizer())
    assert (prompt, chosen, rejected) == theirs(row, tokenizer())
    if name == "strings-that-merge":
        assert prompt != tokenizer()(row["prompt"])["input_ids"]  # otherwise the case is trivial


@pytest.mark.slow
def test_a_template_that_shows_tools_and_rewrites_earlier_turns(tmp_path: Path) -> None:
    words = copy.deepcopy(tokenizer())
    words.chat_template = TEMPLATE
    for name in ("tools", "several-messages", "goes-on", "turns"):
        row = TEXT_ROWS[name]
        assert ours(tmp_path, row, words) == theirs(row, words), name
    _, chosen, _ = ours(tmp_path, TEXT_ROWS["tools"], words)
    assert "ratio" in words.decode(chosen)


qwen = rebuilt  # a fixture
IMAGE = {"type": "image"}
SEEN = "<|vision_start|><|image_pad|><|vision_end|>"
IMAGE_ROWS: dict[str, dict[str, Any]] = {
    "conversation": {
        "prompt": [SYSTEM, USER],
        "chosen": said("Cardiomegaly."),
        "rejected": said("Clear."),
    },
    "placed": {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "The heart"}, IMAGE]}],
        "chosen": said("\nEdema"),
        "rejected": said("Clear."),
    },
    "several-messages": {
        "prompt": [USER],
        "chosen": [*said("Which view?"), USER, *said("Cardiomegaly.")],
        "rejected": [*said("Clear."), USER],
    },
    "goes-on": {"prompt": [USER, *said("The")], "chosen": said("heart"), "rejected": said("lung")},
    "strings": {"prompt": f"{SEEN}The heart is", "chosen": " enlarged.", "rejected": " clear."},
}


def compare_images(folder: Path, row: dict[str, Any], words: Any, *, seen: bool = True) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    from cpo_fast.data.images import load_image
    from cpo_fast.testing.trl_oracle import processor

    picture = image(100, 80)
    collator = DataCollatorForVisionPreference(processor=processor(words, images()))
    batch = collator([{**row, "images": [load_image(picture)] if seen else []}])
    data = base64.b64encode(picture.data or b"").decode()
    given = {**row, "images": [{"bytes": data, "path": None}] if seen else []}
    prompt, chosen, rejected = ours(folder, given, words)
    for place, answer in enumerate((chosen, rejected)):
        kept = batch["attention_mask"][place].bool()
        scored = batch["completion_mask"][place].bool()
        assert batch["input_ids"][place][kept & ~scored].tolist() == prompt
        assert batch["input_ids"][place][kept & scored].tolist() == answer


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGE_ROWS)
def test_images(tmp_path: Path, name: str) -> None:
    compare_images(tmp_path, IMAGE_ROWS[name], tokenizer())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conversation", "goes-on", "new-line-first", "strings"])
def test_a_row_without_images_in_a_file_that_has_some(tmp_path: Path, qwen: Any, name: str) -> None:
    compare_images(tmp_path, TEXT_ROWS[name], qwen, seen=False)


@pytest.mark.slow
def test_all_of_them_with_the_vocabulary_of_qwen(tmp_path: Path, qwen: Any) -> None:
    for row in TEXT_ROWS.values():
        assert ours(tmp_path, row, qwen) == theirs(row, qwen)
    for row in IMAGE_ROWS.values():
        compare_images(tmp_path, row, qwen)

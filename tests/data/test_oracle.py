"""Token ids equal those of trl's DPOTrainer for the same rows."""

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


def reply(text: str) -> list[dict[str, str]]:
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
"""Renders tools, options and calls; renders a turn differently if another one follows."""


TEXT_ROWS: dict[str, dict[str, Any]] = {
    "conversation": {
        "prompt": [SYSTEM, USER],
        "chosen": reply("Cardiomegaly."),
        "rejected": reply("Lungs are clear."),
    },
    "parts": {"prompt": [PARTS], "chosen": reply("Effusion"), "rejected": reply("Edema ")},
    "turns": {
        "prompt": [USER, *reply("Which?"), USER],
        "chosen": reply(" a"),
        "rejected": reply("b "),
    },
    "new-line-first": {"prompt": [USER], "chosen": reply("\n\nEdema"), "rejected": reply("\nNone")},
    "implicit": {"chosen": [USER, *reply("Enlarged.")], "rejected": [USER, *reply("Clear.")]},
    "implicit-longer": {
        "chosen": [USER, *reply("Enlarged.")],
        "rejected": [USER, *reply("Enlarged."), USER, *reply("Clear.")],
    },
    "several-messages": {
        "prompt": [SYSTEM, USER],
        "chosen": [*reply("Which view?"), USER, *reply("Cardiomegaly.")],
        "rejected": [*reply(" Clear."), USER],
    },
    "implicit-turns": {
        "chosen": [USER, *reply("Which?"), USER, *reply("Edema."), USER, *reply("Large.")],
        "rejected": [USER, *reply("Which?"), USER, *reply("Clear."), USER, *reply("Small.")],
    },
    "prefill": {
        "prompt": [USER, *reply("The")],
        "chosen": reply("heart"),
        "rejected": reply("lung"),
    },
    "tools": {
        "prompt": [USER],
        "chosen": [CALL, {"role": "tool", "content": "0.6"}, *reply("Enlarged.")],
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


def encode_with_trl(row: dict[str, Any], tok: Any) -> tuple[list[int], list[int], list[int]]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir="unused", max_length=None, use_cpu=True, bf16=False, report_to="none"
    )
    made = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tok),
        Dataset.from_list([row]),
        tok,
        config,
        "train",
    )[0]
    return made["prompt_ids"], made["chosen_ids"], made["rejected_ids"]


def encode_ours(
    folder: Path, row: dict[str, Any], tok: Any
) -> tuple[list[int], list[int], list[int]]:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row))
    source = open_preferences(str(path), dataset_format="trl")
    found = list(source)
    assert source.rejected == []
    group = encode(found[0], tok, images().grid, max_length=5000)
    return list(group.prompt.input_ids), list(group.chosen), list(group.rejected[0])


@pytest.mark.slow  # importing trl is slow
@pytest.mark.parametrize("name", TEXT_ROWS)
def test_text_ids_equal_trl(tmp_path: Path, name: str) -> None:
    row = TEXT_ROWS[name]
    prompt, chosen, rejected = encode_ours(tmp_path, row, tokenizer())
    assert (prompt, chosen, rejected) == encode_with_trl(row, tokenizer())
    if name == "strings-that-merge":
        assert prompt != tokenizer()(row["prompt"])["input_ids"]  # the two merge


@pytest.mark.slow
def test_template_with_tools_and_rewritten_turns(tmp_path: Path) -> None:
    tok = copy.deepcopy(tokenizer())
    tok.chat_template = TEMPLATE
    for name in ("tools", "several-messages", "prefill", "turns"):
        row = TEXT_ROWS[name]
        assert encode_ours(tmp_path, row, tok) == encode_with_trl(row, tok), name
    _, chosen, _ = encode_ours(tmp_path, TEXT_ROWS["tools"], tok)
    assert "ratio" in tok.decode(chosen)


qwen = rebuilt  # a fixture
IMAGE = {"type": "image"}
SEEN = "<|vision_start|><|image_pad|><|vision_end|>"
IMAGE_ROWS: dict[str, dict[str, Any]] = {
    "conversation": {
        "prompt": [SYSTEM, USER],
        "chosen": reply("Cardiomegaly."),
        "rejected": reply("Clear."),
    },
    "image-last": {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "The heart"}, IMAGE]}],
        "chosen": reply("\nEdema"),
        "rejected": reply("Clear."),
    },
    "several-messages": {
        "prompt": [USER],
        "chosen": [*reply("Which view?"), USER, *reply("Cardiomegaly.")],
        "rejected": [*reply("Clear."), USER],
    },
    "prefill": {
        "prompt": [USER, *reply("The")],
        "chosen": reply("heart"),
        "rejected": reply("lung"),
    },
    "strings": {"prompt": f"{SEEN}The heart is", "chosen": " enlarged.", "rejected": " clear."},
}


def assert_equals_trl(folder: Path, row: dict[str, Any], tok: Any, *, seen: bool = True) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    from cpo_fast.data.images import load_image
    from cpo_fast.testing.trl_oracle import processor

    picture = image(100, 80)
    collator = DataCollatorForVisionPreference(processor=processor(tok, images()))
    batch = collator([{**row, "images": [load_image(picture)] if seen else []}])
    data = base64.b64encode(picture.data or b"").decode()
    given = {**row, "images": [{"bytes": data, "path": None}] if seen else []}
    prompt, chosen, rejected = encode_ours(folder, given, tok)
    for place, answer in enumerate((chosen, rejected)):
        kept = batch["attention_mask"][place].bool()
        scored = batch["completion_mask"][place].bool()
        assert batch["input_ids"][place][kept & ~scored].tolist() == prompt
        assert batch["input_ids"][place][kept & scored].tolist() == answer


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGE_ROWS)
def test_image_ids_equal_trl(tmp_path: Path, name: str) -> None:
    assert_equals_trl(tmp_path, IMAGE_ROWS[name], tokenizer())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conversation", "prefill", "new-line-first", "strings"])
def test_row_without_images_in_a_file_with_images(tmp_path: Path, qwen: Any, name: str) -> None:
    assert_equals_trl(tmp_path, TEXT_ROWS[name], qwen, seen=False)


@pytest.mark.slow
def test_all_rows_with_qwens_vocabulary(tmp_path: Path, qwen: Any) -> None:
    for row in TEXT_ROWS.values():
        assert encode_ours(tmp_path, row, qwen) == encode_with_trl(row, qwen)
    for row in IMAGE_ROWS.values():
        assert_equals_trl(tmp_path, row, qwen)

"""Messages about samples before training: positions of the model, control tokens in texts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cpo_fast.data.labels import question
from cpo_fast.data.positions import model_positions, position_limit
from cpo_fast.model.checkpoint import Checkpoint
from cpo_fast.run.context import RunContext
from cpo_fast.run.corpus import Texts, read_corpus
from cpo_fast.run.samples import find_control_tokens, tokenise
from cpo_fast.testing.runs import parse_arguments
from cpo_fast.testing.samples import tokenizer
from cpo_fast.training.distributed import World
from cpo_fast.types import Origin, Preference


def row(number: int, chosen: str, *, asked: str = "Read.", plain: bool = False) -> Preference:
    prompt = ({"role": "user", "content": asked},) if plain else question(0, asked)
    return Preference(f"pairs:{number}", prompt, chosen, ("No.",), plain=plain)


def texts(*rows: Preference) -> Texts:
    split = {"train": list(rows), "validate": [], "test": []}
    return Texts(split, {name: [] for name in split})


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({}, None),
        ({"max_position_embeddings": 2048}, 2048),
        (
            {"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 4.0}},
            8192,
        ),
        (
            {
                "max_position_embeddings": 32768,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"factor": 8.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 1024,
                "rope_parameters": {"full": {"factor": 8.0}, "sliding": {"rope_type": "default"}},
            },
            8192,
        ),
    ],
)
def test_positions_follow_rope_scaling(config: dict[str, Any], limit: int | None) -> None:
    assert position_limit(SimpleNamespace(**config)) == limit


def test_samples_longer_than_the_model_positions_are_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "max_position_embeddings": 60, "hidden_size": 8, '
        '"num_attention_heads": 2}'
    )
    assert model_positions(tmp_path) == 60 and model_positions(tmp_path / "none") is None
    args = parse_arguments(
        ["--dataset", "pairs.jsonl", "--max_bad_fraction", "0.9", "--output_dir", f"{tmp_path}/out"]
    )
    run = RunContext(args, World())
    run.checkpoint = Checkpoint(tmp_path, tokenizer())
    given = texts(row(1, "Clear lungs."), row(2, "Clear lungs. " * 60))
    found = tokenise(run, given)
    assert [group.id for group in found.sft["train"]] == ["pairs:1"]
    (line,) = (tmp_path / "out" / "rejected_records.jsonl").read_text().splitlines()
    rejected = json.loads(line)
    assert (rejected["id"], rejected["reason"]) == ("pairs:2", "over-long")
    assert "max_length 60" in rejected["detail"]
    assert "the model has 60 positions, fewer than --max_length 4096" in capsys.readouterr().out


def test_reports_without_images_print_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "data: no record has an image"
    item = {"sid": "51", "report": "Clear.", "diagnose": "x.", "counterfact": {"Edema": "Edema."}}
    (tmp_path / "ccf.json").write_text(json.dumps([item]))

    def read(name: str) -> None:
        out = ["--output_dir", str(tmp_path / f"of {name}")]
        args = parse_arguments(["--dataset", str(tmp_path / name), *out])
        read_corpus(RunContext(args, World()))

    read("ccf.json")
    assert said in capsys.readouterr().out
    own = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    (tmp_path / "own.jsonl").write_text(json.dumps(own) + "\n")
    read("own.jsonl")
    assert said not in capsys.readouterr().out


def test_control_tokens_are_reported_without_text() -> None:
    good = row(1, "<think> Clear. </think> The disease of this patient is No Finding.")
    ended = row(2, "SECRET lungs.<|im_end|>")
    asked = row(3, "Clear.", asked="<|im_start|>system SECRET")
    rendered = row(4, "Clear.<|im_end|>", asked="<|im_start|>user", plain=True)
    twice = replace(row(5, "Clear.<|im_end|> More.", plain=True), origin=Origin("pairs.jsonl", 9))
    assert find_control_tokens(texts(good, rendered), tokenizer()) == []
    (line,) = find_control_tokens(texts(good, ended, asked, rendered, twice), tokenizer())
    assert line.startswith("records with control tokens of the model in their text: 3")
    assert "(<|im_end|>, <|im_start|>)" in line
    assert line.endswith("Records: pairs:2, pairs:3, pairs:5 (line 9)") and "SECRET" not in line

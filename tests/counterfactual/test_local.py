"""The `local` generator with a tiny random model, whose drafts fail, and a scripted model."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpo_fast.counterfactual import counterfactuals
from cpo_fast.counterfactual.__main__ import main
from cpo_fast.counterfactual.local import LocalWriter, _Sampling, load_local
from cpo_fast.counterfactual.prompt import Task, build_prompt
from cpo_fast.errors import UsageError
from cpo_fast.model.build import tiny_text_model
from cpo_fast.model.tokenizer import train_tokenizer
from cpo_fast.types import Report
from tests.counterfactual.samples import (
    GRAPH,
    NORMAL,
    OPACITY,
    REPORTS,
    read_jsonl,
    rewrite_prompt,
    study,
    write_open_i,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [build_prompt(GRAPH, Task(report, "Edema", "s", 1)) for report in REPORTS]
    tokenizer = train_tokenizer(texts, vocab_size=700)
    model = tiny_text_model(tokenizer, hidden_size=32, num_hidden_layers=1, intermediate_size=32)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def run(folder: Path, dataset: Path, output: Path, *more: str) -> int:
    flags = ["--generator", "local", "--model", str(folder), "--max_new_tokens", "12"]
    return main(["--dataset", str(dataset), "--output", str(output), *flags, *more])


def test_random_drafts_are_set_aside_with_a_reason(folder: Path, tmp_path: Path) -> None:
    dataset = write_open_i(tmp_path / "reports", REPORTS)
    main(["--dataset", str(dataset), "--output", str(tmp_path / "graph.jsonl")])
    assert run(folder, dataset, tmp_path / "cf.jsonl", "--batch_size", "4") == 1
    assert read_jsonl(tmp_path / "cf.jsonl") == []
    rejected = read_jsonl(tmp_path / "cf.jsonl.rejected.jsonl")
    assert [r["id"] for r in rejected] == [r["id"] for r in read_jsonl(tmp_path / "graph.jsonl")]
    assert {row["generator"] for row in rejected} == {"local"}
    assert {row["reason"] for row in rejected} <= {"answer-cut-short", "answer-sections"}


def test_record_does_not_depend_on_its_batch(folder: Path) -> None:
    tasks = [Task(report, "Edema", f"s{n}", 42, attempt=1) for n, report in enumerate(REPORTS[:4])]
    prompts = [build_prompt(GRAPH, task) for task in tasks]

    def generate(size: int, temperature: float) -> list[list[int]]:
        writer = load_local(folder, batch_size=size, max_new_tokens=10, temperature=temperature)
        ids = [writer._encode(prompt) for prompt in prompts]
        out: list[list[int]] = []
        for start in range(0, len(tasks), size):
            some = slice(start, start + size)
            out += writer._generate(ids[some], tasks[some])
        return out

    together = generate(4, 1.5)
    assert together == generate(1, 1.5)
    assert len({tuple(row) for row in together}) == 4


def test_samples_follow_the_softmax() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -30.0]]).repeat(2000, 1)
    tasks = [Task(NORMAL, "Edema", f"s{n}", 1) for n in range(2000)]
    drawn = _Sampling(tasks, 0.8)(torch.empty(0), scores.clone()).argmax(1)
    shares = torch.bincount(drawn, minlength=4) / 2000
    assert torch.allclose(shares, torch.softmax(scores[0] / 0.8, 0), atol=0.04)
    greedy = _Sampling(tasks, 0.0)(torch.empty(0), scores.clone())
    assert torch.equal(greedy, scores)


class ScriptedModel:
    """A model whose `generate` answers each prompt with `script(prompt)`."""

    def __init__(self, tokenizer: Any, script: Any) -> None:
        self.tokenizer, self.script = tokenizer, script
        self.config = SimpleNamespace(max_position_embeddings=8192)
        self.generation_config = SimpleNamespace(eos_token_id=None)
        self.device = torch.device("cpu")
        self.batches: list[int] = []
        self.killed_at = 1000
        self.prompts: list[str] = []

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        self.batches.append(len(input_ids))
        if len(self.batches) == self.killed_at:
            raise KeyboardInterrupt
        new = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompt = self.tokenizer.decode(ids[mask.bool()])
            self.prompts.append(prompt)
            answer = self.tokenizer(self.script(prompt))["input_ids"]
            new.append([*answer, self.tokenizer.eos_token_id])
        width = max(map(len, new))
        pad = self.tokenizer.pad_token_id
        tail = torch.tensor([row + [pad] * (width - len(row)) for row in new])
        return torch.cat([input_ids, tail], dim=1)


def test_good_answers_pass_in_order_and_batches(folder: Path) -> None:
    tokenizer = load_local(folder)._tokenizer
    model = ScriptedModel(tokenizer, lambda prompt: rewrite_prompt(prompt).text)
    writer = LocalWriter(model, tokenizer, batch_size=3)
    studies = [study(r, n) for n, r in enumerate([NORMAL, OPACITY] * 4)]
    made = list(counterfactuals(studies, GRAPH, generator=writer))
    plain = list(counterfactuals(studies, GRAPH))
    assert [cf.id for cf in made] == [cf.id for cf in plain]
    assert all(cf.passed and cf.generator == "local" for cf in made)
    assert max(model.batches) == 3 and len(model.batches) <= 7


def test_bad_answer_is_retried_without_delaying_others(folder: Path) -> None:
    tokenizer = load_local(folder)._tokenizer

    def script(prompt: str) -> str:
        if "earlier try" in prompt:
            return rewrite_prompt(prompt).text
        return prompt.split("<report>\n")[1]

    model = ScriptedModel(tokenizer, script)
    studies = [study(NORMAL, n) for n in range(5)]
    writer = LocalWriter(model, tokenizer, batch_size=2)
    made = list(counterfactuals(studies, GRAPH, num_targets=1, generator=writer))
    assert [cf.study_id for cf in made] == [s.study_id for s in studies]
    assert all(cf.passed for cf in made)
    assert sum(model.batches) == 10 and len(model.batches) <= 6


@pytest.fixture
def failing_first(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(command, ids of the records). `command` runs the generator with a model that never rewrites
    the first record; `killed_at`: the batch at which it raises KeyboardInterrupt."""
    dataset = write_open_i(tmp_path / "reports", REPORTS[:5])
    main(["--dataset", str(dataset), "--output", str(tmp_path / "graph.jsonl")])
    first = read_jsonl(tmp_path / "graph.jsonl")[0]
    tokenizer = load_local(folder)._tokenizer

    def script(prompt: str) -> str:
        bad = first["report"] in prompt and f"also had {first['target']}." in prompt
        return "no report" if bad else rewrite_prompt(prompt).text

    def command(output: Path, *more: str, killed_at: int = 1000) -> ScriptedModel:
        model = ScriptedModel(tokenizer, script)
        model.killed_at = killed_at
        monkeypatch.setattr(
            "cpo_fast.counterfactual.__main__.load_local",
            lambda _, **options: LocalWriter(model, tokenizer, **options),
        )
        flags = ("--batch_size", "3", "--max_new_tokens", "1024", *more)
        if killed_at == 1000:
            assert run(folder, dataset, output, *flags) == 0
        else:
            with pytest.raises(KeyboardInterrupt):
                run(folder, dataset, output, *flags)
        return model

    return command, [row["id"] for row in read_jsonl(tmp_path / "graph.jsonl")]


def test_decided_records_are_written_and_survive_a_kill(failing_first: Any, tmp_path: Path) -> None:
    command, ids = failing_first
    output, rejected = tmp_path / "cf.jsonl", tmp_path / "cf.jsonl.rejected.jsonl"
    command(output, killed_at=3)
    assert [row["id"] for row in read_jsonl(output)] == ids[1:5]  # the first is still open
    rest = command(output)
    assert [row["id"] for row in read_jsonl(rejected)] == ids[:1]
    assert sorted(row["id"] for row in read_jsonl(output)) == sorted(ids[1:])
    assert len(rest.prompts) == 4 + len(ids[5:])
    assert command(output).batches == []


@pytest.mark.parametrize("form", ["trl", "ccf"])
def test_study_formats_write_whole_studies(form: str, failing_first: Any, tmp_path: Path) -> None:
    command, ids = failing_first
    command(tmp_path / "cut", "--format", form, killed_at=3)
    text = (tmp_path / "cut").read_text()
    if form == "trl":
        assert [row["id"] for row in read_jsonl(tmp_path / "cut")] == ids[2:4]  # study 0 is open
    else:
        (item,) = json.loads(text + "]")
        assert [f"{item['sid']}/{target}" for target in item["counterfact"]] == ids[2:4]
    command(tmp_path / "whole", "--format", form)
    whole = (tmp_path / "whole").read_text()
    assert whole.startswith(text)
    if form == "trl":
        found = [row["id"].split("/")[0] for row in read_jsonl(tmp_path / "whole")]
        assert all(a == b or a not in found[n + 1 :] for n, (a, b) in enumerate(pairwise(found)))
        assert len(found) == len(ids) - 1


def test_progress_counts_drafts_and_tokens_of_a_batch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("cpo_fast.counterfactual.progress.EVERY_SECONDS", 0.0)
    dataset = write_open_i(tmp_path / "reports", REPORTS[:2])
    run(folder, dataset, tmp_path / "cf.jsonl", "--batch_size", "4")
    printed = capsys.readouterr().err
    assert "0 drafts, 0 passed, 0 set aside, 4 open, 2 studies, token 1 of at most 12" in printed
    assert "16 drafts, 0 passed, 4 set aside, 0 open, 2 studies" in printed
    assert not any(report.findings in printed for report in REPORTS[:2])


def test_prompt_beyond_the_context_is_set_aside_without_a_call(folder: Path) -> None:
    tokenizer = load_local(folder)._tokenizer
    model = ScriptedModel(tokenizer, lambda prompt: "")
    model.config.max_position_embeddings = 1100
    writer = LocalWriter(model, tokenizer)
    long = Report("The heart is large. " * 400, "Cardiomegaly.")
    made = list(counterfactuals([study(long)], GRAPH, num_targets=1, generator=writer))
    assert [cf.checks for cf in made] == [{"prompt-too-long": False}]
    assert writer.faults == {"prompt-too-long": 1}
    assert model.batches == []


def test_prompt_has_report_neighbourhood_and_target() -> None:
    task = Task(OPACITY, "Atelectasis", "s", 1, failed=("survivors",))
    prompt = build_prompt(GRAPH, task)
    assert OPACITY.text in prompt and "also had Atelectasis" in prompt
    for key in GRAPH.diseases["Atelectasis"].associations:
        assert GRAPH.attributes[key].name in prompt
    assert "hyperinflation" in prompt and "Emphysema" in prompt
    assert "Keep these findings of the patient: Lung Opacity." in prompt
    assert "a finding that had to stay was gone" in prompt


@pytest.mark.parametrize("kind", ["missing", "empty", "pickle", "no model"])
def test_folder_without_a_model_is_named(kind: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / kind
    if kind != "missing":
        path.mkdir()
    if kind == "pickle":
        for file in folder.iterdir():
            if file.suffix != ".safetensors":
                (path / file.name).write_bytes(file.read_bytes())
        torch.save({}, path / "pytorch_model.bin")
    if kind == "no model":
        (path / "config.json").write_text('{"model_type": "no such thing"}')
    with pytest.raises(UsageError, match="--model"):
        load_local(path)

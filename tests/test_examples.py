"""Every example runs on a tiny model and equals plain transformers and PyTorch."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from cpo_fast.model.build import save_model
from cpo_fast.testing.samples import text_model, tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
WORDS = ["clear lungs", "a small effusion", "an enlarged heart", "basal atelectasis"]
PAIRS = [
    {
        "prompt": f"Report of patient {i}? ",
        "chosen": f"There are {WORDS[i % 4]} and {WORDS[(i * 7 + 1) % 4]}.",
        "rejected": f"There is {WORDS[(i + 1) % 4]}, line {i * 3}.",
    }
    for i in range(6)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with files of pairs and prompts."""
    place = tmp_path_factory.mktemp("examples")
    save_model(text_model(), place / "model", tokenizer=tokenizer())
    pairs = "".join(json.dumps(row) + "\n" for row in PAIRS)
    (place / "pairs.jsonl").write_text(pairs, encoding="utf-8")
    prompts = [{"prompt": row["prompt"], "findings": ["e", "effusion"]} for row in PAIRS[:2]]
    lines = "".join(json.dumps(row) + "\n" for row in prompts)
    (place / "prompts.jsonl").write_text(lines, encoding="utf-8")
    return place


def parse_losses(output: str) -> list[float]:
    return [float(number) for number in re.findall(r"loss (-?[\d.]+)", output)]


def run_example(capsys: Any, monkeypatch: Any, name: str, *arguments: object) -> list[float]:
    """The losses that an example prints."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return parse_losses(capsys.readouterr().out)


def load_float32(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def sum_logps(model: Any, prompt: str, answer: str, bos: list[int]) -> torch.Tensor:
    """The log-prob of an answer from the logits of the model."""
    head = bos + tokenizer()(prompt)["input_ids"]
    tail = [*tokenizer()(answer)["input_ids"], tokenizer().eos_token_id]
    logps = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
    return sum(logps[len(head) - 1 + i, token] for i, token in enumerate(tail))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def plain_run(folder: Path) -> tuple[list[float], Any]:
    return train_plainly(folder, [])


def train_plainly(folder: Path, bos: list[int]) -> tuple[list[float], Any]:
    """Three steps of two pairs: losses and trained model; sequences start with `bos`."""
    model, reference = load_float32(folder / "model"), load_float32(folder / "model")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for start in (0, 2, 4):
        margins = []
        for row in PAIRS[start : start + 2]:
            ours, theirs = (
                sum_logps(m, row["prompt"], row["chosen"], bos)
                - sum_logps(m, row["prompt"], row["rejected"], bos)
                for m in (model, reference)
            )
            margins.append(ours - theirs.detach())
        loss = -F.logsigmoid(0.1 * torch.stack(margins)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


def test_plain_loop_equals_logits(
    folder: Path, plain_run: Any, capsys: Any, monkeypatch: Any
) -> None:
    assert len((EXAMPLES / "plain_loop.py").read_text().splitlines()) <= 45
    arguments = (folder / "model", folder / "pairs.jsonl")
    losses = run_example(capsys, monkeypatch, "plain_loop.py", *arguments)
    assert losses == pytest.approx(plain_run[0], abs=2e-5)
    assert losses[-1] < losses[0] - 0.01


@pytest.fixture(scope="module")
def framing(folder: Path) -> tuple[Path, list[int]]:
    """(model folder, ids of BOS); the tokenizer adds BOS and EOS and has no padding token."""
    place = folder / "framing"
    save_model(text_model(), place, tokenizer=tokenizer())
    made = AutoTokenizer.from_pretrained(place)
    made.pad_token, made.bos_token = None, "<|im_start|>"
    marks = [(made.bos_token, made.bos_token_id), (made.eos_token, made.eos_token_id)]
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{made.bos_token} $A {made.eos_token}", special_tokens=marks
    )
    made.save_pretrained(place)
    loaded = AutoTokenizer.from_pretrained(place)
    assert loaded("a")["input_ids"][::2] == [made.bos_token_id, made.eos_token_id]
    assert loaded.pad_token is None
    return place, [made.bos_token_id]


def test_plain_loop_puts_no_bos_into_answers(
    framing: Any, folder: Path, capsys: Any, monkeypatch: Any
) -> None:
    place, bos = framing
    losses = run_example(capsys, monkeypatch, "plain_loop.py", place, folder / "pairs.jsonl")
    assert losses == pytest.approx(train_plainly(folder, bos)[0], abs=2e-5)


@pytest.mark.parametrize("adds_marks", [False, True], ids=["plain", "bos-and-eos"])
def test_fsdp2_puts_no_bos_into_answers(framing: Any, folder: Path, adds_marks: bool) -> None:
    place, bos = framing
    made = AutoTokenizer.from_pretrained(place if adds_marks else folder / "model")
    made.pad_token = made.eos_token
    encode = runpy.run_path(str(EXAMPLES / "fsdp2.py"))["encode"]
    ids, mask, labels = encode(made, PAIRS[:2])
    sides = [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in PAIRS[:2]]
    for row, (prompt, answer) in enumerate(sides):
        head = (bos if adds_marks else []) + tokenizer()(prompt)["input_ids"]
        tail = [*tokenizer()(answer)["input_ids"], tokenizer().eos_token_id]
        assert ids[row][mask[row] == 1].tolist() == head + tail
        assert labels[row][labels[row] != -100].tolist() == tail
        assert labels[row][len(head) :][: len(tail)].tolist() == tail


def test_grpo_weighs_answer_tokens_only(framing: Any) -> None:
    grpo = runpy.run_path(str(EXAMPLES / "grpo.py"))
    answer = tokenizer()(" effusion")["input_ids"]
    rollout = SimpleNamespace(
        labels=torch.zeros(5 + len(answer)),
        rows=torch.zeros(5 + len(answer), dtype=torch.long),
        texts=["a </think> effusion"],
    )
    weights = grpo["token_weights"](rollout, AutoTokenizer.from_pretrained(framing[0]), 2.0)
    assert weights.tolist() == [1.0] * 4 + [2.0] * (len(answer) + 1)  # with the end-of-text token


def run_refused(capsys: Any, monkeypatch: Any, name: str, *arguments: object) -> str:
    """The last line of stderr of an example that ends with status 2."""
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as ended:
        run_example(capsys, monkeypatch, name, *arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_examples_without_arguments_print_usage(name: str, capsys: Any, monkeypatch: Any) -> None:
    line = run_refused(capsys, monkeypatch, name)
    usage = (f"usage: python examples/{name} MODEL", f"{name}: error: the following")
    assert line.startswith(usage)


def test_examples_report_wrong_arguments(
    folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    model, pairs = folder / "model", folder / "pairs.jsonl"
    line = run_refused(capsys, monkeypatch, "grpo.py", model, pairs)
    assert line.endswith("every line needs prompt and findings (a list of names)")
    line = run_refused(capsys, monkeypatch, "grpo.py", model, tmp_path / "none")
    assert "none is not a file of JSON lines" in line
    prompts = folder / "prompts.jsonl"
    line = run_refused(capsys, monkeypatch, "fsdp2.py", model, prompts, tmp_path)
    assert line.endswith("every line needs prompt, chosen and rejected")
    line = run_refused(capsys, monkeypatch, "fsdp2.py", model, pairs, tmp_path)
    assert "torchrun --nproc_per_node 2 examples/fsdp2.py" in line


@pytest.mark.complete
@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_fsdp2_in_two_processes(folder: Path, plain_run: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", str(EXAMPLES / "fsdp2.py"), str(folder / "model"),
               str(folder / "pairs.jsonl"), str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    losses, model = plain_run
    assert parse_losses(done.stdout) == pytest.approx(losses, abs=2e-5)
    saved = load_float32(tmp_path / "out").state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=2e-4, msg=name)


@pytest.mark.slow
def test_trl_example_runs(folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """The example runs and saves; tests/integrations/test_trl.py compares it with trl."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run_example(
        capsys, monkeypatch, "trl_dpo.py", folder / "model", folder / "pairs.jsonl", tmp_path
    )
    (state,) = tmp_path.glob("checkpoint-5/trainer_state.json")
    rows = [row for row in json.loads(state.read_text())["log_history"] if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and len(rows) == 5
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_grpo_runs(folder: Path, capsys: Any, monkeypatch: Any) -> None:
    arguments = (folder / "model", folder / "prompts.jsonl", "--max_new_tokens", "12")
    losses = run_example(capsys, monkeypatch, "grpo.py", *arguments)
    assert len(losses) == 2 and losses[0] != losses[1]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_grpo_loss_and_gradient_equal_full_logits(folder: Path, temperature: float) -> None:
    grpo = runpy.run_path(str(EXAMPLES / "grpo.py"))
    model, reference = load_float32(folder / "model"), load_float32(folder / "model")
    torch.manual_seed(0)
    prompts = ["Report of patient 1? ", "What does the radiograph show in patient 12? "]
    rollout = grpo["Rollout"](
        model, tokenizer(), prompts, 3, max_new_tokens=9, temperature=temperature
    )
    rewards = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]])
    advantages = grpo["group_advantages"](rewards).flatten()
    assert advantages[3:].abs().max() == 0 and abs(advantages[:3].sum()) < 1e-5
    weights = torch.rand(len(rollout.labels))
    with torch.no_grad():
        old = rollout.logps(model, temperature)
        for one in (model, reference):
            for parameter in one.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        ref = rollout.logps(reference, temperature)
    loss = grpo["grpo_loss"](
        rollout.logps(model, temperature), old, ref, advantages[rollout.rows], weights
    )
    loss.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    # Expected: one answer at a time, from logits over prompt and answer without padding.
    total, at = torch.zeros(()), 0
    for row in range(6):
        start = int(rollout.mask[row].argmax())
        scored = rollout.scored[row].nonzero()[:, 0]
        ids = rollout.ids[row, start : int(scored[-1]) + 2]
        policy, kept = (
            (m(ids[None]).logits[0] / temperature).log_softmax(-1) for m in (model, reference)
        )
        for position in (scored - start).tolist():
            token = ids[position + 1]
            ratio = torch.exp(policy[position, token] - old[at])
            d = kept[position, token].detach() - policy[position, token]
            gain = torch.min(
                ratio * advantages[row], torch.clamp(ratio, 0.8, 1.2) * advantages[row]
            )
            total = total - weights[at] * (gain - 0.04 * (torch.exp(d) - d - 1))
            at += 1
    assert at == len(rollout.labels)
    want = total / weights.sum()
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)
    for parameter, mine in zip(model.parameters(), found, strict=True):
        worst = (parameter.grad - mine).abs().max()
        assert worst <= 1e-3 * parameter.grad.abs().max() + 1e-6

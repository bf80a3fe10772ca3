"""The drift probe over every position of a report, against separate forwards with equal results.

`pytest --benchmark bench/bench_probe.py`. The naive loop runs one forward of prompt, prefix and
answer per position of the thought and finding. The speed-up is a ratio of CPU times of one thread,
probe and naive loop in alternation, as wall time depends on other load.
"""

from __future__ import annotations

import random
import time
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from cpo_fast.data.labels import LABEL_NAMES
from cpo_fast.evaluation.drift import probe
from cpo_fast.evaluation.likelihood import finding_candidates
from cpo_fast.model.build import tiny_text_model
from cpo_fast.model.packed import PackedModel
from cpo_fast.model.tokenizer import train_tokenizer
from cpo_fast.types import Prompt

TOKENS = 150
FINDINGS = tuple(name for name in LABEL_NAMES if name != "Emphysema")  # CheXpert's 14
WORDS = ["heart", "lungs", "clear", "no", "effusion", "opacity", "left", "small", "seen"]


@cache
def build_setting() -> tuple[Any, Any, Prompt, str]:
    """(model, tokenizer, prompt, thought of at least 150 tokens)."""
    draw = random.Random(0)
    answers = [f"The disease of this patient is {name}." for name in LABEL_NAMES]
    tokenizer = train_tokenizer([" ".join(WORDS), *answers] * 3, vocab_size=600)
    model = tiny_text_model(tokenizer, seed=0).eval()
    prompt = Prompt(tuple(tokenizer("the lungs are clear " * 12)["input_ids"]))
    thought = ""
    while len(tokenizer(f"<think> {thought}".strip())["input_ids"]) < TOKENS:
        thought += draw.choice(WORDS) + " "
    return model, tokenizer, prompt, thought.strip()


def probe_naively() -> tuple[np.ndarray, float]:
    """(z [positions, C], CPU seconds) with one forward per position and finding."""
    model, tokenizer, prompt, thought = build_setting()
    stream = tokenizer(f"<think> {thought}", add_special_tokens=False)["input_ids"]
    close = tokenizer(" </think>", add_special_tokens=False)["input_ids"]
    endings = [[*close, *ids] for ids in finding_candidates(tokenizer, FINDINGS)]
    table: list[list[float]] = []
    begun = time.process_time()
    with torch.inference_mode():
        for j in range(len(stream) + 1):
            row = []
            for ending in endings:
                ids = torch.tensor([[*prompt.input_ids, *stream[:j], *ending]])
                logits = model(ids).logits[0, -len(ending) - 1 : -1].float()
                logps = logits.log_softmax(-1)
                row.append(float(logps[range(len(ending)), ending].sum()))
            table.append(row)
    seconds = time.process_time() - begun
    scores = np.array(table)
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True), seconds


def test_every_position_of_a_report(benchmark: Any) -> None:
    torch.set_num_threads(1)
    model, tokenizer, prompt, thought = build_setting()
    packed = PackedModel(model)

    def run() -> Any:
        return probe(packed, tokenizer, prompt, thought, findings=FINDINGS)

    drift = run()
    length = len(drift.tokens)
    assert length >= TOKENS
    rounds = []
    for _ in range(2):
        begun = time.process_time()
        run()
        own = time.process_time() - begun
        z, seconds = probe_naively()
        rounds.append((seconds / own, seconds))
    np.testing.assert_allclose(drift.distribution, z, atol=1e-5)
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    faster, seconds = min(rounds)
    benchmark.extra_info.update(
        tokens=length,
        candidates=len(FINDINGS),
        naive_cpu_seconds=round(seconds, 3),
        times_faster=round(faster, 1),
    )
    print(f"\nnaive {seconds:.2f} s of CPU time, the probe is {faster:.1f} x faster")


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "--benchmark", "-s"]))

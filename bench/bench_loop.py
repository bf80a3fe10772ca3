"""Overhead of the training loop, and the cost of a checkpoint.

A CPO stage with a run's Trainer (plan, feed with worker processes, metrics, a log row per step,
stop requests, a checkpoint every few steps) over a small random model with LoRA. Overhead is the
share of a step outside forward, backward and optimiser: waiting for data, metrics, logging,
counting. A checkpoint is timed separately and compared with a step. It contains adapter, AdamW
state, tokenizer and image processor, and is synced to the disk of pytest's temporary folder. Worker
processes share the machine's cores with the step, as in a run.

    pytest --benchmark bench/bench_loop.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.step_data import VISUAL_504, build_small_model, make_work
from bench.training_loop import build_trainer
from cpo_fast.model.build import add_lora, save_model
from cpo_fast.model.packed import PackedModel
from cpo_fast.training.interrupt import StopRequest

STEPS = 8
SAVE_STEPS = 4
STUDIES = 16
PAIRS_PER_STEP = 8


@pytest.mark.parametrize("workers", [0, 1])
def test_loop_overhead(
    benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    work = make_work(studies=STUDIES, side=VISUAL_504, prompt_words=40)
    model = add_lora(build_small_model(work.tokenizer, vision=True))

    def save(folder: Path, sharded: bool) -> dict[str, str]:
        save_model(model, folder, tokenizer=work.tokenizer, images=work.images)
        return {}

    trainer = build_trainer(
        PackedModel(model),
        work,
        tmp_path,
        stop=StopRequest(),
        save_model=save,
        per_device_train_batch_size=PAIRS_PER_STEP,
        gradient_accumulation_steps=1,
        max_steps=STEPS,
        save_steps=SAVE_STEPS,
        dataloader_num_workers=workers,
    )
    done = benchmark.pedantic(trainer.run, rounds=1)
    throughput = done.throughput
    shares = throughput["time"]
    overhead = 1 - sum(shares[name] for name in ("forward", "backward", "optimiser"))
    step = PAIRS_PER_STEP / throughput["pairs_per_second"]
    checkpoint = throughput["seconds_per_checkpoint"]
    files = [
        path for path in (tmp_path / "cpo" / f"checkpoint-{STEPS}").rglob("*") if path.is_file()
    ]
    size = sum(path.stat().st_size for path in files)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    benchmark.extra_info |= {
        "overhead": overhead,
        "data": shares["data"],
        "seconds_per_step": step,
        "seconds_per_checkpoint": checkpoint,
        "checkpoint_bytes": size,
        "mfu": last["mfu"],
        "threads": torch.get_num_threads(),
    }
    with capsys.disabled():
        print(
            f"\nloop, {workers} workers: step {step:.2f} s, overhead {overhead:.2%} = "
            f"{overhead * step * 1e3:.0f} ms (waiting for data {shares['data']:.2%}); a checkpoint "
            f"of {size / 1e6:.1f} MB takes {checkpoint:.2f} s = {checkpoint / step:.2f} steps; "
            f"{torch.get_num_threads()} threads"
        )

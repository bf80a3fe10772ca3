"""What the training loop costs beside model, loss and optimiser, and what a checkpoint costs.

A CPO stage as a run does it (the run's own Trainer: plan, feed with worker processes, metrics, log
row at every step, stop requests, checkpoint every few steps) over a small random model with LoRA.
Overhead is the share of the step's time that is in no forward, backward or optimiser: waiting for
data, metrics, log, counting. A checkpoint is timed by itself and told in steps; it holds adapter,
AdamW state, tokenizer and image processor, and is synced to the disk, here in pytest's temporary
folder. Worker processes share the machine's cores with the step, as in a run.

    pytest --benchmark bench/bench_loop.py
"""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cpo_fast.model.build import add_lora, save_model, tiny_model
from cpo_fast.model.images import ImageProcessor
from cpo_fast.model.packed import PackedModel
from cpo_fast.model.tokenizer import train_tokenizer
from cpo_fast.packing import encode_all, image_token_id
from cpo_fast.run.arguments import TrainArguments
from cpo_fast.training.interrupt import StopRequest
from cpo_fast.training.loop import Trainer
from cpo_fast.training.metrics import MetricsLog
from cpo_fast.training.objectives import CPOObjective
from cpo_fast.types import ImageRef, Preference

STEPS = 8
SAVE_STEPS = 4
STUDIES = 16
WORDS = ["".join(random.Random(i).choices("aeioulnrstmdp", k=3 + i % 6)) for i in range(1200)]


def preferences() -> list[Preference]:
    """One chosen, two rejected answers of 100 to 250 tokens and an image of 504 x 504 each."""
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    made = []
    for study in range(STUDIES):
        pixels = np.random.default_rng(study).integers(0, 256, (504, 504), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        prompt = [{"type": "image"}, {"type": "text", "text": words(40)}]
        answers = [words(rng.randint(95, 235)) for _ in range(3)]
        image = ImageRef(f"{study}.png", data=file.getvalue())
        turns = ({"role": "user", "content": prompt},)
        made.append(Preference(str(study), turns, answers[0], tuple(answers[1:]), (image,)))
    return made


@pytest.mark.parametrize("workers", [0, 1])
def test_loop_overhead(benchmark, tmp_path: Path, capsys, workers: int) -> None:
    tokenizer = train_tokenizer([" ".join(WORDS)] * 3, vocab_size=4096)
    images = ImageProcessor.create(max_pixels=504 * 504)
    model = add_lora(
        tiny_model(
            tokenizer,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=8,
            intermediate_size=768,
            vision_hidden_size=128,
            vision_layers=4,
            vision_intermediate_size=256,
        )
    )
    packed = PackedModel(model)
    args = TrainArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        max_steps=STEPS,
        save_steps=SAVE_STEPS,
        dataloader_num_workers=workers,
    )
    log = MetricsLog(tmp_path / "metrics.jsonl")

    def save(folder: Path, sharded: bool) -> dict[str, str]:
        save_model(model, folder, tokenizer=tokenizer, images=images)
        return {}

    trainer = Trainer(
        stage="cpo",
        model=packed,
        objective=CPOObjective(packed),
        groups=encode_all(preferences(), tokenizer, images.grid, max_length=4096).groups,
        eval_groups=(),
        pixels=images.pixels,
        image_token_id=image_token_id(tokenizer),
        args=args,
        log=log,
        stage_dir=tmp_path / "cpo",
        save_model=save,
        device=torch.device("cpu"),
        stop=StopRequest(),
    )
    done = benchmark.pedantic(trainer.run, rounds=1)
    found = done.throughput
    shares = found["time"]
    inside = sum(shares[name] for name in ("forward", "backward", "optimiser"))
    step = 8 / found["pairs_per_second"]
    checkpoint = found["seconds_per_checkpoint"]
    files = [
        path for path in (tmp_path / "cpo" / f"checkpoint-{STEPS}").rglob("*") if path.is_file()
    ]
    size = sum(path.stat().st_size for path in files)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    benchmark.extra_info |= {
        "overhead": 1 - inside,
        "data": shares["data"],
        "seconds_per_step": step,
        "seconds_per_checkpoint": checkpoint,
        "checkpoint_bytes": size,
        "mfu": last["mfu"],
        "threads": torch.get_num_threads(),
    }
    with capsys.disabled():
        print(
            f"\nloop, {workers} workers: step {step:.2f} s, overhead {1 - inside:.2%} = "
            f"{(1 - inside) * step * 1e3:.0f} ms (waiting for data "
            f"{shares['data']:.2%}); a checkpoint of {size / 1e6:.1f} MB takes "
            f"{checkpoint:.2f} s = {checkpoint / step:.2f} steps; {torch.get_num_threads()} threads"
        )

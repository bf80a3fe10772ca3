"""Training steps end to end: ours against trl's DPOTrainer 1.16 and our unshared mode.

Same model (a small random Qwen2.5-VL or Qwen2, LoRA r 8 on the language model's linears, fp32),
same pairs (one chosen, two rejected), same optimiser, one process. A step is everything from the
image files to the updated adapter: preprocessing, policy and reference forward, loss, backward,
AdamW. Token ids are computed before the step, as in a run, except by trl's vision collator, which
computes them in the step. Our rounds alternate with each peer's, so that all see the same machine
load; figures are medians. On a CPU trl scores every position, on a GPU the response rows only: the
ratio on a CPU is higher.

`test_training_loop` times training loops, ours with a run's Trainer, trl's with DPOTrainer.train():
steps of 8 pairs with feed, schedule, clipping and log, without start-up and first step; rounds
alternate. MFU relates model FLOPs (cpo_fast/model/flops.py) to a square matrix product measured in
the same process. Real sizes: bench/step_sizes.py.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.measure import Clocked, measure_extra_memory
from bench.packed_step import Mode, PackedStep
from bench.step_data import VISUAL_504, Work, build_small_model, make_work
from bench.training_loop import build_trainer
from bench.trl_step import TrlStep, trainer
from cpo_fast.model.build import add_lora
from cpo_fast.model.flops import mfu, peak_flops
from cpo_fast.model.packed import PackedModel

STUDIES = 4
PAIRS = 2 * STUDIES
ABSENT = {
    "ms-swift": "4.6.0 asks for transformers < 5.20, trl < 1.0 and peft < 0.21, so it cannot be "
    "installed beside this project's pins"
}
"""Peers that are not timed, and why."""
TRL_BATCH = 4
PACKING_LENGTH = 4096
ROUNDS = 3
LOOP_STEPS = 3
LOOP_ROUNDS = 3
CASES = {
    # name: (image side in pixels, words of the prompt's text); a word is about one token
    "image, prompt 380": (VISUAL_504, 40),
    "text, prompt 380": (0, 360),
    "text, prompt 63": (0, 45),
}


@dataclass(frozen=True)
class Setup:
    """A case: its data, and a function that builds a new model."""

    name: str
    work: Work
    model: Callable[[], Any]


@pytest.fixture(params=CASES)
def setup(request: pytest.FixtureRequest) -> Setup:
    side, prompt_words = CASES[request.param]
    data = make_work(studies=STUDIES, side=side, prompt_words=prompt_words)
    return Setup(request.param, data, lambda: build_small_model(data.tokenizer, vision=bool(side)))


def build_ours(setup: Setup, *, attention: str = "gathered", mode: Mode = "shared") -> PackedStep:
    packed = PackedModel(add_lora(setup.model(), r=8, alpha=32), attention=attention)
    return PackedStep(packed, setup.work, packing_length=PACKING_LENGTH, mode=mode)


def compute_explained_share(token_ratio: float, factor: float) -> float:
    """The share of log(speed-up) that is due to computing fewer tokens."""
    return math.log(token_ratio) / math.log(factor)


def test_training_step(
    benchmark: Any, setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = build_ours(setup)
    peers = {
        "trl": TrlStep(setup.model(), setup.work, folder=str(tmp_path), batch=TRL_BATCH),
        "unshared": build_ours(setup, mode="unshared"),
        "unpacked": build_ours(setup, mode="unpacked"),
        "dense mask": build_ours(setup, attention="sdpa"),
    }
    # All losses must agree before timing.
    want = step()
    physical, flops = step.tokens, step.flops
    for name, peer in peers.items():
        assert abs(peer() - want) < 1e-5, name
    logical = setup.work.logical_tokens
    memory = {name: measure_extra_memory(run) for name, run in {"ours": step, **peers}.items()}

    step.clear()
    mine = Clocked(step)
    clocked = {name: Clocked(peer) for name, peer in peers.items()}

    def run_peers() -> None:
        for peer in clocked.values():
            peer()

    benchmark.pedantic(mine, setup=run_peers, rounds=ROUNDS)
    median = statistics.median(mine.wall)
    utilisation = mfu(flops, median, peak_flops(torch.device("cpu"), torch.float32))
    shares = step.phases.compute_shares()
    rates = {name: PAIRS / statistics.median(peer.wall) for name, peer in clocked.items()}
    cpu_ratios = {
        name: statistics.median(peer.cpu) / statistics.median(mine.cpu)
        for name, peer in clocked.items()
    }
    benchmark.extra_info |= {
        "case": setup.name,
        "pairs_per_second": PAIRS / median,
        "peers_pairs_per_second": rates,
        "ratios": {name: PAIRS / median / rate for name, rate in rates.items()},
        "cpu_time_ratios": cpu_ratios,
        "physical_tokens_per_second": physical / median,
        "logical_tokens_per_second": logical / median,
        "token_ratio": logical / physical,
        "flops_per_token": flops / physical,
        "mfu": utilisation,
        "time_shares": shares,
        "peak_memory_bytes": memory,
        "threads": torch.get_num_threads(),
    }
    with capsys.disabled():
        against = ", ".join(
            f"{name} {rate:.2f} ({PAIRS / median / rate:.1f} x, CPU time {cpu_ratios[name]:.1f} x)"
            for name, rate in rates.items()
        )
        print(
            f"\n{setup.name}: {PAIRS / median:.2f} pairs/s; {against}; tokens {physical} for "
            f"{logical} unshared ({logical / physical:.2f} x); {torch.get_num_threads()} threads\n"
            f"{flops / physical / 1e6:.1f} MFLOP per token, MFU {utilisation:.0%}; time: "
            + ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
            + "\npeak MiB of a step: "
            + ", ".join(f"{name} {(size or 0) / 2**20:.0f}" for name, size in memory.items())
        )


class StepTimes:
    """Stands in for the stop request, polled once per step: records the time, never stops."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def pending(self) -> bool:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())
        return False

    def compute_rates(self) -> tuple[float, float]:
        """Pairs per second of wall time and of CPU time, without the first step."""
        pairs = PAIRS * (len(self.wall) - 1)
        return pairs / (self.wall[-1] - self.wall[0]), pairs / (self.cpu[-1] - self.cpu[0])


def run_our_loop(setup: Setup, folder: Path) -> StepTimes:
    """The CPO stage of a run, with steps of PAIRS pairs."""
    folder.mkdir()
    times = StepTimes()
    build_trainer(
        PackedModel(add_lora(setup.model(), r=8, alpha=32)),
        setup.work,
        folder,
        stop=times,
        per_device_train_batch_size=TRL_BATCH,
        gradient_accumulation_steps=PAIRS // TRL_BATCH,
        max_steps=LOOP_STEPS,
        packing_length=PACKING_LENGTH,
        dataloader_num_workers=0,
    ).run()
    return times


def run_trl_loop(setup: Setup, folder: Path) -> StepTimes:
    """DPOTrainer.train() in micro-batches of TRL_BATCH pairs."""
    from transformers import TrainerCallback

    times = StepTimes()

    class StepRecorder(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.pending()

    trl = trainer(
        setup.model(),
        setup.work.preferences,
        setup.work.tokenizer,
        setup.work.images,
        output_dir=str(folder),
        r=8,
        alpha=32,
        per_device_train_batch_size=TRL_BATCH,
        gradient_accumulation_steps=PAIRS // TRL_BATCH,
        max_steps=LOOP_STEPS,
        dataloader_num_workers=0,
        logging_steps=1,
    )
    trl.add_callback(StepRecorder())
    trl.train()
    return times


def test_training_loop(
    benchmark: Any, setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds: dict[str, list[tuple[float, float]]] = {"ours": [], "trl": []}

    def run_round() -> None:
        number = len(rounds["trl"])
        rounds["trl"].append(run_trl_loop(setup, tmp_path / f"trl-{number}").compute_rates())
        rounds["ours"].append(run_our_loop(setup, tmp_path / f"ours-{number}").compute_rates())

    benchmark.pedantic(run_round, rounds=LOOP_ROUNDS)
    medians = {
        name: [statistics.median(column) for column in zip(*rates, strict=True)]
        for name, rates in rounds.items()
    }
    ratios = [a / b for a, b in zip(medians["ours"], medians["trl"], strict=True)]
    tokens = setup.work.logical_tokens / setup.work.physical_tokens
    benchmark.extra_info |= {
        "case": setup.name,
        "pairs_per_second": {name: wall for name, (wall, _) in medians.items()},
        "pairs_per_cpu_second": {name: cpu for name, (_, cpu) in medians.items()},
        "ratio": ratios[0],
        "cpu_time_ratio": ratios[1],
        "rounds": rounds,
        "token_ratio": tokens,
        "explained_by_tokens": compute_explained_share(tokens, ratios[0]),
        "absent": ABSENT,
        "threads": torch.get_num_threads(),
    }
    with capsys.disabled():
        print(
            f"\n{setup.name}, whole loop: {medians['ours'][0]:.2f} pairs/s, trl "
            f"{medians['trl'][0]:.2f} ({ratios[0]:.1f} x, CPU time {ratios[1]:.1f} x); "
            f"{torch.get_num_threads()} threads; {tokens:.2f} x fewer tokens explain "
            f"{compute_explained_share(tokens, ratios[0]):.0%} of it (of its logarithm)\n"
            + "; ".join(f"{name} is not timed: {why}" for name, why in ABSENT.items())
        )

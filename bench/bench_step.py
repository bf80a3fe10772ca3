"""Training steps end to end: ours against trl's DPOTrainer 1.16 and our own unshared mode.

Same model (a small random Qwen2.5-VL or Qwen2, LoRA r 8 on the language model's linears, fp32),
same pairs (one chosen, two rejected), same optimiser, one process. A step is everything from the
image files to the updated adapter: preprocessing, policy and reference forward, loss, backward,
AdamW. Ours has its token ids made ahead, as in a run; so has trl for text, while its vision
collator makes them in the step. Every round of ours is preceded by one round of each peer, so that
all see the same machine; figures are medians. On a CPU trl scores every position, on a GPU the
response rows only, which flatters the ratio here.

`test_training_loop` times whole training loops instead, ours by the run's own Trainer, trl's by
DPOTrainer.train(): steps of 8 pairs with feed, schedule, clipping and log, start-up and the first
step left out; rounds of the two alternate. MFU is of model FLOPs (cpo_fast/model/flops.py) against
a square matrix product measured in the same process. Real sizes: bench/step_sizes.py.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.memory import extra_memory
from bench.packed_step import Mode, PackedStep
from bench.step_data import VISUAL_504, work
from bench.trl_step import TrlStep, trainer
from cpo_fast.model.build import add_lora, tiny_model, tiny_text_model
from cpo_fast.model.flops import mfu, peak_flops
from cpo_fast.model.packed import PackedModel
from cpo_fast.packing import image_token_id
from cpo_fast.run.arguments import TrainArguments
from cpo_fast.training.loop import Trainer
from cpo_fast.training.metrics import MetricsLog
from cpo_fast.training.objectives import CPOObjective

STUDIES = 4
PAIRS = 2 * STUDIES
ABSENT = {
    "ms-swift": "4.6.0 asks for transformers < 5.20, trl < 1.0 and peft < 0.21, so it cannot be "
    "installed beside this project's pins"
}
"""Peers that are not timed here, and why."""
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


def ours(setup: SimpleNamespace, *, attention: str = "gathered", mode: Mode = "shared"):
    packed = PackedModel(add_lora(setup.model(), r=8, alpha=32), attention=attention)
    return PackedStep(packed, setup.work, packing_length=PACKING_LENGTH, mode=mode)


@pytest.fixture(params=CASES)
def setup(request) -> SimpleNamespace:
    side, prompt_words = CASES[request.param]
    data = work(studies=STUDIES, side=side, prompt_words=prompt_words)
    sizes = {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "intermediate_size": 768,
    }

    def model():
        if not side:
            return tiny_text_model(data.tokenizer, **sizes)
        vision = {"vision_hidden_size": 128, "vision_layers": 4, "vision_intermediate_size": 256}
        return tiny_model(data.tokenizer, **sizes, **vision)

    return SimpleNamespace(name=request.param, work=data, model=model)


def explained(token_ratio: float, factor: float) -> float:
    """The share of a speed-up, as factors multiply, that computing fewer tokens explains."""
    return math.log(token_ratio) / math.log(factor)


class Clocked:
    """A step that notes its wall and CPU seconds; the latter stand still while others compute."""

    def __init__(self, step: Callable) -> None:
        self.step = step
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __call__(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.step()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)


def test_training_step(benchmark, setup, tmp_path, capsys):
    step = ours(setup)
    peers = {
        "trl": TrlStep(setup.model(), setup.work, folder=str(tmp_path), batch=TRL_BATCH),
        "unshared": ours(setup, mode="unshared"),
        "unpacked": ours(setup, mode="unpacked"),
        "dense mask": ours(setup, attention="sdpa"),
    }
    # No speed without the same numbers.
    want = step()
    physical, flops = step.tokens, step.flops
    for name, peer in peers.items():
        assert abs(peer() - want) < 1e-5, name
    logical = setup.work.logical_tokens
    memory = {name: extra_memory(run) for name, run in {"ours": step, **peers}.items()}

    step.clear()
    mine = Clocked(step)
    clocked = {name: Clocked(peer) for name, peer in peers.items()}

    def run_peers() -> None:
        for peer in clocked.values():
            peer()

    benchmark.pedantic(mine, setup=run_peers, rounds=ROUNDS)
    median = statistics.median(mine.wall)
    utilisation = mfu(flops, median, peak_flops(torch.device("cpu"), torch.float32))
    shares = step.phases.shares()
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
            + "\nMiB that a step takes at its peak: "
            + ", ".join(f"{name} {(size or 0) / 2**20:.0f}" for name, size in memory.items())
        )


class StepTimes:
    """Stands in for a stop request, which is asked once a step; never stops, notes the time."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def pending(self) -> bool:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())
        return False

    def rates(self) -> tuple[float, float]:
        """Pairs per second of wall and of CPU time, after the first step."""
        pairs = PAIRS * (len(self.wall) - 1)
        return pairs / (self.wall[-1] - self.wall[0]), pairs / (self.cpu[-1] - self.cpu[0])


def our_loop(setup: SimpleNamespace, folder: Path) -> StepTimes:
    """The CPO stage as a run does it, steps of PAIRS pairs."""
    folder.mkdir()
    packed = PackedModel(add_lora(setup.model(), r=8, alpha=32))
    times = StepTimes()
    args = TrainArguments(
        output_dir=str(folder),
        per_device_train_batch_size=TRL_BATCH,
        gradient_accumulation_steps=PAIRS // TRL_BATCH,
        max_steps=LOOP_STEPS,
        packing_length=PACKING_LENGTH,
        dataloader_num_workers=0,
    )
    Trainer(
        stage="cpo",
        model=packed,
        objective=CPOObjective(packed),
        groups=setup.work.groups,
        eval_groups=(),
        pixels=setup.work.images.pixels,
        image_token_id=image_token_id(setup.work.tokenizer),
        args=args,
        log=MetricsLog(folder / "metrics.jsonl"),
        stage_dir=folder / "cpo",
        save_model=lambda *_: None,
        device=torch.device("cpu"),
        stop=times,
    ).run()
    return times


def trl_loop(setup: SimpleNamespace, folder: Path) -> StepTimes:
    """DPOTrainer.train() in micro-batches of TRL_BATCH pairs."""
    from transformers import TrainerCallback

    times = StepTimes()

    class Noted(TrainerCallback):
        def on_step_end(self, *args, **kwargs) -> None:
            times.pending()

    made = trainer(
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
    made.add_callback(Noted())
    made.train()
    return times


def test_training_loop(benchmark, setup, tmp_path, capsys):
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "trl": []}

    def round_of_both() -> None:
        number = len(found["trl"])
        found["trl"].append(trl_loop(setup, tmp_path / f"trl-{number}").rates())
        found["ours"].append(our_loop(setup, tmp_path / f"ours-{number}").rates())

    benchmark.pedantic(round_of_both, rounds=LOOP_ROUNDS)
    medians = {
        name: [statistics.median(column) for column in zip(*rates, strict=True)]
        for name, rates in found.items()
    }
    ratios = [a / b for a, b in zip(medians["ours"], medians["trl"], strict=True)]
    tokens = setup.work.logical_tokens / setup.work.physical_tokens
    benchmark.extra_info |= {
        "case": setup.name,
        "pairs_per_second": {name: wall for name, (wall, _) in medians.items()},
        "pairs_per_cpu_second": {name: cpu for name, (_, cpu) in medians.items()},
        "ratio": ratios[0],
        "cpu_time_ratio": ratios[1],
        "rounds": found,
        "token_ratio": tokens,
        "explained_by_tokens": explained(tokens, ratios[0]),
        "absent": ABSENT,
        "threads": torch.get_num_threads(),
    }
    with capsys.disabled():
        print(
            f"\n{setup.name}, whole loop: {medians['ours'][0]:.2f} pairs/s, trl "
            f"{medians['trl'][0]:.2f} ({ratios[0]:.1f} x, CPU time {ratios[1]:.1f} x); "
            f"{torch.get_num_threads()} threads; {tokens:.2f} x fewer tokens explain "
            f"{explained(tokens, ratios[0]):.0%} of it (in factors)\n"
            + "; ".join(f"{name} is absent: {why}" for name, why in ABSENT.items())
        )

"""The drop-in trainer against the trainer that it replaces: steps of trl's DPOTrainer 1.16 and of
CPODPOTrainer, with all of trl's metrics and without token metrics (`token_metrics=False`).

Models, pairs and step as in bench_step.py; the output head has about a quarter of the text model's
weights, as in Qwen2.5-0.5B. Rounds alternate; figures are medians. Both compute prompts twice per
pair: the ratio shows the gain from log-probs and loss within a step. On a CPU trl scores every
position, on a GPU the response rows only: the case with a short prompt is closer to a GPU.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.bench_step import PAIRS, TRL_BATCH, Setup, setup  # noqa: F401
from bench.measure import Clocked
from bench.trl_step import TrlStep

ROUNDS = 3


def test_drop_in_step(
    benchmark: Any,
    setup: Setup,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from cpo_fast.integrations.trl import CPODPOTrainer

    def build_step(name: str, **options: Any) -> TrlStep:
        folder = str(tmp_path / name)
        return TrlStep(setup.model(), setup.work, folder=folder, batch=TRL_BATCH, **options)

    few = partial(CPODPOTrainer, token_metrics=False)
    steps = {
        "trl": build_step("trl"),
        "drop-in": build_step("drop-in", kind=CPODPOTrainer),
        "drop-in, no token metrics": build_step("few", kind=few),
    }
    losses = [step() for step in steps.values()]  # must agree before timing
    assert max(losses) - min(losses) < 1e-5
    clocked = {name: Clocked(step) for name, step in steps.items()}

    def run_round() -> None:
        for step in clocked.values():
            step()

    benchmark.pedantic(run_round, rounds=ROUNDS)
    wall = {name: statistics.median(step.wall) for name, step in clocked.items()}
    cpu = {name: statistics.median(step.cpu) for name, step in clocked.items()}
    benchmark.extra_info |= {
        "case": setup.name,
        "pairs_per_second": {name: PAIRS / seconds for name, seconds in wall.items()},
        "ratios": {name: wall["trl"] / seconds for name, seconds in wall.items()},
        "cpu_time_ratios": {name: cpu["trl"] / seconds for name, seconds in cpu.items()},
        "threads": torch.get_num_threads(),
    }
    with capsys.disabled():
        print(f"\n{setup.name}, {torch.get_num_threads()} threads, pairs/s: " + "; ".join(
            f"{name} {PAIRS / wall[name]:.2f} ({wall['trl'] / wall[name]:.2f} x, CPU time "
            f"{cpu['trl'] / cpu[name]:.2f} x)"
            for name in steps
        ))  # fmt: skip

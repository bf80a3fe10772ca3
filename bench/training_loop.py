"""The CPO stage with a run's Trainer, for benchmarks of the training loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.step_data import Work
from cpo_fast.model.packed import PackedModel
from cpo_fast.packing import image_token_id
from cpo_fast.training.loop import StageData, StageOutput, Trainer
from cpo_fast.training.metrics import MetricsLog
from cpo_fast.training.objectives import CPOObjective
from cpo_fast.training.stage_settings import StageSettings


def build_trainer(
    packed: PackedModel,
    work: Work,
    folder: Path,
    *,
    stop: Any,
    save_model: Callable[[Path, bool], dict[str, str]] = lambda *_: {},
    **settings: Any,
) -> Trainer:
    """A Trainer on the CPU over the pairs of `work`; `settings` are fields of StageSettings."""
    return Trainer(
        StageSettings(stage="cpo", **settings),
        packed,
        CPOObjective(packed),
        StageData(
            work.groups,
            pixels=work.images.pixels,
            image_token_id=image_token_id(work.tokenizer),
        ),
        StageOutput(folder / "cpo", MetricsLog(folder / "metrics.jsonl"), save_model),
        device=torch.device("cpu"),
        stop=stop,
    )

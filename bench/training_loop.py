"""The CPO stage with the run's own Trainer, for the benchmarks of the training loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.step_data import Work
from cpo_fast.model.packed import PackedModel
from cpo_fast.packing import image_token_id
from cpo_fast.run.arguments import TrainArguments
from cpo_fast.training.loop import Trainer
from cpo_fast.training.metrics import MetricsLog
from cpo_fast.training.objectives import CPOObjective


def build_trainer(
    packed: PackedModel,
    work: Work,
    folder: Path,
    *,
    stop: Any,
    save_model: Callable[[Path, bool], dict[str, str]] = lambda *_: {},
    **settings: Any,
) -> Trainer:
    """A Trainer on the CPU over the pairs of `work`; `settings` are TrainArguments."""
    return Trainer(
        stage="cpo",
        model=packed,
        objective=CPOObjective(packed),
        groups=work.groups,
        eval_groups=(),
        pixels=work.images.pixels,
        image_token_id=image_token_id(work.tokenizer),
        args=TrainArguments(output_dir=str(folder), **settings),
        log=MetricsLog(folder / "metrics.jsonl"),
        stage_dir=folder / "cpo",
        save_model=save_model,
        device=torch.device("cpu"),
        stop=stop,
    )

"""Learning-rate schedules: transformers' own, made in one place."""

from __future__ import annotations

import math
from typing import Any

import torch

WITHOUT_OPTIONS = ("constant", "constant_with_warmup")  # transformers would ignore them


def make_schedule(
    optimizer: torch.optim.Optimizer, settings: dict[str, Any], num_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule that the settings of a stage (`TrainArguments.of_stage`) name."""
    from transformers import get_scheduler

    return get_scheduler(
        settings["lr_scheduler_type"],
        optimizer,
        num_warmup_steps=math.ceil(settings["warmup_ratio"] * num_steps),
        num_training_steps=num_steps,
        scheduler_specific_kwargs=settings["lr_scheduler_kwargs"],
    )


def schedule_fault(settings: dict[str, Any], num_steps: int) -> str | None:
    """What is wrong with a schedule, found by building it on an optimizer of one parameter.

    Its learning rates are looked at over the whole of `num_steps` steps, at most 100 of them.
    """
    if settings["lr_scheduler_kwargs"] and settings["lr_scheduler_type"] in WITHOUT_OPTIONS:
        return "it takes no options"
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings["learning_rate"])
    try:
        schedule = make_schedule(optimizer, settings, num_steps)
        if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            return "it needs a metric at every step, which the stages do not give it"
        positions = range(0, num_steps + 1, max(1, num_steps // 100))
        factors = [float(factor(at)) for at in positions for factor in schedule.lr_lambdas]
    except Exception as error:  # whatever a schedule makes of wrong options
        return f"it cannot be built ({type(error).__name__}: {error})"
    if not all(math.isfinite(factor) and factor >= 0 for factor in factors):
        return "its learning rate becomes negative or is not finite"
    return None

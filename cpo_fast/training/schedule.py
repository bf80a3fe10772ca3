"""Learning-rate schedules of transformers."""

from __future__ import annotations

import math

import torch

from cpo_fast.training.stage_settings import StageSettings

WITHOUT_OPTIONS = ("constant", "constant_with_warmup")  # transformers would ignore them


def make_schedule(
    optimizer: torch.optim.Optimizer, settings: StageSettings, num_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule that the settings name, over `num_steps` steps."""
    from transformers import get_scheduler

    return get_scheduler(
        settings.lr_scheduler_type,
        optimizer,
        num_warmup_steps=math.ceil(settings.warmup_ratio * num_steps),
        num_training_steps=num_steps,
        scheduler_specific_kwargs=settings.lr_scheduler_kwargs,
    )


def find_schedule_fault(settings: StageSettings, num_steps: int) -> str | None:
    """The fault of a schedule, found by building it on an optimiser of one parameter.

    Its learning rates are checked at up to 100 steps spread over `num_steps`.
    """
    if settings.lr_scheduler_kwargs and settings.lr_scheduler_type in WITHOUT_OPTIONS:
        return "it takes no options"
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings.learning_rate)
    try:
        schedule = make_schedule(optimizer, settings, num_steps)
        if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            return "it needs a metric at every step, which the stages do not give it"
        positions = range(0, num_steps + 1, max(1, num_steps // 100))
        factors = [float(factor(at)) for at in positions for factor in schedule.lr_lambdas]
    except Exception as error:  # schedules raise various exceptions for wrong options
        return f"it cannot be built ({type(error).__name__}: {error})"
    if not all(math.isfinite(factor) and factor >= 0 for factor in factors):
        return "its learning rate becomes negative or is not finite"
    return None

"""Names that flags accept and whose source needs torch or transformers, as tables without them.

tests/run/test_flag_names.py compares the schedules with transformers.
"""

from __future__ import annotations

from typing import Any

METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "nll_loss",
)
"""Metrics of a CPO row over all pairs; with the suffix `/<source>`, over the pairs of a source."""

SCHEDULES: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "warmup_stable_decay": (
        "num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio",
        "num_cycles",
    ),
}  # fmt: skip
"""The options of each schedule in --lr_scheduler_kwargs. Schedules that need a metric at every step
(reduce_lr_on_plateau, greedy) are left out."""

NEEDED_OPTIONS = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
"""Schedules that need exactly one of these options."""


def find_option_fault(schedule: str, options: dict[str, Any]) -> str | None:
    """The fault in the option names of a schedule; None if the names are valid."""
    names = SCHEDULES[schedule]
    if unknown := [name for name in options if name not in names]:
        takes = f"takes {', '.join(names)}" if names else "takes no options"
        return f"no option {unknown[0]!r}; it {takes}"
    needed = NEEDED_OPTIONS.get(schedule, ())
    if needed and sum(name in options for name in needed) != 1:
        one = "one of " if len(needed) > 1 else ""
        return f"needs {one}{' and '.join(needed)} in --lr_scheduler_kwargs"
    return None

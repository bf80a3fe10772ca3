"""Compare the flags of a resumed run with those of its start; torch is not imported."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from cpo_fast.errors import UsageError

BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
DATA_FLAGS = (
    "dataset",
    "dataset_format",
    "image_root",
    "concept_graph",
    "counterfactuals",
    "model_name_or_path",
    "sft_checkpoint",
)
"""Flags that name data or a model; they can change with --allow_changed_data."""
MAY_CHANGE = (
    *BATCH,
    *(f"sft_{name}" for name in BATCH),
    "resume_from_checkpoint",
    "allow_changed_data",
    "report_to",
    "dry_run",
    "ddp_timeout",
    "fsdp",
    "overwrite_output_dir",
    "output_dir",
    "stages",
    "max_minutes",
    "preset",
    "save_steps",
    "save_total_limit",
    "dataloader_num_workers",
    "eval_batch_size",
    "num_examples",
    "print_example",
)
"""Flags that do not change what a resumed run computes (for batches, only the product counts)."""


def check_folder_flags(folder: Path, now: Mapping[str, Any]) -> None:
    """`check_flags` against config.json of a run's folder, if it exists."""
    path = folder / "config.json"
    if path.is_file():
        check_flags(path, json.loads(path.read_text(encoding="utf-8")), now)


def check_flags(place: Path, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UsageError naming the flags of a resumed run that differ from those of its start.

    Both mappings have the form of config.json. A flag that an earlier version lacks has its
    default.
    """
    from cpo_fast.run.arguments import TrainArguments

    defaults = {f.name: f.default for f in fields(TrainArguments)}
    allowed = (*MAY_CHANGE, *(DATA_FLAGS if now["allow_changed_data"] else ()))
    changed = [
        name
        for name, default in defaults.items()
        if name not in allowed and now[name] != earlier.get(name, default)
    ]
    advice = "resume with the same flags, or start again in another --output_dir"
    if changed and set(changed) <= set(DATA_FLAGS):
        advice += ", or continue with other data by --allow_changed_data true"
    for prefix in ("sft_", ""):
        before, after = (
            math.prod(flags.get(prefix + name, 0) for name in BATCH) * flags.get("world_size", 1)
            for flags in (earlier, now)
        )
        if before != after:
            changed.append(
                f"{prefix}{BATCH[0]} x --{prefix}{BATCH[1]} x processes ({before}, now {after})"
            )
    if changed:
        named = ", ".join(f"--{name}" for name in changed)
        raise UsageError(f"{place} was written with other values of {named}: {advice}")

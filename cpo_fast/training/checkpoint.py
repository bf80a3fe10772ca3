"""Checkpoints as peft and transformers load them: written beside, synced, then renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpo_fast.errors import UsageError


def checkpoints(stage_dir: Path) -> list[Path]:
    """The finished checkpoints of a stage, oldest first."""
    found = [(int(m[1]), p) for p in stage_dir.glob("checkpoint-*") if (m := _number(p.name))]
    return [path for _, path in sorted(found)]


def latest_checkpoint(stage_dir: Path) -> Path:
    """The newest checkpoint of a stage; UsageError with the remedy when there is none."""
    if found := checkpoints(stage_dir):
        return found[-1]
    raise UsageError(f"{stage_dir} has no checkpoint: run its stage first (--stages)")


def write_checkpoint(
    stage_dir: Path,
    step: int,
    save_model: Callable[[Path], None],
    trainer_state: dict[str, Any],
    *,
    save_total_limit: int | None = None,
) -> Path:
    """Write `stage_dir/checkpoint-<step>`; a crash leaves the earlier checkpoints as they were."""
    target = stage_dir / f"checkpoint-{step}"
    partial = stage_dir / f".partial-{step}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_model(partial)
    state = json.dumps(trainer_state, indent=2, allow_nan=False) + "\n"
    (partial / "trainer_state.json").write_text(state, encoding="utf-8")
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            _sync(path)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    _sync(stage_dir)
    if save_total_limit is not None:
        for old in checkpoints(stage_dir)[: -max(save_total_limit, 1)]:
            shutil.rmtree(old)
    return target


def _number(name: str) -> re.Match[str] | None:
    return re.fullmatch(r"checkpoint-(\d+)", name)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

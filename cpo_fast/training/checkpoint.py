"""Checkpoints: the files that peft and transformers load as they stand, and what a resume needs.

A checkpoint is written beside its place, synced, listed with checksums in manifest.json and
renamed. So it is whole or it is not there; one that was damaged later is known and passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cpo_fast.errors import CpoFastError, UsageError
from cpo_fast.training.sharding import like, whole

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
CARD = "README.md"
TENSORS = "optimizer.safetensors"


def checkpoints(stage_dir: Path) -> list[Path]:
    """The checkpoints of a stage, oldest first."""
    found = [(int(m[1]), p) for p in stage_dir.glob("checkpoint-*") if (m := _number(p.name))]
    return [path for _, path in sorted(found)]


def latest_checkpoint(stage_dir: Path) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are named on stderr and passed over."""
    for path in reversed(checkpoints(stage_dir)):
        if (damage := damage_of(path)) is None:
            return path
        print(f"warning: {path} is damaged ({damage}); trying the one before it", file=sys.stderr)
    return None


def result_checkpoint(stage_dir: Path, *, best: bool) -> Path | None:
    """What a stage ended with: its newest whole checkpoint or, with `best`, the one it calls best.

    Without any whole checkpoint None.
    """
    newest = latest_checkpoint(stage_dir)
    if newest is None or not best:
        return newest
    state = json.loads((newest / STATE).read_text(encoding="utf-8"))
    named = stage_dir / f"checkpoint-{state.get('best_global_step')}"
    return named if damage_of(named) is None else newest


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest; None when every byte is as written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, digest in manifest.items():
            if _digest(path / name) != digest:
                return f"{name} has changed"
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__} while reading it"
    return None


def resume_point(stage_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """Where a stage goes on: nowhere, its newest whole checkpoint ("auto"), or the one named."""
    if resume_from_checkpoint is None:
        return None
    named = Path(resume_from_checkpoint)
    if resume_from_checkpoint == "auto" or named.resolve().parent != stage_dir.resolve():
        return latest_checkpoint(stage_dir)
    if (damage := damage_of(named)) is not None:
        raise UsageError(f"--resume_from_checkpoint {named}: {damage}; try auto")
    return named


def write_checkpoint(
    stage_dir: Path,
    step: int,
    save_model: Callable[[Path], None],
    trainer_state: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    *,
    save_total_limit: int | None = None,
    keep: Path | None = None,
) -> Path:
    """Write `stage_dir/checkpoint-<step>`; a crash leaves the earlier checkpoints as they were.

    The best one, `keep`, is kept beyond `save_total_limit`. `trainer_state` is JSON, `tensors` is
    what AdamW holds. Raises CpoFastError when the file system takes no more.
    """
    target, partial = stage_dir / f"checkpoint-{step}", stage_dir / f".partial-{step}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(partial, save_model, trainer_state, tensors)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        _sync(stage_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CpoFastError(
            f"{target} cannot be written ({error}); the checkpoints before it are as they were. "
            "Make room (--save_total_limit) or mend the file system, then go on with "
            "--resume_from_checkpoint auto"
        ) from error
    if save_total_limit is not None:
        for old in checkpoints(stage_dir)[: -max(save_total_limit, 1)]:
            if old != keep:
                shutil.rmtree(old)
    return target


def _write(
    partial: Path,
    save_model: Callable[[Path], None],
    trainer_state: dict[str, Any],
    tensors: dict[str, torch.Tensor],
) -> None:
    partial.mkdir(parents=True, mode=0o700)
    save_model(partial)
    save_file(tensors, partial / TENSORS)
    state = json.dumps(trainer_state, indent=2, allow_nan=False) + "\n"
    (partial / STATE).write_text(state, encoding="utf-8")
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    names = [path for path in files if path.name != CARD]  # which may be written anew
    manifest = {str(path.relative_to(partial)): _digest(path) for path in names}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in (*files, partial / MANIFEST, partial):
        _sync(path)


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(trainer state, tensors) as `write_checkpoint` got them."""
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    return state, load_file(path / TENSORS)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[torch.nn.Parameter, str]
) -> dict[str, torch.Tensor]:
    """AdamW's state by parameter name (`<kind>/<name>`), whole and on the CPU.

    Every rank calls it.
    """
    tensors = {}
    for parameter, name in names.items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = whole(value.detach()).to("cpu", copy=True).contiguous()
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: dict[torch.nn.Parameter, str],
    tensors: dict[str, torch.Tensor],
) -> None:
    """Inverse of `optimizer_tensors`; UsageError when the parameters are not the same ones."""
    saved: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        kind, name = key.split("/", 1)
        saved.setdefault(name, {})[kind] = value
    if missing := sorted(set(saved) ^ set(names.values())):
        raise UsageError(
            f"the checkpoint trains other parameters than this run ({missing[0]} and "
            f"{len(missing) - 1} more); resume with the flags that it was written with"
        )
    for parameter, name in names.items():
        optimizer.state[parameter] = {
            key: value if key == "step" else like(value, parameter)
            for key, value in saved[name].items()
        }


def generators() -> dict[str, str]:
    """The state of this process's random number generators, in hexadecimal."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: state.numpy().tobytes().hex() for name, state in states.items()}


def restore_generators(states: dict[str, str]) -> None:
    """Inverse of `generators`."""
    read = {
        name: torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8)
        for name, state in states.items()
    }
    torch.set_rng_state(read["cpu"])
    if "cuda" in read and torch.cuda.is_available():
        torch.cuda.set_rng_state(read["cuda"])


def _number(name: str) -> re.Match[str] | None:
    return re.fullmatch(r"checkpoint-(\d+)", name)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

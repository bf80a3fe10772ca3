"""Checkpoints of a stage: files that peft and transformers load, and the state for a resume.

A checkpoint is written to a temporary folder, listed with checksums in manifest.json, synced and
renamed: it is complete or absent. Later damage is detected, and the checkpoint is skipped.
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
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from cpo_fast.errors import CpoFastError, UsageError, first_line

if TYPE_CHECKING:
    from cpo_fast.training.distributed import World

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
CARD = "README.md"
BEGUN_WITH = "begun_with"
"""Key of trainer_state.json: digests of the inputs of the stage."""

RESUME = "continue with resume_from_checkpoint auto"
"""The advice after an early stop."""


def list_checkpoints(stage_dir: Path) -> list[Path]:
    """The checkpoints of a stage, oldest first."""
    found = [(int(m[1]), p) for p in stage_dir.glob("checkpoint-*") if (m := _number(p.name))]
    return [path for _, path in sorted(found)]


def find_latest_checkpoint(stage_dir: Path) -> Path | None:
    """The newest undamaged checkpoint; warns of damaged ones and skips them."""
    for path in reversed(list_checkpoints(stage_dir)):
        if (damage := find_damage(path)) is None:
            return path
        print(f"warning: {path} is damaged ({damage}); trying the previous one", file=sys.stderr)
    return None


def find_result_checkpoint(stage_dir: Path, *, best: bool) -> Path | None:
    """The result of a stage: its newest undamaged checkpoint or, with `best`, its best one.

    None without any undamaged checkpoint.
    """
    newest = find_latest_checkpoint(stage_dir)
    if newest is None or not best:
        return newest
    state = read_state(newest)
    named = stage_dir / f"checkpoint-{state.get('best_global_step')}"
    return named if named != newest and find_damage(named) is None else newest


def find_damage(path: Path) -> str | None:
    """What differs from a checkpoint's manifest; None if every file is as written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, digest in manifest.items():
            if digest_file(path / name) != digest:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"it has no {os.path.relpath(error.filename, path)}"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except (ValueError, AttributeError):
        return f"its {MANIFEST} is not a list of files and checksums"
    return None


def find_resume_checkpoint(stage_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint to resume a stage from: none, its newest undamaged one ("auto"), or the named
    one."""
    if resume_from_checkpoint is None:
        return None
    named = Path(resume_from_checkpoint)
    if resume_from_checkpoint == "auto" or named.resolve().parent != stage_dir.resolve():
        return find_latest_checkpoint(stage_dir)
    if (damage := find_damage(named)) is not None:
        raise UsageError(f"resume_from_checkpoint {named}: {damage}; try auto")
    return named


def write_checkpoint(
    stage_dir: Path,
    step: int,
    write: Callable[[Path], None],
    trainer_state: dict[str, Any],
    *,
    world: World,
    save_total_limit: int = 0,
    keep: Path | None = None,
) -> Path:
    """Write `stage_dir/checkpoint-<step>`; a crash leaves earlier checkpoints unchanged.

    Every rank must call it; `write(folder)` writes the model and AdamW's state. Of the checkpoints
    up to this step the newest `save_total_limit` (0: all) and the best one, `keep`, are kept;
    checkpoints of later steps (after a resume from an earlier step) stay. `trainer_state` is JSON.
    Raises CpoFastError when the file system refuses a write.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    target, partial = stage_dir / f"checkpoint-{step}", stage_dir / f".partial-{step}"

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, mode=0o700)

    def finish() -> None:
        _seal(partial, trainer_state)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        _sync(stage_dir)

    try:
        world.on_main(begin)
        write(partial)
        world.on_main(finish)
    except (OSError, SafetensorError, CheckpointException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CpoFastError(
            f"{target} cannot be written ({_cause(error)}); earlier checkpoints are unchanged. "
            f"Free space (save_total_limit) or repair the file system, then {RESUME}"
        ) from error
    if save_total_limit and world.is_main:
        found = list_checkpoints(stage_dir)
        for old in found[: found.index(target) + 1][:-save_total_limit]:
            if old != keep:
                shutil.rmtree(old)
    return target


def _seal(partial: Path, trainer_state: dict[str, Any]) -> None:
    """Write the state and the manifest; sync every file to disk."""
    state = json.dumps(trainer_state, indent=2, allow_nan=False) + "\n"
    (partial / STATE).write_text(state, encoding="utf-8")
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    names = [path for path in files if path.name != CARD]  # the card can be rewritten
    manifest = {str(path.relative_to(partial)): digest_file(path) for path in names}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    folders = sorted({path.parent for path in files})
    for path in (*files, partial / MANIFEST, *folders, partial):
        _sync(path)


def read_state(path: Path) -> dict[str, Any]:
    """trainer_state.json of a checkpoint."""
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def _cause(error: BaseException) -> str:
    """The first line of the error, of the rank that raised it."""
    if failures := getattr(error, "failures", None):  # a CheckpointException of several ranks
        return _cause(next(iter(failures.values()))[0])
    return first_line(error)


def _number(name: str) -> re.Match[str] | None:
    return re.fullmatch(r"checkpoint-(\d+)", name)


def digest_file(path: Path) -> str:
    """SHA-256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

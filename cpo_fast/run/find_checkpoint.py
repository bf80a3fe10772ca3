"""Resolve the model path that a user gives to a checkpoint; torch is not imported."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cpo_fast.errors import UsageError
from cpo_fast.folders import is_of_run, read_object
from cpo_fast.model.lineage import CONFIG, WEIGHTS, is_adapter, lineage
from cpo_fast.training.checkpoint import (
    MANIFEST,
    find_damage,
    find_result_checkpoint,
    list_checkpoints,
)
from cpo_fast.training.stage_settings import TRAINING_STAGES

MERGED = "merged"
"""Folder beside SFT's checkpoints: its adapter merged into the base."""


def find_checkpoint(named: str | Path, flag: str, *, adapter: bool = False) -> Path:
    """The folder of the model or adapter that `named` stands for.

    A model's folder is returned unchanged. A stage's folder (`runs/x/sft`) gives its merged model
    (unless `adapter` is set), else its best checkpoint if the run asked for the best one, else its
    last. Raises UsageError, starting with `flag`, when the folder or checkpoint is missing or
    damaged.
    """
    path = _check_exists(named, flag)
    if not _holds_model(path):
        _check_stage(path, flag)
        return _find_stage_result(path, flag, adapter=adapter)
    if (path / MANIFEST).is_file() and (damage := find_damage(path)):
        raise UsageError(f"{flag} {path} is damaged ({damage}); use another checkpoint")
    return path


def check_named(
    named: str | Path,
    flag: str,
    *,
    adapter: bool = False,
    base_model: str | Path | None = None,
) -> None:
    """UsageError where `find_checkpoint` and `lineage` would find no model. Checks file names only;
    damage is found later, on reading. `adapter`: accept adapters only."""
    path = _check_exists(named, flag)
    if base_model is not None:
        _check_exists(base_model, "--base_model")
    candidates = [path]
    if not _holds_model(path):
        _check_stage(path, flag)
        if _holds_model(path / MERGED) and not adapter:
            return
        # A checkpoint without these files is damaged and skipped.
        needed = (MANIFEST, CONFIG, WEIGHTS)
        found = [p for p in list_checkpoints(path) if adapter or is_adapter(p)]
        candidates = [p for p in found if all((p / name).is_file() for name in needed)][-1:]
        if adapter and not candidates:
            raise UsageError(f"{flag} {path}: it has no complete adapter checkpoint to merge")
    elif adapter and not is_adapter(path):
        raise UsageError(f"{flag} {path}: it has no {CONFIG}, so there is nothing to merge")
    for one in candidates:
        lineage(one, base_model)


def check_unused(run: Path, stages: Iterable[str]) -> None:
    """UsageError where a stage to be trained has checkpoints of an earlier run."""
    for stage in stages:
        if list_checkpoints(run / stage):
            raise UsageError(
                f"{run / stage} holds checkpoints of an earlier run: choose another --output_dir, "
                f"leave {stage} out of --stages, pass --overwrite_output_dir true, or continue "
                "with --resume_from_checkpoint auto"
            )


def _check_exists(named: str | Path, flag: str) -> Path:
    if not Path(named).is_dir():
        raise UsageError(
            f"{flag} {named}: no such model folder; models are read from folders, and nothing is "
            "downloaded"
        )
    return Path(named)


def _holds_model(folder: Path) -> bool:
    file = folder / "config.json"
    return is_adapter(folder) or (file.is_file() and not is_of_run(read_object(file)))


def _is_stage(folder: Path) -> bool:
    return bool(list_checkpoints(folder)) or _holds_model(folder / MERGED)


def _check_stage(folder: Path, flag: str) -> None:
    if stages := [str(folder / name) for name in TRAINING_STAGES if _is_stage(folder / name)]:
        raise UsageError(f"{flag} {folder} is the folder of a run: name {' or '.join(stages)}")
    if not _is_stage(folder):
        raise UsageError(
            f"{flag} {folder}: it has no config.json or {CONFIG}; name a folder that "
            "save_pretrained or a training stage wrote"
        )


def _find_stage_result(folder: Path, flag: str, *, adapter: bool) -> Path:
    if _holds_model(folder / MERGED) and not adapter:
        return folder / MERGED
    found = find_result_checkpoint(folder, best=_wants_best(folder.parent))
    if found is None:
        raise UsageError(f"{flag} {folder}: all its checkpoints are damaged")
    return found


def _wants_best(run: Path) -> bool:
    """Whether the run's stages end with their best checkpoints."""
    return bool(read_object(run / "config.json").get("load_best_model_at_end"))

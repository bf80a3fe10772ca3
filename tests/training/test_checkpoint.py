"""Checkpoints of a stage: which are kept, and how damage is described."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpo_fast.run.arguments import TrainArguments
from cpo_fast.training.checkpoint import (
    find_damage,
    list_checkpoints,
    write_checkpoint,
)
from cpo_fast.training.distributed import World


def write_steps(stage: Path, *steps: int, **options: Any) -> list[str]:
    for step in steps:
        write_checkpoint(stage, step, lambda folder: None, {}, world=World(), **options)
    return [path.name.removeprefix("checkpoint-") for path in list_checkpoints(stage)]


def test_save_total_limit_keeps_checkpoints_of_later_steps(tmp_path: Path) -> None:
    """A run resumed from an earlier step keeps the checkpoints that it writes."""
    assert TrainArguments().save_steps > 0 and TrainArguments().save_total_limit > 0
    assert write_steps(tmp_path, 100, 200, 300) == ["100", "200", "300"]
    assert write_steps(tmp_path, 150, save_total_limit=2) == ["100", "150", "200", "300"]
    assert write_steps(tmp_path, 180, save_total_limit=2) == ["150", "180", "200", "300"]
    best = tmp_path / "checkpoint-150"
    assert write_steps(tmp_path, 200, save_total_limit=1, keep=best) == ["150", "200", "300"]
    assert write_steps(tmp_path, 300, save_total_limit=1) == ["300"]


def test_damage_is_described(tmp_path: Path) -> None:
    write_steps(tmp_path, 1)
    path = tmp_path / "checkpoint-1"
    assert find_damage(path) is None
    (path / "trainer_state.json").unlink()
    assert find_damage(path) == "it has no trainer_state.json"
    (path / "manifest.json").write_text("[1")
    assert find_damage(path) == "its manifest.json is not a list of files and checksums"
    (path / "manifest.json").unlink()
    assert find_damage(path) == "it has no manifest.json"
    assert find_damage(tmp_path / "none") == "it has no manifest.json"

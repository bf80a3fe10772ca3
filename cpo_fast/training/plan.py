"""The steps of a stage: `packing.plan_epoch` for epoch after epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cpo_fast.errors import DataError
from cpo_fast.packing import Step, plan_epoch
from cpo_fast.training.distributed import World
from cpo_fast.training.stage_settings import StageSettings
from cpo_fast.types import PreferenceGroup


def plan_stage(
    settings: StageSettings, groups: Sequence[PreferenceGroup], world: World
) -> tuple[list[Step], float]:
    """This rank's steps of the whole stage, and the number of steps per epoch."""
    per_step = settings.samples_per_step * world.size
    if not groups:
        raise DataError(f"{settings.stage}: no training sample is left; see rejected_records.jsonl")
    first = plan_one_epoch(settings, groups, per_step, world)
    if settings.max_steps > 0:
        wanted = settings.max_steps
    else:
        wanted = max(1, round(settings.num_train_epochs * len(first)))
    steps = list(first)
    epoch = 0
    while len(steps) < wanted:
        epoch += 1
        steps += plan_one_epoch(settings, groups, per_step, world, epoch=epoch)
    return steps[:wanted], float(len(first))


def plan_one_epoch(
    settings: StageSettings,
    groups: Sequence[PreferenceGroup],
    pairs_per_step: int,
    world: World,
    *,
    epoch: int = 0,
    shuffle: bool = True,
) -> list[Step]:
    """This rank's steps of one epoch; without `packing` every group has its own pack."""
    steps = plan_epoch(
        groups,
        pairs_per_step=pairs_per_step,
        packing_length=settings.packing_length,
        seed=settings.seed,
        epoch=epoch,
        rank=world.rank,
        world_size=world.size,
        expand_pairs=settings.expand_pairs,
        shuffle=shuffle,
    )
    if settings.packing:
        return steps
    return [replace(s, packs=tuple((part,) for pack in s for part in pack)) for s in steps]

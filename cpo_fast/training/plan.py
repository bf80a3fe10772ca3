"""The steps of a stage: what `packing.plan_epoch` makes of the flags, epoch after epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cpo_fast.errors import DataError
from cpo_fast.packing import Step, plan_epoch
from cpo_fast.run.arguments import TrainArguments
from cpo_fast.training.distributed import World
from cpo_fast.types import PreferenceGroup


def stage_steps(
    args: TrainArguments, stage: str, groups: Sequence[PreferenceGroup], world: World
) -> tuple[list[Step], float]:
    """This rank's steps of the whole stage, and how many of them make an epoch."""
    settings = args.of_stage(stage)
    per_step = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    per_step *= world.size
    if not groups:
        raise DataError(f"{stage}: no training sample is left; see rejected_records.jsonl")
    first = epoch_steps(args, groups, per_step, world)
    if settings["max_steps"] > 0:
        wanted = settings["max_steps"]
    else:
        wanted = max(1, round(settings["num_train_epochs"] * len(first)))
    steps = list(first)
    epoch = 0
    while len(steps) < wanted:
        epoch += 1
        steps += epoch_steps(args, groups, per_step, world, epoch=epoch)
    return steps[:wanted], float(len(first))


def epoch_steps(
    args: TrainArguments,
    groups: Sequence[PreferenceGroup],
    pairs_per_step: int,
    world: World,
    *,
    epoch: int = 0,
    shuffle: bool = True,
) -> list[Step]:
    """One epoch's steps; without `--packing` every study is a pack of its own."""
    steps = plan_epoch(
        groups,
        pairs_per_step=pairs_per_step,
        packing_length=args.packing_length,
        seed=args.seed,
        epoch=epoch,
        rank=world.rank,
        world_size=world.size,
        expand_pairs=args.expand_pairs,
        shuffle=shuffle,
    )
    if args.packing:
        return steps
    return [replace(s, packs=tuple((part,) for pack in s for part in pack)) for s in steps]

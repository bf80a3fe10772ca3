"""`--dry_run`: steps, memory and time of a run, from its plan and a few timed packs."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from cpo_fast.counting import counted
from cpo_fast.model.checkpoint import default_device
from cpo_fast.model.packed import PackedModel
from cpo_fast.packing import Step
from cpo_fast.packing.plan import Pack, part_tokens
from cpo_fast.run.context import RunContext
from cpo_fast.run.samples import Samples
from cpo_fast.run.stages import build_cpo_models, build_cpo_objective, build_sft
from cpo_fast.training.bar import format_duration
from cpo_fast.training.clock import Clock, peak_memory
from cpo_fast.training.feed import StepFeed
from cpo_fast.training.interrupt import Interrupted
from cpo_fast.training.objectives import Objective
from cpo_fast.training.plan import plan_stage
from cpo_fast.training.sharding import is_sharded
from cpo_fast.training.state import StageState
from cpo_fast.training.step import Stepper
from cpo_fast.types import PreferenceGroup

ENOUGH_SECONDS = 3.0  # timing stops after this time


def dry_run(run: RunContext, samples: Samples) -> dict[str, Any]:
    """Print the plan of every training stage of the run, and return the plans by stage.

    Without an SFT model CPO is tried from the base, which has the same size. The time does not
    include the reference's pass of `precompute_ref_log_probs`.
    """
    plans: dict[str, Any] = {}
    for stage in run.args.trained_stages:
        groups = (samples.sft if stage == "sft" else samples.cpo)["train"]
        plans[stage] = plan = _try_stage(run, stage, groups)
        print("\n".join(_format_plan(run.args.packing_length, stage, plan)))
    print("dry run: nothing was written")
    return plans


def _try_stage(run: RunContext, stage: str, groups: Sequence[PreferenceGroup]) -> dict[str, Any]:
    args, world, settings = run.args, run.world, run.args.stage_settings(stage)
    steps, per_epoch = plan_stage(settings, groups, world)
    own_tokens = sum(map(partial(_count_tokens, groups), steps))
    physical, packs = world.sum([own_tokens, _count_packs(steps)])
    samples = sum(step.num_pairs for step in steps)
    plan: dict[str, Any] = {
        "steps": len(steps),
        "steps_per_epoch": per_epoch,
        "samples": samples,
        "packs": round(packs),
        "physical_tokens": round(physical),
    }
    packed, objective = _build_stage(run, stage, groups)
    if args.precompute_ref_log_probs and stage == "cpo":
        groups = [replace(g, ref_logps=(0.0,) * (1 + len(g.rejected))) for g in groups]
    clock = Clock(world)
    sharded = is_sharded(list(packed.model.parameters()))
    state = StageState(
        settings, packed.model, len(steps), sharded=sharded, world=world, clock=clock
    )
    stepper = Stepper(
        stage, packed, objective, state.optimizer, groups[0], default_device(), clock,
        max_grad_norm=args.max_grad_norm, stop=run.stop, world=world,
    )  # fmt: skip
    packed.model.train()
    tried = _choose_packs(groups, [pack for step in steps for pack in step if pack])
    longest = max(world.gather(max(map(partial(_count_pack_tokens, groups), tried))))
    if world.is_main:
        print(
            f"{stage}: timing a few packs, the longest has {counted(longest, 'token')}",
            file=sys.stderr,
        )
    trials = [Step((pack,), sum(max(1, len(which)) for _, which in pack)) for pack in tried]
    checkpoint = run.checkpoint
    feed = StepFeed(groups, trials, checkpoint.pixels, checkpoint.image_token_id)
    seconds = updates = 0.0
    tokens = timed = 0
    for index, pack in enumerate(tried):
        begun, updated = time.perf_counter(), clock.seconds("optimiser")
        stepper(index + 1, feed[index], partial(feed.halve, index))
        if stepper.should_stop(together=True):
            raise Interrupted("the dry run was stopped; there is nothing to resume")
        if index:  # the first one warms up
            update = clock.seconds("optimiser") - updated
            updates += update
            seconds += time.perf_counter() - begun - update
            tokens += _count_pack_tokens(groups, pack)
            timed += 1
            if world.any(seconds + updates > ENOUGH_SECONDS):
                break
    expected = seconds / max(tokens, 1) * own_tokens + updates / timed * len(steps)
    plan |= {"timed_packs": timed, "timed_tokens": tokens, "longest_pack": longest}
    plan |= {
        "seconds": max(world.gather(expected)),
        "memory": {
            "weights": sum(map(_count_bytes, packed.model.parameters())),
            "gradients": sum(map(_count_bytes, state.names)),
            "optimizer": sum(map(_count_bytes, state.optimizer_tensors().values())),
            "peak": max(world.gather(peak_memory())),
        },
    }
    return plan


def _build_stage(
    run: RunContext, stage: str, groups: Sequence[PreferenceGroup]
) -> tuple[PackedModel, Objective]:
    if stage == "sft":
        return build_sft(run, None)
    packed, reference = build_cpo_models(run, None)
    if run.args.precompute_ref_log_probs:
        reference = None
    return packed, build_cpo_objective(run, packed, reference, groups)


def _format_plan(packing_length: int, stage: str, plan: dict[str, Any]) -> list[str]:
    memory = {name: _format_size(value) for name, value in plan["memory"].items()}
    what = "sample" if stage == "sft" else "pair"
    where = "GPU" if torch.cuda.is_available() else "process"
    fill = plan["physical_tokens"] / max(plan["packs"], 1) / packing_length
    return [
        f"{stage}: {counted(plan['steps'], 'step')} ({plan['steps_per_epoch']:g} an epoch), "
        f"{counted(plan['samples'], what)}, {counted(plan['packs'], 'pack')}, "
        f"{counted(plan['physical_tokens'], 'token')}; on average {fill:.0%} of --packing_length "
        f"{packing_length} is filled, the longest pack has "
        f"{counted(plan['longest_pack'], 'token')}",
        f"{stage}: memory per {where}: weights {memory['weights']}, gradients "
        f"{memory['gradients']}, AdamW {memory['optimizer']}; peak with the longest pack "
        f"{memory['peak']}",
        f"{stage}: about {format_duration(plan['seconds'])}, estimated for the training steps from "
        f"{counted(plan['timed_packs'], 'timed pack')} with "
        f"{counted(plan['timed_tokens'], 'token')}; evaluation and checkpoints take extra time",
    ]


def _format_size(count: int) -> str:
    """Bytes in the largest binary unit that fits."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def _count_tokens(groups: Sequence[PreferenceGroup], step: Step) -> int:
    return sum(_count_pack_tokens(groups, pack) for pack in step)


def _count_packs(steps: Sequence[Step]) -> int:
    return sum(bool(pack) for step in steps for pack in step)


def _choose_packs(groups: Sequence[PreferenceGroup], packs: Sequence[Pack]) -> list[Pack]:
    """The packs to time: the shortest sample, as a warm-up that creates the optimiser state; the
    longest pack, which has the peak memory; then typical packs, the median first."""
    if not packs:
        return [()] * 6  # a rank without work takes as many steps as the others
    shortest = min((part for pack in packs for part in pack), key=partial(part_tokens, groups))
    ranked = sorted(packs, key=partial(_count_pack_tokens, groups))
    last = len(ranked) - 1
    return [(shortest,), *(ranked[round(share * last)] for share in (1.0, 0.5, 0.75, 0.25, 0.9))]


def _count_pack_tokens(groups: Sequence[PreferenceGroup], pack: Pack) -> int:
    return sum(part_tokens(groups, part) for part in pack)


def _count_bytes(tensor: torch.Tensor) -> int:
    """Bytes of this process's part."""
    own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own.numel() * own.element_size()

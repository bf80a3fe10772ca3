"""`--dry_run`: what a run would do and take, from its plan and a few steps on throw-away state."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from cpo_fast.model.packed import PackedModel
from cpo_fast.packing import Step, image_token_id
from cpo_fast.packing.plan import part_tokens
from cpo_fast.training.arguments import TrainArguments
from cpo_fast.training.bar import duration
from cpo_fast.training.base import Base
from cpo_fast.training.clock import Clock, peak_memory
from cpo_fast.training.feed import StepFeed
from cpo_fast.training.interrupt import Interrupted, StopRequest
from cpo_fast.training.objectives import Objective
from cpo_fast.training.plan import stage_steps
from cpo_fast.training.run_folder import RunFolder
from cpo_fast.training.samples import Samples
from cpo_fast.training.sharding import is_sharded
from cpo_fast.training.stages import cpo_models, cpo_objective, device, sft_parts
from cpo_fast.training.state import StageState
from cpo_fast.training.step import Stepper
from cpo_fast.types import PreferenceGroup

TIMED_STEPS = 3
ENOUGH_SECONDS = 120.0  # of timed steps; long ones are not timed three times
GIB = 2**30


def dry_run(
    args: TrainArguments, folder: RunFolder, samples: Samples, base: Base, stop: StopRequest
) -> dict[str, Any]:
    """Print the plan of every training stage that is asked for, and return it by stage.

    CPO is tried out from the base where there is no SFT model yet: it has the same size. With
    `--precompute_ref_log_probs` the references' pass over the data is not in the time.
    """
    plans: dict[str, Any] = {}
    for stage in ("sft", "cpo"):
        if stage in args.stage_names:
            groups = (samples.sft if stage == "sft" else samples.cpo)["train"]
            plans[stage] = plan = _plan(args, folder, stage, groups, base, stop)
            print("\n".join(_lines(args, stage, plan)))
    print("dry run: nothing was written")
    return plans


def _plan(
    args: TrainArguments,
    folder: RunFolder,
    stage: str,
    groups: Sequence[PreferenceGroup],
    base: Base,
    stop: StopRequest,
) -> dict[str, Any]:
    world = folder.world
    steps, per_epoch = stage_steps(args, stage, groups, world)
    physical, packs = world.sum([sum(map(partial(_tokens, groups), steps)), _count(steps)])
    samples = sum(step.num_pairs for step in steps)
    plan: dict[str, Any] = {
        "steps": len(steps),
        "steps_per_epoch": per_epoch,
        "samples": samples,
        "packs": round(packs),
        "physical_tokens": round(physical),
    }
    packed, objective = _parts(args, folder, stage, base, groups)
    if args.precompute_ref_log_probs and stage == "cpo":
        groups = [replace(g, ref_logps=(0.0,) * (1 + len(g.rejected))) for g in groups]
    clock = Clock(world)
    sharded = is_sharded(list(packed.model.parameters()))
    state = StageState(
        args, stage, packed.model, len(steps), sharded=sharded, world=world, clock=clock
    )
    stepper = Stepper(
        stage, packed, objective, state.optimizer, groups[0], device(), clock,
        max_grad_norm=args.max_grad_norm, stop=stop, world=world,
    )  # fmt: skip
    packed.model.train()
    heaviest = max(range(len(steps)), key=lambda i: _heaviest(groups, steps[i]))
    heaviest = round(max(world.gather(heaviest)))
    tried = [heaviest, *range(min(TIMED_STEPS, len(steps)))]
    feed = StepFeed(groups, [steps[i] for i in tried], base.pixels, image_token_id(base.tokenizer))
    seconds = tokens = 0.0
    for index in range(len(tried)):
        begun = time.perf_counter()
        stepper(index + 1, feed[index], partial(feed.halved, index))
        if stepper.stopping(together=True):
            raise Interrupted("the dry run was stopped; there is nothing to go on from")
        if index:  # the first one warms up
            seconds += time.perf_counter() - begun
            tokens += _tokens(groups, steps[tried[index]])
            plan["timed_steps"] = index
            if world.any(seconds > ENOUGH_SECONDS):
                break
    all_tokens = sum(map(partial(_tokens, groups), steps))
    share = max(world.gather(seconds / max(tokens, 1.0) * all_tokens))
    plan |= {
        "seconds": share,
        "longest_pack": max(world.gather(max(_heaviest(groups, step) for step in steps))),
        "memory": {
            "weights": sum(map(_bytes, packed.model.parameters())),
            "gradients": sum(map(_bytes, state.names)),
            "optimizer": sum(map(_bytes, state.optimizer_tensors().values())),
            "peak": max(world.gather(peak_memory())),
        },
    }
    return plan


def _parts(
    args: TrainArguments,
    folder: RunFolder,
    stage: str,
    base: Base,
    groups: Sequence[PreferenceGroup],
) -> tuple[PackedModel, Objective]:
    if stage == "sft":
        return sft_parts(args, folder, base, None)
    packed, reference = cpo_models(args, folder, base, None)
    if args.precompute_ref_log_probs:
        reference = None
    return packed, cpo_objective(args, packed, reference, groups)


def _lines(args: TrainArguments, stage: str, plan: dict[str, Any]) -> list[str]:
    memory = {name: f"{value / GIB:.2f} GiB" for name, value in plan["memory"].items()}
    what = "samples" if stage == "sft" else "pairs"
    where = "GPU" if torch.cuda.is_available() else "process"
    fill = plan["physical_tokens"] / max(plan["packs"], 1) / args.packing_length
    return [
        f"{stage}: {plan['steps']} steps ({plan['steps_per_epoch']:g} an epoch), {plan['samples']} "
        f"{what}, {plan['packs']} packs, {plan['physical_tokens']} tokens; packs are {fill:.0%} of "
        f"--packing_length {args.packing_length}, the longest {plan['longest_pack']} tokens",
        f"{stage}: memory per {where}: weights {memory['weights']}, gradients "
        f"{memory['gradients']}, AdamW {memory['optimizer']}; peak with the longest pack "
        f"{memory['peak']}",
        f"{stage}: about {duration(plan['seconds'])}, by the tokens of {plan['timed_steps']} timed "
        "steps; evaluation and checkpoints come on top",
    ]


def _tokens(groups: Sequence[PreferenceGroup], step: Step) -> int:
    return sum(part_tokens(groups, part) for pack in step for part in pack)


def _count(steps: Sequence[Step]) -> int:
    return sum(bool(pack) for step in steps for pack in step)


def _heaviest(groups: Sequence[PreferenceGroup], step: Step) -> int:
    return max((sum(part_tokens(groups, part) for part in pack) for pack in step), default=0)


def _bytes(tensor: torch.Tensor) -> int:
    """Of this process's part."""
    own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own.numel() * own.element_size()

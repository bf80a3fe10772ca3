"""Score preference pairs with a model and, if it has one, its reference model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from cpo_fast.evaluation.preference import summarize_both_models, summarize_likelihood
from cpo_fast.loss.options import LOSS_TYPES
from cpo_fast.model.checkpoint import Checkpoint
from cpo_fast.packing import plan_epoch
from cpo_fast.training.feed import StepFeed, load_steps
from cpo_fast.training.objectives import CPOObjective
from cpo_fast.types import PreferenceGroup, RejectedRecord


def compare_pairs(
    objective: CPOObjective,
    checkpoint: Checkpoint,
    groups: Sequence[PreferenceGroup],
    *,
    names: tuple[str, str],
    beta: float,
    packing_length: int,
    seed: int,
) -> tuple[dict[str, dict[str, Any]], list[RejectedRecord]]:
    """({name: preference figures}, rejected groups whose image failed).

    `names`: of the model and of its reference; an objective without a reference gives the figures
    of the model's log-probs only. The figures are empty if no group is left.
    """
    scored, failed = score_pairs(objective, checkpoint, groups, packing_length=packing_length)
    if not scored:
        return {}, failed
    if LOSS_TYPES[objective.loss_type].reference:
        of_model, of_reference = summarize_both_models(scored, beta=beta, seed=seed)
        return {names[0]: of_model, names[1]: of_reference}, failed
    own = (scored["policy_chosen"], scored["policy_rejected"])
    of_pairs = {name: scored[name] for name in ("groups", "sources")}
    return {names[0]: summarize_likelihood(*own, **of_pairs, seed=seed)}, failed


@torch.no_grad()
def score_pairs(
    objective: CPOObjective,
    checkpoint: Checkpoint,
    groups: Sequence[PreferenceGroup],
    *,
    packing_length: int,
) -> tuple[dict[str, Any], list[RejectedRecord]]:
    """(columns of P pairs for `summarize_preference`, rejected groups whose image failed).

    Columns: "policy_"/"reference_" x "chosen"/"rejected", log-probs summed over an answer (zeros
    for a loss without a reference), "sources", and "groups", the group id of each pair. There are
    no columns if no pair is left.
    """
    steps = plan_epoch(
        groups, pairs_per_step=64, packing_length=packing_length, seed=0, epoch=0, shuffle=False
    )
    feed = StepFeed(groups, steps, checkpoint.pixels, checkpoint.image_token_id, "evaluate")
    failed: dict[tuple[str, Any], RejectedRecord] = {}
    found: dict[str, list[Any]] = defaultdict(list)
    device = objective.model.model.device
    for step in tqdm(
        load_steps(feed, num_workers=0), total=len(feed), desc="rewards", unit="step", disable=None
    ):
        failed |= {(one.id, one.line): one for one in step.rejected}
        for batch in step.batches:
            out = objective.score(batch.to(device))
            chosen, rejected = batch.pairs.unbind(1)
            for name, values in (("policy", out.logps), ("reference", out.ref_logps)):
                found[f"{name}_chosen"] += values[chosen].tolist()
                found[f"{name}_rejected"] += values[rejected].tolist()
            names = [batch.segment_names[index] for index in chosen.tolist()]
            found["sources"] += batch.pair_sources
            found["groups"] += [name.rsplit("/", 1)[0] for name in names]
    return dict(found), list(failed.values())

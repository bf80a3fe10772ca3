"""Log-probs of whole pairs without gradients: what the evaluation of preferences is made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from cpo_fast.packing import image_token_id, plan_epoch
from cpo_fast.training.feed import StepFeed, step_loader
from cpo_fast.training.objectives import CPOObjective
from cpo_fast.types import Pixels, PreferenceGroup, RejectedRecord


@torch.no_grad()
def score_pairs(
    objective: CPOObjective,
    groups: Sequence[PreferenceGroup],
    pixels: Pixels | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    packing_length: int,
    device: torch.device,
) -> tuple[dict[str, Any], list[RejectedRecord]]:
    """(what `evaluation.preference` takes of P pairs, the groups left out).

    That is "policy_"/"reference_" x "chosen"/"rejected", log-probs summed over an answer (zeros for
    a loss without a reference), "sources", and "groups", the ids of the pairs' groups; all empty
    where no pair is left. A group whose image cannot be read is left out and listed.
    """
    steps = plan_epoch(
        groups, pairs_per_step=64, packing_length=packing_length, seed=0, epoch=0, shuffle=False
    )
    feed = StepFeed(groups, steps, pixels, image_token_id(tokenizer), "evaluate")
    failed: dict[tuple[str, Any], RejectedRecord] = {}
    found: dict[str, list[Any]] = defaultdict(list)
    for step in tqdm(
        step_loader(feed, num_workers=0), total=len(feed), desc="rewards", unit="step", disable=None
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

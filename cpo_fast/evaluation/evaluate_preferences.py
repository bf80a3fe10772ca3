"""`python -m cpo_fast.evaluate` on a preference file: does the model prefer the chosen answers?

By its own log-probs, and, for an adapter, by its rewards against the model below it, whose own
log-probs stand beside them as "reference".
"""

from __future__ import annotations

import argparse
from typing import Any

from cpo_fast.counting import counted
from cpo_fast.errors import DataError
from cpo_fast.evaluation.cohort import Cohort, Loaded


def evaluate_preferences(args: argparse.Namespace, loaded: Loaded) -> tuple[dict[str, Any], Cohort]:
    """(`evaluation` of summary.json, what was read). All rows of the file are used, up to
    `--max_samples`, whatever they were used for before. Raises DataError where no pair is left.
    """
    from cpo_fast.data import open_preferences
    from cpo_fast.evaluation.preference import both_models, more_likely
    from cpo_fast.model.packed import PackedModel
    from cpo_fast.packing import encode_all
    from cpo_fast.training.objectives import CPOObjective
    from cpo_fast.training.pairs import score_pairs

    source = open_preferences(
        args.dataset, dataset_format=args.dataset_format, image_root=args.image_root
    )
    records = list(source)
    paired = [one for one in records if one.rejected]
    used = paired[: args.max_samples]
    if not used:
        raise DataError(f"{args.dataset}: no record has a rejected answer to compare with")
    encoded = encode_all(
        used,
        loaded.tokenizer,
        loaded.images.grid if loaded.images else None,
        max_length=args.max_length,
        file=args.dataset,
        stage="evaluate",
    )
    packed = PackedModel(loaded.model.eval())
    adapted = hasattr(loaded.model, "peft_config")
    # A whole model has nothing below it to compare with: simpo asks for no reference.
    objective = CPOObjective(packed, loss_type="sigmoid" if adapted else "simpo")
    scored, failed = score_pairs(
        objective,
        encoded.groups,
        loaded.pixels,
        loaded.tokenizer,
        packing_length=args.packing_length,
        device=loaded.model.device,
    )
    if not scored:
        raise DataError(
            f"evaluation: no pair of {counted(len(encoded.groups), 'record')} could be read"
        )
    if adapted:
        of_model, below = both_models(scored, beta=args.beta, seed=args.seed)
        figures = {loaded.name: of_model, "reference": below}
    else:
        own = (scored["policy_chosen"], scored["policy_rejected"])
        of_pairs = {name: scored[name] for name in ("groups", "sources")}
        figures = {loaded.name: more_likely(*own, **of_pairs, seed=args.seed)}
    cohort = Cohort([], [], [], [], source.read, [*source.rejected, *encoded.rejected, *failed])
    cohort.scored = len(encoded.groups) - len(failed)
    cohort.left_out = len(records) - len(used)
    return {"preference": figures}, cohort

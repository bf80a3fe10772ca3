"""Evaluate a model on a preference file: how often it prefers the chosen answers.

Measured by the model's log-probs and, for an adapter, by rewards relative to its base model, whose
log-probs are listed as "reference".
"""

from __future__ import annotations

from typing import Any

from cpo_fast.counting import counted
from cpo_fast.data import open_preferences
from cpo_fast.errors import DataError
from cpo_fast.evaluation.cohort import Cohort
from cpo_fast.evaluation.pairs import compare_pairs
from cpo_fast.evaluation.suites import Options
from cpo_fast.model.checkpoint import Checkpoint
from cpo_fast.model.packed import PackedModel
from cpo_fast.packing import encode_all
from cpo_fast.training.objectives import CPOObjective


def evaluate_preference_file(
    name: str,
    model: Any,
    checkpoint: Checkpoint,
    options: Options,
    *,
    file: str,
    dataset_format: str = "auto",
    image_root: str | None = None,
    beta: float = 0.1,
    max_samples: int | None = None,
    max_length: int = 4096,
) -> tuple[dict[str, Any], Cohort]:
    """(`evaluation` of summary.json, counts of records) for the first `max_samples` rows with a
    rejected answer. Raises DataError if no pair is left.
    """
    source = open_preferences(file, dataset_format=dataset_format, image_root=image_root)
    records = list(source)
    used = [one for one in records if one.rejected][:max_samples]
    if not used:
        raise DataError(f"{file}: no record has a rejected answer")
    encoded = encode_all(
        used,
        checkpoint.tokenizer,
        checkpoint.images.grid if checkpoint.images else None,
        max_length=max_length,
        file=file,
        stage="evaluate",
    )
    packed = PackedModel(model.eval())
    has_adapter = hasattr(model, "peft_config")
    # A whole model has no base to compare with: simpo needs no reference.
    objective = CPOObjective(packed, loss_type="sigmoid" if has_adapter else "simpo")
    figures, failed = compare_pairs(
        objective,
        checkpoint,
        encoded.groups,
        names=(name, "reference"),
        beta=beta,
        packing_length=options.packing_length,
        seed=options.seed,
    )
    if not figures:
        raise DataError(
            f"evaluation: no pair of {counted(len(encoded.groups), 'record')} could be read"
        )
    rejected = [*source.rejected, *encoded.rejected, *failed]
    cohort = Cohort(read=source.read, rejected=rejected)
    cohort.scored = len(encoded.groups) - len(failed)
    cohort.left_out = len(records) - len(used)
    return {"preference": figures}, cohort

"""The suites of one model on a cohort: generated answers, zero-shot scores, drift probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from cpo_fast.concepts import load_graph
from cpo_fast.counting import counted
from cpo_fast.data.labels import LABEL_NAMES
from cpo_fast.errors import DataError, RecordError
from cpo_fast.evaluation.classification import auc
from cpo_fast.evaluation.cohort import Cohort
from cpo_fast.evaluation.drift import (
    drift_example,
    drift_figures,
    find_swaps,
    own_thought,
    probe,
    swap_effects,
)
from cpo_fast.evaluation.generate import diagnose
from cpo_fast.evaluation.likelihood import (
    after_thought,
    finding_candidates,
    finding_distribution,
    score_answers,
)
from cpo_fast.evaluation.text import thought_of
from cpo_fast.model.checkpoint import Checkpoint
from cpo_fast.model.packed import PackedModel


@dataclass(frozen=True)
class Options:
    """Settings of an evaluation. `suites` has any of "classification", "report", "zero_shot" and
    "drift"; sizes are in tokens and studies.
    """

    suites: tuple[str, ...] = ("classification", "report")
    split: str = "test"
    max_new_tokens: int = 256
    batch_size: int = 32
    packing_length: int = 4096
    drift_samples: int = 32
    num_examples: int = 4
    bootstrap: int = 1000
    seed: int = 42


def generate_answers(
    name: str, model: Any, checkpoint: Checkpoint, cohort: Cohort, options: Options
) -> tuple[list[str], list[int]]:
    """(The model's answers, indices of their studies). Studies whose image fails are dropped from
    `cohort`; DataError when none is left.
    """
    failed: dict[int, RecordError] = {}
    answers = diagnose(
        model,
        checkpoint.tokenizer,
        cohort.prompts,
        checkpoint.pixels,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        failed=failed,
        description=f"answers of {name}",
    )
    kept = cohort.drop(failed)
    return [answers[i] for i in kept], kept


def score_zero_shot(
    model: Any,
    checkpoint: Checkpoint,
    cohort: Cohort,
    answers: Sequence[str],
    options: Options,
    *,
    findings: Sequence[str] = LABEL_NAMES,
) -> dict[str, Any]:
    """AUC per finding from the likelihood of its sentence after the model's own thought; intervals
    by bootstrap over patients.

    A study whose image fails is rejected for this suite. Raises DataError if all fail.
    """
    prompts = [
        after_thought(prompt, checkpoint.tokenizer, thought_of(answer))
        for prompt, answer in zip(cohort.prompts, answers, strict=True)
    ]
    failed: dict[int, RecordError] = {}
    scores = score_answers(
        PackedModel(model),
        prompts,
        finding_candidates(checkpoint.tokenizer, findings),
        checkpoint.pixels,
        image_token_id=checkpoint.image_token_id,
        packing_length=options.packing_length,
        failed=failed,
    )
    cohort.rejected += [
        cohort.make_rejected_record(i, error, "zero_shot") for i, error in failed.items()
    ]
    read = [i for i in range(len(prompts)) if i not in failed]
    if not read:
        raise DataError(
            f"zero_shot: no sample of {counted(len(prompts), 'study', 'studies')} could be read"
        )
    return auc(
        [cohort.truth[i] for i in read],
        finding_distribution(scores[read]).numpy(),
        findings=findings,
        patients=[cohort.studies[i].patient_id for i in read],
        seed=options.seed,
    )


def probe_drift(
    name: str,
    model: Any,
    checkpoint: Checkpoint,
    cohort: Cohort,
    answers: Sequence[str],
    options: Options,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The drift probe and swaps on the model's own thoughts: (figures, examples for the page).

    Answers without a thought are counted and left out. Raises DataError if none has a thought.
    """
    packed, graph = PackedModel(model), load_graph()
    drifts, effects = [], []
    examples: list[dict[str, Any]] = []
    studies = list(zip(cohort.studies, cohort.prompts, map(own_thought, answers), strict=True))
    studies = studies[: options.drift_samples]
    without = sum(not thought for *_, thought in studies)
    if without == len(studies):
        raise DataError(
            f"suite drift: none of {counted(without, 'answer')} of {name} has a thought "
            "(<think> ... </think>); leave drift out, or use a model trained on thoughts"
        )
    if without:
        answered = counted(len(studies), "answer")
        print(f"drift: {without} of {answered} left out: no thought")
    image = checkpoint.image_token_id
    for index, (study, prompt, thought) in enumerate(
        tqdm(studies, desc="drift", unit="study", disable=None)
    ):
        if not thought:
            continue
        about = (packed, checkpoint.tokenizer, prompt, thought)
        swaps = find_swaps(thought, graph)
        try:
            moved = probe(*about, checkpoint.pixels, image_token_id=image)
            end, found = swap_effects(*about, swaps, checkpoint.pixels, image_token_id=image)
        except RecordError as error:  # the image was readable when the answers were generated
            cohort.rejected.append(cohort.make_rejected_record(index, error, "drift"))
            continue
        drifts.append(moved)
        effects += found
        if len(examples) < options.num_examples:
            shown = drift_example(study.study_id, drifts[-1], end, found)
            examples.append({"model": name} | shown)
    return drift_figures(drifts, effects) | {"without_thought": without}, examples

"""Who is asked, by whom: a loaded model, the studies of a data set, and the two ways of asking."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpo_fast.data.labels import LABEL_NAMES

if TYPE_CHECKING:
    from cpo_fast.model.images import ImageProcessor
    from cpo_fast.types import Preference, Prompt, RejectedRecord, Study


@dataclass
class Loaded:
    """A model with what it needs to be asked."""

    name: str
    model: Any
    tokenizer: Any
    images: ImageProcessor | None

    @property
    def pixels(self) -> Any:
        return self.images.pixels if self.images else None

    def prompt(self, asked: Preference, *, max_length: int) -> Prompt:
        """`asked` tokenised. Its images are decoded once here, so that a damaged one is a
        RecordError of its study and does not end the run later.
        """
        from cpo_fast.packing import encode

        grid = self.images.grid if self.images else None
        prompt = encode(asked, self.tokenizer, grid, max_length=max_length).prompt
        if self.images is not None:
            for image in asked.images:
                self.images.pixels(image)
        return prompt


@dataclass
class Cohort:
    """The studies to be asked about with their prompts and true names, and what was set aside."""

    studies: list[Study]
    prompts: list[Prompt]
    truth: list[tuple[str, ...]]
    training_truth: list[tuple[str, ...]]
    read: int
    rejected: list[RejectedRecord]


def diagnose_cohort(args: argparse.Namespace, loaded: Loaded, cohort: Cohort) -> list[str]:
    """The model's answer to every prompt of the cohort."""
    from cpo_fast.evaluation.generate import diagnose

    return diagnose(
        loaded.model,
        loaded.tokenizer,
        cohort.prompts,
        loaded.pixels,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
    )


def zero_shot(
    args: argparse.Namespace,
    loaded: Loaded,
    cohort: Cohort,
    answers: Sequence[str],
    *,
    findings: Sequence[str] = LABEL_NAMES,
    patients: Sequence[str] | None = None,
) -> dict[str, Any]:
    """AUC per finding: the likelihood of its sentence after the model's own thought."""
    from cpo_fast.evaluation.classification import auc
    from cpo_fast.evaluation.likelihood import (
        after_thought,
        finding_candidates,
        finding_distribution,
        score_answers,
    )
    from cpo_fast.evaluation.text import thought_of
    from cpo_fast.model.packed import PackedModel
    from cpo_fast.packing import image_token_id

    prompts = [
        after_thought(prompt, loaded.tokenizer, thought_of(answer))
        for prompt, answer in zip(cohort.prompts, answers, strict=True)
    ]
    scores = score_answers(
        PackedModel(loaded.model),
        prompts,
        finding_candidates(loaded.tokenizer, findings),
        loaded.pixels,
        image_token_id=image_token_id(loaded.tokenizer),
        packing_length=args.packing_length,
    )
    likelihoods = finding_distribution(scores).numpy()
    return auc(cohort.truth, likelihoods, findings=findings, patients=patients, seed=args.seed)

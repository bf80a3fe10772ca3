"""Who is asked, by whom: a loaded model, the studies of a data set, and the two ways of asking."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpo_fast.counting import counted
from cpo_fast.data.labels import LABEL_NAMES
from cpo_fast.errors import DataError, RecordError
from cpo_fast.types import RejectedRecord

if TYPE_CHECKING:
    from cpo_fast.model.images import ImageProcessor
    from cpo_fast.types import Preference, Prompt, Study


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
        from cpo_fast.packing.readable import decode

        grid = self.images.grid if self.images else None
        prompt = encode(asked, self.tokenizer, grid, max_length=max_length).prompt
        decode([prompt], self.pixels, {})
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
    left_out: int = 0  # records of other splits, or beyond --max_samples
    scored: int | None = None  # records of a preference file, which has no studies

    @property
    def used(self) -> int:
        return len(self.studies) if self.scored is None else self.scored

    def drop(self, failed: Mapping[int, RecordError]) -> None:
        """Set aside the studies of these numbers. Raises DataError when none is left."""
        for number, error in failed.items():
            self.rejected.append(self.named(number, error))
        if failed and len(failed) == len(self.studies):
            raise DataError(
                "no sample could be read: an image fails in each of "
                f"{counted(len(failed), 'study', 'studies')}, the first: "
                f"{next(iter(failed.values()))}"
            )
        read = [i for i in range(len(self.studies)) if i not in failed]
        self.studies = [self.studies[i] for i in read]
        self.prompts = [self.prompts[i] for i in read]
        self.truth = [self.truth[i] for i in read]

    def named(self, number: int, error: RecordError, stage: str = "") -> RejectedRecord:
        study = self.studies[number]
        return RejectedRecord.of(study.study_id, study.origin, error, stage=stage)


def diagnose_cohort(args: argparse.Namespace, loaded: Loaded, cohort: Cohort) -> list[str]:
    """The model's answer to every prompt of the cohort. A study whose image cannot be read any more
    is set aside; DataError when none is left.
    """
    from cpo_fast.evaluation.generate import diagnose

    failed: dict[int, RecordError] = {}
    answers = diagnose(
        loaded.model,
        loaded.tokenizer,
        cohort.prompts,
        loaded.pixels,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        failed=failed,
    )
    cohort.drop(failed)
    return [answer for i, answer in enumerate(answers) if i not in failed]


def zero_shot(
    args: argparse.Namespace,
    loaded: Loaded,
    cohort: Cohort,
    answers: Sequence[str],
    *,
    findings: Sequence[str] = LABEL_NAMES,
    patients: Sequence[str] | None = None,
) -> dict[str, Any]:
    """AUC per finding: the likelihood of its sentence after the model's own thought.

    A study whose image cannot be read any more is left out of these figures; DataError when none is
    left.
    """
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
    failed: dict[int, RecordError] = {}
    scores = score_answers(
        PackedModel(loaded.model),
        prompts,
        finding_candidates(loaded.tokenizer, findings),
        loaded.pixels,
        image_token_id=image_token_id(loaded.tokenizer),
        packing_length=args.packing_length,
        failed=failed,
    )
    cohort.rejected += [cohort.named(i, error, "zero_shot") for i, error in failed.items()]
    read = [i for i in range(len(prompts)) if i not in failed]
    if not read:
        raise DataError(
            f"zero_shot: no sample of {counted(len(prompts), 'study', 'studies')} could be read"
        )
    return auc(
        [cohort.truth[i] for i in read],
        finding_distribution(scores[read]).numpy(),
        findings=findings,
        patients=[patients[i] for i in read] if patients else None,
        seed=args.seed,
    )

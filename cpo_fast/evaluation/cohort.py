"""The studies of an evaluation with prompts and true findings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from tqdm import tqdm

from cpo_fast.counterfactual import build_sft_preference, study_labels
from cpo_fast.counting import counted
from cpo_fast.data import open_studies
from cpo_fast.data.labels import diagnosis
from cpo_fast.errors import DataError, RecordError
from cpo_fast.types import Prompt, RejectedRecord, Study

if TYPE_CHECKING:
    from cpo_fast.model.checkpoint import Checkpoint


@dataclass
class Cohort:
    """N studies with prompts and true findings, and the rejected records.

    `truth[i]`: names of the findings of study i; `training_truth`: names per study of the training
    split, for the majority guess. A preference file has no studies; `scored` counts its records.
    """

    studies: list[Study] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    truth: list[tuple[str, ...]] = field(default_factory=list)
    training_truth: list[tuple[str, ...]] = field(default_factory=list)
    read: int = 0
    rejected: list[RejectedRecord] = field(default_factory=list)
    left_out: int = 0  # records of other splits, or beyond max_samples
    scored: int | None = None
    stage: str = ""  # of the records rejected by `drop`; "" for records rejected as a whole

    @property
    def used(self) -> int:
        return len(self.studies) if self.scored is None else self.scored

    def add(self, study: Study, prompt: Prompt, names: tuple[str, ...]) -> None:
        self.studies.append(study)
        self.prompts.append(prompt)
        self.truth.append(names)

    def drop(self, failed: Mapping[int, RecordError]) -> list[int]:
        """Reject the studies with these indices; returns the indices that are kept.

        Raises DataError if none is kept.
        """
        self.rejected += [
            self.make_rejected_record(index, error, self.stage) for index, error in failed.items()
        ]
        if failed and len(failed) == len(self.studies):
            raise DataError(
                "no sample could be read: an image fails in each of "
                f"{counted(len(failed), 'study', 'studies')}, the first: "
                f"{next(iter(failed.values()))}"
            )
        kept = [i for i in range(len(self.studies)) if i not in failed]
        self.studies = [self.studies[i] for i in kept]
        self.prompts = [self.prompts[i] for i in kept]
        self.truth = [self.truth[i] for i in kept]
        return kept

    def make_rejected_record(
        self, index: int, error: RecordError, stage: str = ""
    ) -> RejectedRecord:
        """The `RejectedRecord` of a study that fails in `stage`."""
        study = self.studies[index]
        return RejectedRecord.of(study.study_id, study.origin, error, stage=stage)


def read_cohort(
    checkpoint: Checkpoint,
    dataset: str,
    *,
    split: str = "test",
    dataset_format: str = "auto",
    image_root: str | None = None,
    uncertain: str = "negative",
    max_samples: int | None = None,
    max_length: int = 4096,
) -> Cohort:
    """The first `max_samples` studies of a split, tokenised as in training. Raises DataError if
    none is usable.
    """
    source = open_studies(dataset, dataset_format=dataset_format, image_root=image_root)
    cohort = Cohort()
    for found in tqdm(source, desc="read", unit="study", disable=None):
        images = found.images[:1] if checkpoint.images else ()
        study = replace(found, images=images, labels=study_labels(found))
        names = diagnosis(study.labels, uncertain=uncertain)
        if study.split == "train":
            cohort.training_truth.append(names)
        if study.split != split or len(cohort.studies) == max_samples:
            cohort.left_out += 1
            continue
        preference = build_sft_preference(study, uncertain=uncertain)
        try:
            prompt = checkpoint.encode_prompt(preference, max_length=max_length)
        except RecordError as error:
            cohort.rejected.append(
                RejectedRecord.of(study.study_id, study.origin, error, file=dataset)
            )
            continue
        cohort.add(study, prompt, names)
    cohort.read = source.read
    cohort.rejected[:0] = source.rejected
    if not cohort.studies:
        raise DataError(f"{dataset} has no usable study in its split {split}")
    return cohort

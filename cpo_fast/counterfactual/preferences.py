"""Build the training samples of SFT and CPO from studies and their counterfactuals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cpo_fast.counterfactual.generate import study_labels
from cpo_fast.data.labels import DEFAULT_PROMPT, diagnosis, question, thought
from cpo_fast.types import Counterfactual, Preference, Study


def build_sft_preference(
    study: Study, *, prompt: str = DEFAULT_PROMPT, uncertain: str = "negative"
) -> Preference:
    """The study's report and diagnosis as the chosen answer, without a rejected answer."""
    names = diagnosis(study_labels(study), uncertain=uncertain)
    return Preference(
        id=study.study_id,
        prompt=question(len(study.images), prompt),
        chosen=thought(study.report.text, names),
        images=study.images,
        origin=study.origin,
    )


def pair_with_counterfactuals(
    study: Study,
    cfs: Sequence[Counterfactual],
    *,
    rejected_answer: str = "target",
    prompt: str = DEFAULT_PROMPT,
    uncertain: str = "negative",
) -> Preference:
    """The study's answer as chosen, its counterfactuals as rejected answers.

    The diagnosis of a rejected answer is the target only (`rejected_answer` "target", as in the
    data of the CPO paper) or the remaining findings and the target ("all"). Raises ValueError for
    another value, without counterfactuals, and for one of another study or kind than "thinking".
    """
    if rejected_answer not in ("target", "all"):
        raise ValueError(f'rejected_answer must be "target" or "all", not {rejected_answer!r}')
    if not cfs:
        raise ValueError(f"study {study.study_id}: a preference needs at least one counterfactual")
    for cf in cfs:
        if cf.study_id != study.study_id or cf.kind != "thinking":
            raise ValueError(f"counterfactual {cf.id} is not a thinking one of {study.study_id}")
    sft = build_sft_preference(study, prompt=prompt, uncertain=uncertain)
    rejected = tuple(
        thought(
            cf.counterfactual,
            (cf.target,) if rejected_answer == "target" else cf.counterfactual_labels,
        )
        for cf in cfs
    )
    return replace(sft, rejected=rejected)

"""Counterfactuals: reports as they would read with another disease, and preferences of them."""

from cpo_fast.counterfactual.generate import counterfactuals, placed, study_labels
from cpo_fast.counterfactual.preference import preference, sft_preference
from cpo_fast.data.labels import DEFAULT_PROMPT

__all__ = [
    "DEFAULT_PROMPT",
    "counterfactuals",
    "placed",
    "preference",
    "sft_preference",
    "study_labels",
]

"""Counterfactual reports of studies, and the preferences built from them."""

from cpo_fast.counterfactual.generate import counterfactuals, place_images, study_labels
from cpo_fast.counterfactual.preferences import build_sft_preference, pair_with_counterfactuals
from cpo_fast.data.labels import DEFAULT_PROMPT

__all__ = [
    "DEFAULT_PROMPT",
    "build_sft_preference",
    "counterfactuals",
    "pair_with_counterfactuals",
    "place_images",
    "study_labels",
]

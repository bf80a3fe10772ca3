"""Counterfactual reports of studies, and the preferences built from them."""

from cpo_fast.counterfactual.generate import counterfactuals, place_images, study_labels
from cpo_fast.counterfactual.preferences import build_preference, build_sft_preference
from cpo_fast.data.labels import DEFAULT_PROMPT

__all__ = [
    "DEFAULT_PROMPT",
    "build_preference",
    "build_sft_preference",
    "counterfactuals",
    "place_images",
    "study_labels",
]

"""Counterfactual reports: what a report would read like with another disease, and the preferences made of them."""

from cpo_fast.counterfactual.generate import counterfactuals, study_labels
from cpo_fast.counterfactual.preference import DEFAULT_PROMPT, preference, sft_preference

__all__ = ["DEFAULT_PROMPT", "counterfactuals", "preference", "sft_preference", "study_labels"]

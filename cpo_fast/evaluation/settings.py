"""Settings of an evaluation without effect on a kind of data, or without one of the suites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PAIRS = "a preference file, which gives how often the chosen answer is preferred"
IMAGES = "a CSV of images, whose columns decide what is computed"
STUDIES = "studies, which have no pairs"

UNUSED = {
    PAIRS: ("suite", "split", "uncertain_labels", "max_new_tokens", "batch_size", "drift_samples",
            "num_examples"),
    IMAGES: ("suite", "split", "dataset_format", "drift_samples", "num_examples", "beta"),
    STUDIES: ("beta",),
}  # fmt: skip
"""Settings without effect on a kind of data."""

OF_SUITES = {
    "drift_samples": ("drift",),
    "packing_length": ("zero_shot",),
    "seed": ("classification", "report", "zero_shot"),
}
"""Settings that only these suites use, on studies."""


def used_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in the config.json of an evaluation that had an effect."""
    if suites := config.get("suite"):
        unused = [*UNUSED[STUDIES], *(k for k, of in OF_SUITES.items() if not set(of) & {*suites})]
    else:
        images = str(config.get("dataset")).endswith((".csv", ".csv.gz"))
        unused = list(UNUSED[IMAGES if images else PAIRS])
    return {key: value for key, value in config.items() if key not in unused}

"""Bootstrap over studies, patients or other groups: resampling weights and 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def group_weights(groups: Sequence[Any], bootstrap: int, seed: int) -> np.ndarray:
    """How often each row is drawn when whole groups are resampled: [bootstrap, N] float64.

    `groups` [N] holds the group of each row, such as its patient.
    """
    keys = np.unique(list(groups), return_inverse=True)[1]
    count = int(keys.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), bootstrap)
    return drawn[:, keys].astype(np.float64)


def study_weights(studies: int, bootstrap: int, seed: int) -> np.ndarray:
    """`group_weights` where each of N studies is its own group; every row sums to N."""
    return group_weights(range(studies), bootstrap, seed)


def estimate(value: float, draws: np.ndarray) -> dict[str, Any]:
    """{"value", "interval" [low, high]} of a point estimate and its bootstrap draws.

    The interval spans the 2.5 % and 97.5 % quantiles of the defined draws. Undefined (NaN) is None.
    """
    if np.isnan(value):
        return {"value": None, "interval": None}
    defined = draws[~np.isnan(draws)]
    interval = [float(x) for x in np.quantile(defined, [0.025, 0.975])] if defined.size else None
    return {"value": float(value), "interval": interval}

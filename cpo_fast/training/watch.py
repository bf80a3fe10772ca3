"""Loss spikes and maxima, which the mean of a row over many steps would hide."""

from __future__ import annotations

import math
from dataclasses import dataclass

WINDOW = 50  # steps in the running mean and variance
MIN_STEPS = 20  # steps before a spike can be detected
THRESHOLD = 6.0  # standard deviations


@dataclass
class Watch:
    """Tracks loss and gradient norm of every step; the same on all ranks."""

    steps: int = 0
    mean: float = 0.0
    variance: float = 0.0
    loss_spikes: int = 0
    loss_max: float | None = None
    grad_norm_max: float | None = None

    def update(self, loss: float, grad_norm: float) -> None:
        """Count a finite step; a spike is more than six standard deviations above the mean.

        A spike moves the mean at most to its threshold, so a second spike is still detected.
        """
        self.loss_max = max(loss, self.loss_max if self.loss_max is not None else loss)
        self.grad_norm_max = max(grad_norm, self.grad_norm_max or 0.0)
        limit = self.mean + THRESHOLD * math.sqrt(self.variance) + 1e-3 * abs(self.mean)
        if self.steps >= MIN_STEPS and loss > limit:
            self.loss_spikes += 1
            loss = limit
        self.steps += 1
        share = max(1 / self.steps, 1 / WINDOW)
        off = loss - self.mean
        self.mean += share * off
        self.variance = (1 - share) * (self.variance + share * off * off)

    def row(self) -> dict[str, float]:
        """The maxima since the last row, and the number of spikes in the stage."""
        row: dict[str, float] = {"loss_spikes": self.loss_spikes}
        if self.loss_max is not None and self.grad_norm_max is not None:
            row |= {"loss_max": self.loss_max, "grad_norm_max": self.grad_norm_max}
        self.loss_max = self.grad_norm_max = None
        return row

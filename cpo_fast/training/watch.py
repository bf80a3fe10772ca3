"""Spikes: what a row's mean over many steps would hide, and what stands out of the steps before."""

from __future__ import annotations

import math
from dataclasses import dataclass

MEMORY = 50  # steps that the running mean and spread look back
ENOUGH = 20  # steps before anything can stand out
FAR = 6.0  # standard deviations


@dataclass
class Watch:
    """Follows loss and gradient norm of every step. All ranks see the same numbers."""

    steps: int = 0
    mean: float = 0.0
    variance: float = 0.0
    loss_spikes: int = 0
    loss_max: float | None = None
    grad_norm_max: float | None = None

    def see(self, loss: float, grad_norm: float) -> None:
        """Count a finite step; a spike is more than six standard deviations above the mean.

        A spike moves the mean no further than its threshold, so that a second one is seen, too.
        """
        self.loss_max = max(loss, self.loss_max if self.loss_max is not None else loss)
        self.grad_norm_max = max(grad_norm, self.grad_norm_max or 0.0)
        limit = self.mean + FAR * math.sqrt(self.variance) + 1e-3 * abs(self.mean)
        if self.steps >= ENOUGH and loss > limit:
            self.loss_spikes += 1
            loss = limit
        self.steps += 1
        share = max(1 / self.steps, 1 / MEMORY)
        off = loss - self.mean
        self.mean += share * off
        self.variance = (1 - share) * (self.variance + share * off * off)

    def row(self) -> dict[str, float]:
        """The greatest values since the last row, and the stage's number of spikes."""
        row: dict[str, float] = {"loss_spikes": self.loss_spikes}
        if self.loss_max is not None and self.grad_norm_max is not None:
            row |= {"loss_max": self.loss_max, "grad_norm_max": self.grad_norm_max}
        self.loss_max = self.grad_norm_max = None
        return row

"""The loss types, implementations and options of the loss op. Needs no torch.

Flags and reports read the names without importing torch; `losses.py` holds the formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LossType:
    """What a loss compares, and the label smoothing that it accepts."""

    reference: bool = True  # compares with a reference model
    averages: bool = False  # always divides log-ratios by token counts
    smoothing: tuple[float, float] | None = None  # label_smoothing in [low, high); None: unused

    @property
    def needs_smoothing(self) -> bool:
        """Whether label_smoothing must be above 0."""
        return self.smoothing is not None and self.smoothing[0] > 0


LOSS_TYPES: dict[str, LossType] = {
    "sigmoid": LossType(smoothing=(0.0, 1.0)),
    "hinge": LossType(),
    "ipo": LossType(averages=True),
    "robust": LossType(smoothing=(0.0, 0.5)),
    "exo_pair": LossType(smoothing=(math.ulp(0.0), 1.0)),
    "nca_pair": LossType(),
    "bco_pair": LossType(),
    "sppo_hard": LossType(),
    "apo_zero": LossType(),
    "apo_down": LossType(),
    "simpo": LossType(reference=False, averages=True, smoothing=(0.0, 1.0)),
    "orpo": LossType(reference=False, averages=True),
    "plackett_luce": LossType(),
}
"""By name; `cpo_fast.loss.losses` has the formula and source of each."""

OTHER_NAMES = {
    "dpo": "'sigmoid' is the DPO loss",
    "cpo": "'sigmoid' is the loss of counterfactual preference optimisation",
    "cdpo": "use 'sigmoid' with label_smoothing",
    "slic": "use 'hinge'",
    "rdpo": "use 'robust'",
    "apo": "use 'apo_zero' or 'apo_down'",
    "kto_pair": "use 'bco_pair' or 'apo_zero'",
    "sigmoid_norm": "use 'sigmoid' with average_log_prob=True",
    "pl": "use 'plackett_luce'",
    "sft": "use linear_logprobs: the loss is -linear_logprobs(...).mean()",
}
"""Loss names of other libraries and papers, with advice."""

IMPLS = ("reference", "cuda", "triton", "cpu")
"""The implementations (`cpo_fast.loss.implementations`), in ascending order of preference."""


@dataclass(frozen=True)
class LossOptions:
    """The options of `cpo_loss` and `linear_logprobs`, which document them.

    `checks.check_options` validates them.
    """

    beta: float = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    average_log_prob: bool = False
    simpo_gamma: float = 0.5
    rpo_alpha: float = 0.0
    softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = -100
    impl: str | None = None

"""The settings of one training stage, independent of the names of flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TRAINING_STAGES = ("sft", "cpo")
"""The stages that train, in their order."""


@dataclass(frozen=True)
class StageSettings:
    """Settings of one stage, named as in transformers' TrainingArguments if it has them; lengths
    are in tokens.
    """

    stage: str  # "sft" or "cpo"
    seed: int = 42

    learning_rate: float = 2e-5
    lr_scheduler_type: str = "cosine"
    lr_scheduler_kwargs: dict[str, Any] | None = None
    warmup_ratio: float = 0.0
    weight_decay: float = 0.05
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    max_grad_norm: float = 1.0  # 0: no clipping
    max_nonfinite_steps: int = 3

    num_train_epochs: float = 1.0
    max_steps: int = -1  # -1: as many as num_train_epochs take
    per_device_train_batch_size: int = 4  # pairs; samples in SFT
    gradient_accumulation_steps: int = 8

    packing: bool = True
    packing_length: int = 4096
    expand_pairs: bool = False
    dataloader_num_workers: int = 2
    bf16: bool = False

    logging_steps: int = 1
    eval_steps: int = 0  # 0: only after the last step
    save_steps: int = 100  # 0: only after the last step
    save_total_limit: int = 2  # 0: keep all
    metric_for_best_model: str | None = None
    load_best_model_at_end: bool = False

    @property
    def samples_per_step(self) -> int:
        """Pairs (SFT: samples) per optimiser step and process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

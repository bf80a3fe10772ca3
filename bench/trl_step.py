"""PackedStep's optimiser step by trl's DPOTrainer, in micro-batches."""

from __future__ import annotations

from typing import Any

import torch

from bench.batches import prepare_batches
from bench.step_data import Work
from cpo_fast.testing.trl_oracle import trainer


class TrlStep:
    """A call runs one optimiser step over all pairs in micro-batches of `batch` pairs; returns the
    mean loss. Batches are prepared as for PackedStep. `options` are passed to DPOConfig."""

    def __init__(self, model: Any, work: Work, *, folder: str, batch: int, **options: Any) -> None:
        self.trainer = trainer(
            model,
            work.preferences,
            work.tokenizer,
            work.images,
            output_dir=folder,
            r=8,
            alpha=32,
            per_device_train_batch_size=batch,
            **options,
        )
        self.pairs, self.batch = work.pairs, batch
        model = self.trainer.model
        model.train()
        if options.get("gradient_checkpointing"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0)
        self.parts = [
            range(start, min(start + batch, self.pairs)) for start in range(0, self.pairs, batch)
        ]
        self._batches = prepare_batches(self._collate, self.parts, model.device)

    def _collate(self, part: range) -> Any:
        return self.trainer.data_collator([self.trainer.train_dataset[i] for i in part])

    def __call__(self) -> float:
        trl = self.trainer
        total = 0.0
        for part in self.parts:
            inputs = trl._prepare_inputs(next(self._batches))
            with trl.compute_loss_context_manager():
                loss = trl.compute_loss(trl.model, inputs) * len(part) / self.pairs
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

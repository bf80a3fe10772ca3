"""The training loop of both stages: plan, feed, forward, backward, step, metrics, checkpoints.

An optimiser step is a fixed number of pairs (SFT: samples); how they are packed decides only how
they are computed. The plan of an epoch is a pure function of (data, seed, epoch).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cpo_fast.errors import CpoFastError, DataError
from cpo_fast.model.packed import PackedModel
from cpo_fast.packing import Step, plan_epoch
from cpo_fast.training.arguments import TrainArguments
from cpo_fast.training.checkpoint import write_checkpoint
from cpo_fast.training.clock import Clock
from cpo_fast.training.feed import Pixels, StepBatch, StepFeed, step_loader
from cpo_fast.training.metrics import MetricsLog, Sums
from cpo_fast.training.objectives import Objective
from cpo_fast.types import PreferenceGroup, RejectedRecord


@dataclass
class StageResult:
    """What a stage leaves for summary.json."""

    steps: int
    seconds: float
    checkpoint: Path
    final: dict[str, float]
    throughput: dict[str, Any]
    rejected: list[RejectedRecord] = field(default_factory=list)


@dataclass
class Trainer:
    """One stage ("sft" or "cpo") on one device; `save_model` writes the model into a folder."""

    stage: str
    model: PackedModel
    objective: Objective
    groups: Sequence[PreferenceGroup]
    eval_groups: Sequence[PreferenceGroup]
    pixels: Pixels | None
    image_token_id: int | None
    args: TrainArguments
    log: MetricsLog
    stage_dir: Path
    save_model: Callable[[Path], None]
    device: torch.device

    def run(self) -> StageResult:
        """Train until the steps or epochs asked for are done; the last step is always saved.

        Raises CpoFastError, naming the samples, when a loss or gradient is not finite: the weights
        are those of the step before and the checkpoints stay.
        """
        from transformers import get_scheduler

        settings = self.args.of_stage(self.stage)
        steps, steps_per_epoch = self._plan(settings)
        parameters = [p for p in self.model.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters,
            lr=settings["learning_rate"],
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            weight_decay=self.args.weight_decay,
        )
        scheduler = get_scheduler(
            self.args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=math.ceil(settings["warmup_ratio"] * len(steps)),
            num_training_steps=len(steps),
        )
        result = StageResult(len(steps), 0.0, Path(), {}, {})
        torch.manual_seed(self.args.seed)
        begun = time.perf_counter()
        sums, clock = Sums(), Clock()
        workers = self.args.dataloader_num_workers
        loader = step_loader(self._feed(self.groups, steps), num_workers=workers)
        bar = tqdm(total=len(steps), desc=self.stage, unit="step", disable=None)
        self.model.model.train()
        for number, batch in enumerate(clock.waiting(loader), start=1):
            result.rejected += batch.rejected
            grad_norm = self._step(batch, optimizer, parameters, sums, clock)
            learning_rate = scheduler.get_last_lr()[0]
            scheduler.step()
            clock.count_step(batch.batches)
            last = number == len(steps)
            at: dict[str, Any] = {
                "stage": self.stage,
                "step": number,
                "epoch": round(number / steps_per_epoch, 4),
            }
            if last or _every(self.args.logging_steps, number):
                row = {
                    **self.objective.row(sums.take()),
                    "grad_norm": grad_norm,
                    "learning_rate": learning_rate,
                    "num_tokens": clock.num_tokens,
                }
                self.log.write({**at, **row, **clock.row()})
                result.final |= row
                bar.set_postfix(loss=f"{row['loss']:.4f}")
            if self.eval_groups and (last or _every(self.args.eval_steps, number)):
                evaluated = self.evaluate()
                self.log.write({**at, **evaluated})
                result.final |= evaluated
                clock.resume()
            if last or _every(self.args.save_steps, number):
                result.checkpoint = self._save(number, len(steps), at["epoch"])
                clock.resume()
            bar.update()
        bar.close()
        result.seconds = time.perf_counter() - begun
        result.throughput = clock.stage()
        return result

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The objective's metrics over the held-out groups, each with `eval_` in front."""
        size = self.args.of_stage(self.stage)["per_device_train_batch_size"]
        steps = self._plan_epoch(self.eval_groups, size * 4, epoch=0, shuffle=False)
        sums = Sums()
        self.model.model.eval()
        for step in step_loader(self._feed(self.eval_groups, steps), num_workers=0):
            for batch in step.batches:
                sums.add(self.objective.summed(batch.to(self.device))[1])
        self.model.model.train()
        return {f"eval_{name}": value for name, value in self.objective.row(sums.take()).items()}

    def _feed(self, groups: Sequence[PreferenceGroup], steps: Sequence[Step]) -> StepFeed:
        return StepFeed(groups, steps, self.pixels, self.image_token_id)

    def _step(
        self,
        step: StepBatch,
        optimizer: torch.optim.Optimizer,
        parameters: list[torch.nn.Parameter],
        sums: Sums,
        clock: Clock,
    ) -> float:
        """One optimiser step: the packs' summed losses, divided by the weight of the whole step."""
        total = sum(self.objective.weigh(batch) for batch in step.batches)
        for batch in step.batches:
            with clock.phase("forward"):
                loss, values = self.objective.summed(batch.to(self.device))
            sums.add(values)
            with clock.phase("backward"):
                (loss / total).backward()
        with clock.phase("optimiser"):
            limit = self.args.max_grad_norm or math.inf
            grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
            if not math.isfinite(grad_norm):
                names = sorted({n.rsplit("/", 1)[0] for b in step.batches for n in b.segment_names})
                raise CpoFastError(
                    f"{self.stage}: the gradient norm is {grad_norm}; the weights were left as "
                    f"they were before this step. Look at the samples {', '.join(names)}, or "
                    "lower --learning_rate"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def _plan(self, settings: dict[str, Any]) -> tuple[list[Step], float]:
        """The steps of the whole stage, and how many of them make an epoch."""
        per_step = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
        if not self.groups:
            raise DataError(f"{self.stage}: no training sample is left; see rejected_records.jsonl")
        first = self._plan_epoch(self.groups, per_step, epoch=0)
        if settings["max_steps"] > 0:
            wanted = settings["max_steps"]
        else:
            wanted = max(1, round(settings["num_train_epochs"] * len(first)))
        steps = list(first)
        epoch = 0
        while len(steps) < wanted:
            epoch += 1
            steps += self._plan_epoch(self.groups, per_step, epoch=epoch)
        return steps[:wanted], float(len(first))

    def _plan_epoch(
        self,
        groups: Sequence[PreferenceGroup],
        pairs_per_step: int,
        *,
        epoch: int,
        shuffle: bool = True,
    ) -> list[Step]:
        steps = plan_epoch(
            groups,
            pairs_per_step=pairs_per_step,
            packing_length=self.args.packing_length,
            seed=self.args.seed,
            epoch=epoch,
            expand_pairs=self.args.expand_pairs,
            shuffle=shuffle,
        )
        if self.args.packing:
            return steps
        return [replace(s, packs=tuple((part,) for pack in s for part in pack)) for s in steps]

    def _save(self, step: int, max_steps: int, epoch: float) -> Path:
        state = {
            "global_step": step,
            "max_steps": max_steps,
            "epoch": epoch,
            "log_history": self.log.of_stage(self.stage),
        }
        return write_checkpoint(
            self.stage_dir,
            step,
            self.save_model,
            state,
            save_total_limit=self.args.save_total_limit,
        )


def _every(steps: int, number: int) -> bool:
    return steps > 0 and number % steps == 0

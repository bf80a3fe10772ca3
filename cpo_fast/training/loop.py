"""The training loop of both stages: plan, feed, forward, backward, step, metrics, checkpoints.

An optimiser step is a fixed number of pairs (SFT: samples); how they are packed, and on how many
processes, decides only how they are computed. The plan of an epoch is a pure function of (data,
seed, epoch); every rank goes through the same steps and takes the same decisions.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cpo_fast.errors import CpoFastError, DataError, UsageError
from cpo_fast.model.packed import PackedModel
from cpo_fast.packing import Step, packing_efficiency, plan_epoch
from cpo_fast.training.arguments import TrainArguments
from cpo_fast.training.checkpoint import (
    generators,
    optimizer_tensors,
    read_checkpoint,
    restore_generators,
    restore_optimizer,
    write_checkpoint,
)
from cpo_fast.training.clock import Clock
from cpo_fast.training.distributed import World
from cpo_fast.training.feed import Pixels, StepBatch, StepFeed, step_loader
from cpo_fast.training.interrupt import Interrupted, StopRequest
from cpo_fast.training.metrics import MetricsLog, Sums, finite
from cpo_fast.training.objectives import Objective
from cpo_fast.training.sharding import filler, is_sharded, sum_and_clip, whole_weights
from cpo_fast.types import PackedBatch, PreferenceGroup, RejectedRecord


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
class Progress:
    """What a resumed stage must know beside weights and optimiser; a part of trainer_state.json."""

    step: int = 0
    seconds: float = 0.0
    nonfinite_in_a_row: int = 0
    best: dict[str, Any] = field(default_factory=dict)  # metric, value, step
    final: dict[str, float] = field(default_factory=dict)
    throughput: dict[str, Any] = field(default_factory=dict)


@dataclass
class Trainer:
    """One stage ("sft" or "cpo") on one device per process of `world`.

    `save_model` writes the model into a folder, with these weights where it holds shards only.
    """

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
    save_model: Callable[[Path, dict[str, torch.Tensor] | None], None]
    device: torch.device
    stop: StopRequest
    resume: Path | None = None
    world: World = field(default_factory=World)
    oom_retries: int = field(default=0, init=False)

    def run(self) -> StageResult:
        """Train until the steps or epochs asked for are done; the last step is always saved.

        With `resume` it goes on after that checkpoint exactly as if it had never stopped. Raises
        Interrupted when a stop was asked for (a checkpoint is written first), and CpoFastError when
        `max_nonfinite_steps` steps in a row had a loss or gradient that is not finite.
        """
        from transformers import get_scheduler

        settings = self.args.of_stage(self.stage)
        steps, steps_per_epoch = self._plan(settings)
        metric = settings["metric_for_best_model"]
        if metric is None and self.args.load_best_model_at_end:
            metric = "loss"
        if metric is not None and not self.eval_groups:
            raise DataError(f"{self.stage}: no sample is held out to tell the best model by")
        names = {p: name for name, p in self.model.model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(
            list(names),
            lr=settings["learning_rate"],
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            weight_decay=self.args.weight_decay,
            foreach=False if self.sharded else None,  # it does not mix shards and whole tensors
        )
        scheduler = get_scheduler(
            settings["lr_scheduler_type"],
            optimizer,
            num_warmup_steps=math.ceil(settings["warmup_ratio"] * len(steps)),
            num_training_steps=len(steps),
            scheduler_specific_kwargs=settings["lr_scheduler_kwargs"],
        )
        torch.manual_seed(self.args.seed + self.world.rank)
        progress, sums, clock = Progress(), Sums(), Clock(self.world)
        rejected: list[dict[str, Any]] = []
        if self.resume is not None:
            state, tensors = read_checkpoint(self.resume)
            progress = Progress(**state["progress"])
            restore_optimizer(optimizer, names, tensors)
            scheduler.load_state_dict(state["scheduler"])
            optimizer.param_groups[0]["lr"] = scheduler.get_last_lr()[0]
            self._restore_rank(state["ranks"], sums, rejected, clock)
        self.log.rewind(self.stage, progress.step)
        begun = time.perf_counter() - progress.seconds
        checkpoint = self.resume or self.stage_dir
        feed = self._feed(self.groups, steps)
        workers = self.args.dataloader_num_workers
        loader = step_loader(feed, num_workers=workers, start=progress.step)
        bar = tqdm(
            total=len(steps), initial=progress.step, desc=self.stage, unit="step", disable=None
        )
        self.model.model.train()
        for number, batch in enumerate(clock.waiting(loader), start=progress.step + 1):
            progress.step = number
            rejected += [record.to_json() for record in batch.rejected]
            halved = partial(feed.halved, number - 1)
            grad_norm = self._step(batch, halved, optimizer, sums, clock, progress)
            learning_rate = scheduler.get_last_lr()[0]
            scheduler.step()
            clock.count_step(batch.batches)
            last = number == len(steps)
            stopping = self.world.any(self.stop.pending())
            at: dict[str, Any] = {
                "stage": self.stage,
                "step": number,
                "epoch": round(number / steps_per_epoch, 4),
            }
            if last or _every(self.args.logging_steps, number):
                taken = Sums.together(self.world.gather(sums.take()))
                row = {
                    **(self.objective.row(taken) if taken else {"loss": math.nan}),
                    "grad_norm": grad_norm,
                    "learning_rate": learning_rate,
                    "num_tokens": round(self.world.sum([clock.num_tokens])[0]),
                }
                if retries := round(self.world.sum([self.oom_retries])[0]):
                    row["oom_retries"] = retries
                self.log.write({**at, **row, **clock.row()})
                progress.final |= row
                bar.set_postfix(loss=f"{row['loss']:.4f}")
            better = False
            if self.eval_groups and (last or _every(self.args.eval_steps, number)):
                evaluated = self.evaluate()
                better = self._is_best(metric, evaluated, progress)
                self.log.write({**at, **evaluated})
                progress.final |= evaluated
                clock.resume()
            if last or stopping or better or _every(self.args.save_steps, number):
                progress.seconds = time.perf_counter() - begun
                progress.throughput = clock.stage() or progress.throughput
                state = {
                    "global_step": number,
                    "max_steps": len(steps),
                    "epoch": at["epoch"],
                    "log_history": self.log.of_stage(self.stage),
                    "progress": asdict(progress),
                    "scheduler": _plain(scheduler.state_dict()),
                    "ranks": self._ranks(sums, rejected, clock),
                }
                if progress.best:
                    state["best_metric"] = progress.best["value"]
                    state["best_global_step"] = progress.best["step"]
                    state["best_model_checkpoint"] = str(self._checkpoint(progress.best["step"]))
                checkpoint = self._write_checkpoint(state, optimizer_tensors(optimizer, names))
                clock.resume()
            bar.update()
            if stopping and not last:
                bar.close()
                reasons = [reason for reason in self.world.gather(self.stop.reason) if reason]
                raise Interrupted(
                    f"stopped by {reasons[0]} after {self.stage} step {number} of "
                    f"{len(steps)}; go on with --resume_from_checkpoint auto"
                )
        bar.close()
        if self.args.load_best_model_at_end:
            checkpoint = self._checkpoint(progress.best["step"])
        set_aside = [
            RejectedRecord(**record)
            for of_rank in self.world.gather(rejected)
            for record in of_rank
        ]
        efficiency = packing_efficiency(self.groups, steps, self.args.packing_length)
        throughput = progress.throughput | {"packing_efficiency": round(efficiency, 4)}
        return StageResult(
            len(steps), progress.seconds, checkpoint, progress.final, throughput, set_aside
        )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The objective's metrics over the held-out groups, each with `eval_` in front."""
        size = self.args.of_stage(self.stage)["per_device_train_batch_size"]
        steps = self._plan_epoch(self.eval_groups, size * 4, epoch=0, shuffle=False)
        sums = Sums()
        self.model.model.eval()
        for step in step_loader(self._feed(self.eval_groups, steps), num_workers=0):
            for batch, counts in self._level(step):
                values = self.objective.summed(batch.to(self.device))[1]
                if counts:
                    sums.add(values)
        self.model.model.train()
        row = self.objective.row(Sums.together(self.world.gather(sums.take())))
        return {f"eval_{name}": value for name, value in row.items()}

    def _checkpoint(self, step: int) -> Path:
        return self.stage_dir / f"checkpoint-{step}"

    def _is_best(self, metric: str | None, evaluated: dict[str, float], progress: Progress) -> bool:
        """Whether this evaluation is the best so far; kept in `progress` when it is."""
        if metric is None:
            return False
        name = f"eval_{metric.removeprefix('eval_')}"
        if name not in evaluated:
            raise UsageError(
                f"--metric_for_best_model {metric}: {self.stage} has {', '.join(evaluated)}"
            )
        value = evaluated[name]
        sign = -1 if name.endswith("loss") else 1  # transformers' rule of what is better
        if math.isnan(value) or (progress.best and value * sign <= progress.best["value"] * sign):
            return False
        progress.best = {"metric": name, "value": value, "step": progress.step}
        return True

    def _ranks(
        self, sums: Sums, rejected: list[dict[str, Any]], clock: Clock
    ) -> list[dict[str, Any]]:
        """What every rank must know beside what all share, by rank."""
        return self.world.gather(
            {
                "sums": sums.peek(),
                "rejected": rejected,
                "num_tokens": clock.num_tokens,
                "oom_retries": self.oom_retries,
                "generators": generators(),
            }
        )

    def _restore_rank(
        self,
        ranks: list[dict[str, Any]],
        sums: Sums,
        rejected: list[dict[str, Any]],
        clock: Clock,
    ) -> None:
        """Inverse of `_ranks`; rank 0 takes over from ranks that there are no longer.

        A rank that there was not draws its dropout from a generator of its own.
        """
        rank, size = self.world.rank, self.world.size
        own = ranks[rank : rank + 1] + (ranks[size:] if rank == 0 else [])
        for one in own:
            sums.add(one["sums"])
            rejected += one["rejected"]
            clock.num_tokens += one["num_tokens"]
            self.oom_retries += one["oom_retries"]
        if rank < len(ranks):
            restore_generators(ranks[rank]["generators"])

    @cached_property
    def sharded(self) -> bool:
        return is_sharded(list(self.model.model.parameters()))

    def _level(self, step: StepBatch) -> list[tuple[PackedBatch, bool]]:
        """The step's batches and whether they count: sharded layers compute equally often on all
        ranks, whatever images failed."""
        batches = [(batch, True) for batch in step.batches]
        if self.sharded:
            most = max(self.world.gather(len(batches)))
            batches += [(filler(self.groups[0]), False)] * (most - len(batches))
        return batches

    def _write_checkpoint(self, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
        weights = whole_weights(self.model.model, self.world) if self.sharded else None

        def write() -> str:
            written = write_checkpoint(
                self.stage_dir,
                state["global_step"],
                lambda path: self.save_model(path, weights),
                finite(state),
                tensors,
                save_total_limit=self.args.save_total_limit,
                keep=Path(state["best_model_checkpoint"]) if state["progress"]["best"] else None,
            )
            return str(written)

        return Path(self.world.on_main(write))

    def _feed(self, groups: Sequence[PreferenceGroup], steps: Sequence[Step]) -> StepFeed:
        return StepFeed(groups, steps, self.pixels, self.image_token_id)

    def _step(
        self,
        step: StepBatch,
        halved: Callable[[], StepBatch],
        optimizer: torch.optim.Optimizer,
        sums: Sums,
        clock: Clock,
        progress: Progress,
    ) -> float:
        """One optimiser step: the packs' summed losses, divided by the weight of the whole step.

        Out of memory, it is computed once more as `halved` gives it.
        Returns the gradient norm, over all ranks. A step whose norm is not finite does not reach
        the weights.
        """
        total = self.world.sum([sum(self.objective.weigh(batch) for batch in step.batches)])[0]
        if not total:  # every image of the step failed; it stays in the count of steps
            return 0.0
        try:
            own, full = self._backward(step, total, clock), None
        except torch.OutOfMemoryError as error:
            own, full = Sums(), str(error)  # the retry is outside: `error` holds the activations
        if full is not None:
            own = self._again_in_halves(halved, full, total, optimizer, clock)
            self.oom_retries += 1
        with clock.phase("optimiser"):
            parameters = optimizer.param_groups[0]["params"]
            limit = self.args.max_grad_norm or math.inf
            grad_norm = sum_and_clip(parameters, limit, self.world)
            if math.isfinite(grad_norm):
                optimizer.step()
                sums.add(own.take())
                progress.nonfinite_in_a_row = 0
            else:
                self._set_aside(step, grad_norm, own.take().get("loss", 0.0) / total, progress)
            optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def _backward(self, step: StepBatch, total: float, clock: Clock) -> Sums:
        """Add the gradients of the step's packs to what is there; returns their sums."""
        own = Sums()
        for batch, counts in self._level(step):
            with clock.phase("forward"):
                loss, values = self.objective.summed(batch.to(self.device))
            if counts:
                own.add(values)
            with clock.phase("backward"):
                (loss / total if counts else loss * 0.0).backward()
        return own

    def _again_in_halves(
        self,
        halved: Callable[[], StepBatch],
        reason: str,
        total: float,
        optimizer: torch.optim.Optimizer,
        clock: Clock,
    ) -> Sums:
        """The whole step once more in packs of half the size: some gradients were added already."""
        advice = (
            f"{self.stage}: out of memory ({reason.splitlines()[0]}). Lower --packing_length, "
            "or set --gradient_checkpointing true"
        )
        if self.sharded:  # the other ranks would not gather the layers a second time
            raise CpoFastError(advice)
        optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            return self._backward(halved(), total, clock)
        except torch.OutOfMemoryError as error:
            raise CpoFastError(f"{advice} (packs of half the size did not fit, either)") from error

    def _set_aside(
        self, step: StepBatch, grad_norm: float, loss: float, progress: Progress
    ) -> None:
        """Name the samples of a step that is not finite; stop when it keeps happening.

        `loss` is this rank's share of the step's loss.
        """
        own = sorted({n.rsplit("/", 1)[0] for b in step.batches for n in b.segment_names})
        names = sorted({name for of_rank in self.world.gather(own) for name in of_rank})
        loss = sum(self.world.gather(loss))
        path = self.log.path.with_name("nonfinite_steps.jsonl")
        line = {
            "stage": self.stage,
            "step": progress.step,
            "loss": str(loss),
            "grad_norm": str(grad_norm),
            "ids": names,
        }
        if self.world.is_main:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        progress.nonfinite_in_a_row += 1
        if progress.nonfinite_in_a_row >= self.args.max_nonfinite_steps:
            bad = [
                name
                for name, value in self.model.model.named_parameters()
                if not value.detach().isfinite().all()
            ]
            weights = f" Weights that were so before: {', '.join(bad[:5])}." if bad else ""
            raise CpoFastError(
                f"{self.stage} step {progress.step}: loss {loss}, gradient norm {grad_norm}, and "
                f"so for {progress.nonfinite_in_a_row} steps in a row. The weights were left as "
                f"they were.{weights} {path} names the samples. Look at them, or lower the "
                "learning rate"
            )

    def _plan(self, settings: dict[str, Any]) -> tuple[list[Step], float]:
        """The steps of the whole stage, and how many of them make an epoch."""
        per_step = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
        per_step *= self.world.size
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
            rank=self.world.rank,
            world_size=self.world.size,
            expand_pairs=self.args.expand_pairs,
            shuffle=shuffle,
        )
        if self.args.packing:
            return steps
        return [replace(s, packs=tuple((part,) for pack in s for part in pack)) for s in steps]


def _every(steps: int, number: int) -> bool:
    return steps > 0 and number % steps == 0


def _plain(scheduler_state: dict[str, Any]) -> dict[str, Any]:
    """A schedule's numbers; its functions are made anew."""
    return {k: v for k, v in scheduler_state.items() if k != "lr_lambdas"} | {"lr_lambdas": [None]}

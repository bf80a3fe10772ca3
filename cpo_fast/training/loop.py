"""The training loop of both stages: plan, feed, step, metrics, evaluation, checkpoints.

An optimiser step has a fixed number of pairs (SFT: samples). Packing and the number of processes
change how it is computed, not what. The plan of an epoch is a pure function of (data, seed, epoch);
every rank goes through the same steps and takes the same decisions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file

from cpo_fast.counting import counted
from cpo_fast.errors import DataError, UsageError
from cpo_fast.model.flops import FlopCounter, peak_flops
from cpo_fast.model.packed import PackedModel
from cpo_fast.packing import packing_efficiency
from cpo_fast.packing.plan import Step
from cpo_fast.training.bar import StageBar
from cpo_fast.training.checkpoint import BEGUN_WITH, RESUME, write_checkpoint
from cpo_fast.training.clock import Clock
from cpo_fast.training.distributed import World
from cpo_fast.training.feed import StepFeed, load_steps
from cpo_fast.training.interrupt import Interrupted, StopRequest
from cpo_fast.training.metrics import MetricsLog, Sums, replace_nonfinite
from cpo_fast.training.objectives import Objective
from cpo_fast.training.plan import plan_one_epoch, plan_stage
from cpo_fast.training.sharding import collect_weights, is_sharded, write_model, write_shards
from cpo_fast.training.stage_settings import StageSettings
from cpo_fast.training.state import OPTIMIZER, StageState
from cpo_fast.training.step import Stepper
from cpo_fast.types import PackedBatch, Pixels, PreferenceGroup, RejectedRecord


@dataclass(frozen=True)
class StageData:
    """The samples of a stage; `pixels` reads an image, None for a text-only model."""

    train: Sequence[PreferenceGroup]
    held_out: Sequence[PreferenceGroup] = ()
    pixels: Pixels | None = None
    image_token_id: int | None = None


@dataclass(frozen=True)
class StageOutput:
    """Where a stage writes.

    `save_model(folder, sharded)` writes the model in the layout that transformers and peft load:
    all of it, or, if this process holds shards, everything but the weights. It then returns the
    file names of the weights, else an empty mapping. `begun_with` goes into every checkpoint.
    """

    folder: Path
    log: MetricsLog
    save_model: Callable[[Path, bool], dict[str, str]]
    begun_with: dict[str, Any] = field(default_factory=dict)


@dataclass
class StageResult:
    """What a stage leaves for summary.json."""

    steps: int
    seconds: float
    checkpoint: Path
    final: dict[str, float]
    throughput: dict[str, Any]
    rejected: list[RejectedRecord] = field(default_factory=list)


class Trainer:
    """One stage on one device per process of `world`, started anew or from checkpoint `resume`.

    Raises DataError when there is nothing to train on, or no held-out sample for finding the best
    model.
    """

    def __init__(
        self,
        settings: StageSettings,
        model: PackedModel,
        objective: Objective,
        data: StageData,
        output: StageOutput,
        *,
        device: torch.device,
        stop: StopRequest,
        resume: Path | None = None,
        world: World | None = None,
    ) -> None:
        self.settings = settings
        self.stage = settings.stage
        self.model = model
        self.objective = objective
        self.data = data
        self.output = output
        self.device = device
        self.stop = stop
        self.world = world or World()
        self.steps: list[Step]
        self.steps, self.steps_per_epoch = plan_stage(settings, data.train, self.world)
        self.metric = settings.metric_for_best_model
        if self.metric is None and settings.load_best_model_at_end:
            self.metric = "loss"
        if self.metric is not None and not data.held_out:
            raise DataError(f"{self.stage}: no sample is held out for finding the best model")
        self.clock = make_clock(model, objective, self.device, self.world, bf16=settings.bf16)
        self.sharded = is_sharded(list(model.model.parameters()))
        self.state = StageState(
            settings,
            model.model,
            len(self.steps),
            sharded=self.sharded,
            world=self.world,
            clock=self.clock,
        )
        torch.manual_seed(settings.seed + self.world.rank)
        self.saved = resume  # the newest checkpoint
        if resume is not None:
            self.state.restore(resume)
        self.begun = time.perf_counter() - self.state.progress.seconds
        nonfinite = MetricsLog(
            output.log.path.with_name("nonfinite_steps.jsonl"),
            fresh=() if resume else (self.stage,),
            writes=output.log.writes,
        )
        nonfinite.rewind(self.stage, self.state.progress.step)
        self.stepper = Stepper(
            self.stage,
            model,
            objective,
            self.state.optimizer,
            data.train[0],
            self.device,
            self.clock,
            max_grad_norm=settings.max_grad_norm,
            max_nonfinite_steps=settings.max_nonfinite_steps,
            nonfinite=nonfinite,
            nonfinite_in_a_row=self.state.progress.nonfinite_in_a_row,
            stop=stop,
            world=self.world,
        )

    def run(self) -> StageResult:
        """Train all steps; the last one is always saved.

        A resumed stage continues exactly as if it had never stopped. Raises Interrupted on a stop
        request (after saving), CpoFastError when `max_nonfinite_steps` steps in a row had a loss or
        gradient that is not finite, and DataError when as many had no readable image, or when no
        held-out sample had one.
        """
        settings, state, clock = self.settings, self.state, self.clock
        progress = state.progress
        if progress.step >= len(self.steps) and self.saved is not None and self.world.is_main:
            print(f"{self.stage}: nothing left to train: {self.saved} is the last of "
                  f"{progress.step} steps")  # fmt: skip
        self.output.log.rewind(self.stage, progress.step)
        self.begun = time.perf_counter() - progress.seconds
        data = self.data
        feed = StepFeed(data.train, self.steps, data.pixels, data.image_token_id, self.stage)
        empty = 0  # steps in a row without a readable image
        loader = load_steps(feed, num_workers=settings.dataloader_num_workers, start=progress.step)
        bar = StageBar(self.stage, len(self.steps), progress.step, shows=self.world.is_main)
        self.model.model.train()
        try:
            if progress.owes_evaluation:  # interrupted by a stop request
                self._after_step()
            for number, batch in enumerate(clock.time_waiting(loader), start=progress.step + 1):
                outcome = self.stepper(number, batch, partial(feed.halve, number - 1))
                if not outcome.finished:
                    self._interrupt()
                self._record_rejected(batch.rejected)
                empty = empty + 1 if outcome.empty else 0
                if empty >= min(settings.max_nonfinite_steps, len(self.steps)):
                    self._stop_unreadable(
                        f"no training sample of {counted(empty, 'step')} in a row"
                    )
                progress.step = number
                progress.nonfinite_in_a_row = self.stepper.nonfinite_in_a_row
                state.oom_retries += outcome.oom_retries
                if outcome.sums is not None:
                    state.sums.add(outcome.sums)
                    progress.watch.update(outcome.loss, outcome.grad_norm)
                learning_rate = float(state.scheduler.get_last_lr()[0])
                state.scheduler.step()
                clock.count_step(batch.batches)
                loss = None
                if self._is_last() or _is_due(settings.logging_steps, number):
                    loss = self._log_row(outcome.grad_norm, learning_rate)
                self._after_step()
                bar.update(loss)
        finally:
            bar.close()
        assert self.saved is not None
        best = settings.load_best_model_at_end
        checkpoint = self._checkpoint_path(progress.best["step"]) if best else self.saved
        set_aside = [
            RejectedRecord(**record)
            for of_rank in self.world.gather(state.rejected)
            for record in of_rank
        ]
        efficiency = packing_efficiency(data.train, self.steps, settings.packing_length)
        throughput = progress.throughput | {"packing_efficiency": round(efficiency, 4)}
        return StageResult(
            len(self.steps),
            progress.seconds,
            checkpoint,
            progress.final,
            throughput | clock.stage(),
            set_aside,
        )

    def _is_last(self) -> bool:
        return self.state.progress.step == len(self.steps)

    def _position(self) -> dict[str, Any]:
        """The first fields of every row."""
        step = self.state.progress.step
        return {"stage": self.stage, "step": step, "epoch": round(step / self.steps_per_epoch, 4)}

    def _log_row(self, grad_norm: float, learning_rate: float) -> float:
        """Write the row of this step; returns its loss."""
        state = self.state
        taken = Sums.merge(self.world.gather(state.sums.take()))
        row = {
            **(self.objective.average(taken) if taken else {"loss": math.nan}),
            "grad_norm": grad_norm,
            **state.progress.watch.row(),
            "learning_rate": learning_rate,
            "num_tokens": round(self.world.sum([self.clock.num_tokens])[0]),
        }
        if retries := round(self.world.sum([state.oom_retries])[0]):
            row["oom_retries"] = retries
        self.output.log.write({**self._position(), **row, **self.clock.row()})
        state.progress.final |= row
        return row["loss"]

    def _after_step(self) -> None:
        """Evaluate, save and stop, if due."""
        progress = self.state.progress
        last = self._is_last()
        better = False
        if self.data.held_out and (last or _is_due(self.settings.eval_steps, progress.step)):
            with self.clock.exclude("evaluation"):
                evaluated = self.evaluate()
            progress.owes_evaluation = evaluated is None
            if evaluated is not None:
                better = self._is_best(evaluated)
                self.output.log.write({**self._position(), **evaluated})
                progress.final |= evaluated
        stopping = self.stepper.should_stop(together=True)
        if last or stopping or better or _is_due(self.settings.save_steps, progress.step):
            self._save()
        if stopping and (not last or progress.owes_evaluation):
            self._interrupt()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float] | None:
        """The objective's metrics over the held-out groups, prefixed `eval_`; `eval_left_out`
        counts groups whose image could not be read.

        None after a stop request. Raises DataError when no group could be read.
        """
        data, settings = self.data, self.settings
        size = 4 * settings.per_device_train_batch_size
        steps = plan_one_epoch(settings, data.held_out, size, self.world, shuffle=False)
        feed = StepFeed(data.held_out, steps, data.pixels, data.image_token_id, self.stage)
        sums, cut_short = Sums(), False
        failed: set[Any] = set()
        self.model.model.eval()
        for step in load_steps(feed, num_workers=0):
            cut_short = self.stepper.should_stop(together=self.sharded)
            if cut_short:
                break
            self._record_rejected(step.rejected)
            failed.update((record.id, record.line) for record in step.rejected)
            for batch, counts in self.stepper.add_fillers(step.batches):
                values = self.objective.sum_losses(batch.to(self.device))[1]
                if counts:
                    sums.add(values)
        self.model.model.train()
        if self.world.any(cut_short):
            return None
        taken = Sums.merge(self.world.gather(sums.take()))
        if not taken:
            self.state.progress.owes_evaluation = True
            self._stop_unreadable("no held-out sample")
        row = self.objective.average(taken)
        if left_out := round(self.world.sum([len(failed)])[0]):
            row["left_out"] = left_out
        return {f"eval_{name}": value for name, value in row.items()}

    def _record_rejected(self, records: Sequence[RejectedRecord]) -> None:
        """List samples whose image could not be read, once per stage."""
        if not records:
            return
        listed = {(one["file"], one["line"], one["id"]) for one in self.state.rejected}
        for record in records:
            if (record.file, record.line, record.id) not in listed:
                listed.add((record.file, record.line, record.id))
                self.state.rejected.append(record.to_json())

    def _stop_unreadable(self, what: str) -> NoReturn:
        """Save the steps so far, then raise DataError."""
        self._save_once()
        last = next((f" ({r['reason']}: {r['detail']})" for r in self.state.rejected[-1:]), "")
        raise DataError(
            f"{self.stage}: {what} could be read{last}; check that the images still exist, then "
            f"{RESUME}"
        )

    def _is_best(self, evaluated: dict[str, float]) -> bool:
        """Whether this evaluation is the best so far; if so it is kept in the progress."""
        if self.metric is None:
            return False
        progress = self.state.progress
        name = f"eval_{self.metric.removeprefix('eval_')}"
        if name not in evaluated:
            raise UsageError(
                f"metric_for_best_model {self.metric}: {self.stage} has {', '.join(evaluated)}"
            )
        value = evaluated[name]
        sign = -1 if name.endswith("loss") else 1  # transformers' rule
        if math.isnan(value) or (progress.best and value * sign <= progress.best["value"] * sign):
            return False
        progress.best = {"metric": name, "value": value, "step": progress.step}
        return True

    def _checkpoint_path(self, step: int) -> Path:
        return self.output.folder / f"checkpoint-{step}"

    def _save(self) -> None:
        progress = self.state.progress
        progress.seconds = time.perf_counter() - self.begun
        progress.throughput |= self.clock.stage()
        with self.clock.exclude("checkpoint"):
            content = {
                "global_step": progress.step,
                "max_steps": len(self.steps),
                "epoch": self._position()["epoch"],
                "log_history": self.output.log.rows_of_stage(self.stage),
                BEGUN_WITH: self.output.begun_with,
                **self.state.to_json(),
            }
            best = progress.best
            if best:
                content["best_metric"] = best["value"]
                content["best_global_step"] = best["step"]
                content["best_model_checkpoint"] = str(self._checkpoint_path(best["step"]))
            self.saved = write_checkpoint(
                self.output.folder,
                progress.step,
                self._write_tensors,
                replace_nonfinite(content),
                world=self.world,
                save_total_limit=self.settings.save_total_limit,
                keep=self._checkpoint_path(best["step"]) if best else None,
            )

    def _write_tensors(self, folder: Path) -> None:
        """Write the model and AdamW's state; every rank must call it."""
        if self.sharded:
            names = self.world.on_main(lambda: self.output.save_model(folder, True))
            weights = collect_weights(self.model.model)
            write_model({names[name]: value for name, value in weights.items()}, folder, self.world)
            write_shards(self.state.optimizer_tensors(), folder / OPTIMIZER)
            return

        def write() -> None:
            self.output.save_model(folder, False)
            (folder / OPTIMIZER).mkdir()
            tensors = self.state.optimizer_tensors()
            save_file(
                {name: value.cpu().contiguous() for name, value in tensors.items()},
                folder / OPTIMIZER / "adamw.safetensors",
            )

        self.world.on_main(write)

    def _save_once(self) -> None:
        """Save the steps so far unless they are saved."""
        step = self.state.progress.step
        if step and (self.saved is None or self.saved.name != self._checkpoint_path(step).name):
            self._save()

    def _interrupt(self) -> NoReturn:
        """Save the steps so far, then raise Interrupted."""
        self._save_once()
        step = self.state.progress.step
        reason = next(reason for reason in self.world.gather(self.stop.reason) if reason)
        raise Interrupted(
            f"stopped by {reason} after {self.stage} step {step} of {len(self.steps)}; {RESUME}"
        )


def make_clock(
    model: PackedModel, objective: Objective, device: torch.device, world: World, *, bf16: bool
) -> Clock:
    """A clock that counts the FLOPs of the stage's batches against the device's peak."""
    count = FlopCounter(model)

    def flops(batch: PackedBatch) -> float:
        return count(batch, reference=objective.computes_reference(batch)).total

    return Clock(world, flops, peak_flops(device, torch.bfloat16 if bf16 else torch.float32))


def _is_due(steps: int, number: int) -> bool:
    return steps > 0 and number % steps == 0

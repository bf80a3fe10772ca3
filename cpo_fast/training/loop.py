"""The training loop of both stages: plan, feed, step, metrics, evaluation, checkpoints.

An optimiser step is a fixed number of pairs (SFT: samples); how they are packed, and on how many
processes, decides only how they are computed. The plan of an epoch is a pure function of (data,
seed, epoch); every rank goes through the same steps and takes the same decisions.
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
from cpo_fast.loss.losses import LOSS_TYPES
from cpo_fast.model.flops import FlopCounter, peak_flops
from cpo_fast.model.packed import PackedModel
from cpo_fast.packing import packing_efficiency
from cpo_fast.run.arguments import TrainArguments
from cpo_fast.run.resume import BEGUN_WITH
from cpo_fast.training.bar import StageBar
from cpo_fast.training.checkpoint import write_checkpoint
from cpo_fast.training.clock import Clock
from cpo_fast.training.distributed import World
from cpo_fast.training.feed import StepFeed, step_loader
from cpo_fast.training.interrupt import Interrupted, StopRequest
from cpo_fast.training.metrics import MetricsLog, Sums, finite
from cpo_fast.training.objectives import Objective
from cpo_fast.training.plan import epoch_steps, stage_steps
from cpo_fast.training.sharding import is_sharded, unaliased, write_model, write_shards
from cpo_fast.training.state import OPTIMIZER, StageState
from cpo_fast.training.step import Stepper
from cpo_fast.types import PackedBatch, Pixels, PreferenceGroup, RejectedRecord


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
    """One stage ("sft" or "cpo") on one device per process of `world`.

    `save_model(folder, sharded)` writes the model as it is loaded again: all of it, or all but the
    weights where this process holds shards of them; returns the names of the weights left out in
    that layout.
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
    save_model: Callable[[Path, bool], dict[str, str]]
    device: torch.device
    stop: StopRequest
    resume: Path | None = None
    world: World = field(default_factory=World)
    begun_with: dict[str, Any] = field(default_factory=dict)  # see resume.py

    def run(self) -> StageResult:
        """Train until the steps or epochs asked for are done; the last step is always saved.

        With `resume` it goes on after that checkpoint exactly as if it had never stopped. Raises
        Interrupted when a stop was asked for (a checkpoint is written first), and CpoFastError when
        `max_nonfinite_steps` steps in a row had a loss or gradient that is not finite; DataError
        when as many had no sample whose image could be read, or no held-out sample had one.
        """
        self._prepare()
        state, stepper, clock, log = self.state, self.stepper, self.clock, self.log
        progress = state.progress
        log.rewind(self.stage, progress.step)
        self.begun = time.perf_counter() - progress.seconds
        feed = StepFeed(self.groups, self.steps, self.pixels, self.image_token_id, self.stage)
        empty = 0  # steps in a row without an image that could be read
        loader = step_loader(
            feed, num_workers=self.args.dataloader_num_workers, start=progress.step
        )
        bar = StageBar(self.stage, len(self.steps), progress.step, shows=self.world.is_main)
        self.model.model.train()
        try:
            if progress.owes_evaluation:
                self._after_step()  # a stop had cut it short
            for number, batch in enumerate(clock.waiting(loader), start=progress.step + 1):
                outcome = stepper(number, batch, partial(feed.halved, number - 1))
                if not outcome.finished:
                    self._leave()
                self._set_aside(batch.rejected)
                empty = empty + 1 if outcome.empty else 0
                if empty >= min(self.args.max_nonfinite_steps, len(self.steps)):
                    self._nothing_read(f"no training sample of {counted(empty, 'step')} in a row")
                progress.step = number
                progress.nonfinite_in_a_row = stepper.nonfinite_in_a_row
                state.oom_retries += outcome.oom_retries
                if outcome.sums is not None:
                    state.sums.add(outcome.sums)
                    progress.watch.see(outcome.loss, outcome.grad_norm)
                learning_rate = float(state.scheduler.get_last_lr()[0])
                state.scheduler.step()
                clock.count_step(batch.batches)
                loss = None
                if self._last() or _every(self.args.logging_steps, number):
                    loss = self._log_row(outcome.grad_norm, learning_rate)
                self._after_step()
                bar.update(loss)
        finally:
            bar.close()
        assert self.saved is not None
        best = self.args.load_best_model_at_end
        checkpoint = self._checkpoint(progress.best["step"]) if best else self.saved
        set_aside = [
            RejectedRecord(**record)
            for of_rank in self.world.gather(state.rejected)
            for record in of_rank
        ]
        efficiency = packing_efficiency(self.groups, self.steps, self.args.packing_length)
        throughput = progress.throughput | {"packing_efficiency": round(efficiency, 4)}
        return StageResult(
            len(self.steps),
            progress.seconds,
            checkpoint,
            progress.final,
            throughput | clock.stage(),
            set_aside,
        )

    def _prepare(self) -> None:
        """The plan, and everything that changes, new or as the checkpoint left it."""
        args = self.args
        self.steps, self.steps_per_epoch = stage_steps(args, self.stage, self.groups, self.world)
        self.metric = args.of_stage(self.stage)["metric_for_best_model"]
        if self.metric is None and args.load_best_model_at_end:
            self.metric = "loss"
        if self.metric is not None and not self.eval_groups:
            raise DataError(f"{self.stage}: no sample is held out to tell the best model by")
        self.clock = new_clock(self.model, self.stage, args, self.device, self.world)
        self.sharded = is_sharded(list(self.model.model.parameters()))
        self.state = StageState(
            args,
            self.stage,
            self.model.model,
            len(self.steps),
            sharded=self.sharded,
            world=self.world,
            clock=self.clock,
        )
        torch.manual_seed(args.seed + self.world.rank)
        self.saved = self.resume
        if self.resume is not None:
            self.state.restore(self.resume)
            last = self.state.progress.step
            if last >= len(self.steps) and self.world.is_main:
                print(f"{self.stage}: nothing is left to train: {self.resume} is the last of "
                      f"{last} steps")  # fmt: skip
        nonfinite = MetricsLog(
            self.log.path.with_name("nonfinite_steps.jsonl"),
            fresh=() if self.resume else (self.stage,),
            writes=self.log.writes,
        )
        nonfinite.rewind(self.stage, self.state.progress.step)
        self.stepper = Stepper(
            self.stage,
            self.model,
            self.objective,
            self.state.optimizer,
            self.groups[0],
            self.device,
            self.clock,
            max_grad_norm=args.max_grad_norm,
            max_nonfinite_steps=args.max_nonfinite_steps,
            nonfinite=nonfinite,
            nonfinite_in_a_row=self.state.progress.nonfinite_in_a_row,
            stop=self.stop,
            world=self.world,
        )

    def _last(self) -> bool:
        return self.state.progress.step == len(self.steps)

    def _at(self) -> dict[str, Any]:
        """What every row begins with."""
        step = self.state.progress.step
        return {"stage": self.stage, "step": step, "epoch": round(step / self.steps_per_epoch, 4)}

    def _log_row(self, grad_norm: float, learning_rate: float) -> float:
        """Write the row of this step; returns its loss."""
        state = self.state
        taken = Sums.together(self.world.gather(state.sums.take()))
        row = {
            **(self.objective.row(taken) if taken else {"loss": math.nan}),
            "grad_norm": grad_norm,
            **state.progress.watch.row(),
            "learning_rate": learning_rate,
            "num_tokens": round(self.world.sum([self.clock.num_tokens])[0]),
        }
        if retries := round(self.world.sum([state.oom_retries])[0]):
            row["oom_retries"] = retries
        self.log.write({**self._at(), **row, **self.clock.row()})
        state.progress.final |= row
        return row["loss"]

    def _after_step(self) -> None:
        """Evaluate, save and stop, as far as each is due."""
        progress = self.state.progress
        last = self._last()
        better = False
        if self.eval_groups and (last or _every(self.args.eval_steps, progress.step)):
            with self.clock.apart("evaluation"):
                evaluated = self.evaluate()
            progress.owes_evaluation = evaluated is None
            if evaluated is not None:
                better = self._is_best(evaluated)
                self.log.write({**self._at(), **evaluated})
                progress.final |= evaluated
        stopping = self.stepper.stopping(together=True)
        if last or stopping or better or _every(self.args.save_steps, progress.step):
            self._save()
        if stopping and (not last or progress.owes_evaluation):
            self._leave()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float] | None:
        """The objective's metrics over the held-out groups, each with `eval_` in front;
        `eval_left_out` counts those whose image could not be read.

        None when a stop was asked for meanwhile. Raises DataError when none could be read.
        """
        size = self.args.of_stage(self.stage)["per_device_train_batch_size"]
        steps = epoch_steps(self.args, self.eval_groups, size * 4, self.world, shuffle=False)
        feed = StepFeed(self.eval_groups, steps, self.pixels, self.image_token_id, self.stage)
        sums, cut_short = Sums(), False
        failed: set[Any] = set()
        self.model.model.eval()
        for step in step_loader(feed, num_workers=0):
            cut_short = self.stepper.stopping(together=self.sharded)
            if cut_short:
                break
            self._set_aside(step.rejected)
            failed.update((record.id, record.line) for record in step.rejected)
            for batch, counts in self.stepper.level(step.batches):
                values = self.objective.summed(batch.to(self.device))[1]
                if counts:
                    sums.add(values)
        self.model.model.train()
        if self.world.any(cut_short):
            return None
        taken = Sums.together(self.world.gather(sums.take()))
        if not taken:
            self.state.progress.owes_evaluation = True
            self._nothing_read("no held-out sample")
        row = self.objective.row(taken)
        if left_out := round(self.world.sum([len(failed)])[0]):
            row["left_out"] = left_out
        return {f"eval_{name}": value for name, value in row.items()}

    def _set_aside(self, records: Sequence[RejectedRecord]) -> None:
        """List samples whose image could not be read, each once in the stage."""
        if not records:
            return
        listed = {(one["file"], one["line"], one["id"]) for one in self.state.rejected}
        for record in records:
            if (record.file, record.line, record.id) not in listed:
                listed.add((record.file, record.line, record.id))
                self.state.rejected.append(record.to_json())

    def _nothing_read(self, what: str) -> NoReturn:
        """Raise DataError; what the steps before have done is saved first, if it is not yet."""
        self._save_once()
        last = next((f" ({r['reason']}: {r['detail']})" for r in self.state.rejected[-1:]), "")
        raise DataError(
            f"{self.stage}: {what} could be read{last}; are the images still there? Go on with "
            "--resume_from_checkpoint auto"
        )

    def _is_best(self, evaluated: dict[str, float]) -> bool:
        """Whether this evaluation is the best so far; kept in the progress when it is."""
        if self.metric is None:
            return False
        progress = self.state.progress
        name = f"eval_{self.metric.removeprefix('eval_')}"
        if name not in evaluated:
            raise UsageError(
                f"--metric_for_best_model {self.metric}: {self.stage} has {', '.join(evaluated)}"
            )
        value = evaluated[name]
        sign = -1 if name.endswith("loss") else 1  # transformers' rule of what is better
        if math.isnan(value) or (progress.best and value * sign <= progress.best["value"] * sign):
            return False
        progress.best = {"metric": name, "value": value, "step": progress.step}
        return True

    def _checkpoint(self, step: int) -> Path:
        return self.stage_dir / f"checkpoint-{step}"

    def _save(self) -> None:
        progress = self.state.progress
        progress.seconds = time.perf_counter() - self.begun
        progress.throughput |= self.clock.stage()
        with self.clock.apart("checkpoint"):
            content = {
                "global_step": progress.step,
                "max_steps": len(self.steps),
                "epoch": self._at()["epoch"],
                "log_history": self.log.of_stage(self.stage),
                BEGUN_WITH: self.begun_with,
                **self.state.to_json(),
            }
            best = progress.best
            if best:
                content["best_metric"] = best["value"]
                content["best_global_step"] = best["step"]
                content["best_model_checkpoint"] = str(self._checkpoint(best["step"]))
            self.saved = write_checkpoint(
                self.stage_dir,
                progress.step,
                self._write_tensors,
                finite(content),
                world=self.world,
                save_total_limit=self.args.save_total_limit,
                keep=self._checkpoint(best["step"]) if best else None,
            )

    def _write_tensors(self, folder: Path) -> None:
        """The model, and AdamW's state beside it; every rank calls it."""
        if self.sharded:
            names = self.world.on_main(lambda: self.save_model(folder, True))
            weights = unaliased(self.model.model)
            write_model({names[name]: value for name, value in weights.items()}, folder, self.world)
            write_shards(self.state.optimizer_tensors(), folder / OPTIMIZER)
            return

        def write() -> None:
            self.save_model(folder, False)
            (folder / OPTIMIZER).mkdir()
            tensors = self.state.optimizer_tensors()
            save_file(
                {name: value.cpu().contiguous() for name, value in tensors.items()},
                folder / OPTIMIZER / "adamw.safetensors",
            )

        self.world.on_main(write)

    def _save_once(self) -> None:
        """Save the steps so far, unless it has been done."""
        step = self.state.progress.step
        if step and (self.saved is None or self.saved.name != self._checkpoint(step).name):
            self._save()

    def _leave(self) -> NoReturn:
        """Raise Interrupted; what the steps before have done is saved first, if it is not yet."""
        self._save_once()
        step = self.state.progress.step
        reason = next(reason for reason in self.world.gather(self.stop.reason) if reason)
        raise Interrupted(
            f"stopped by {reason} after {self.stage} step {step} of {len(self.steps)}; go on "
            "with --resume_from_checkpoint auto"
        )


def new_clock(
    model: PackedModel, stage: str, args: TrainArguments, device: torch.device, world: World
) -> Clock:
    """A clock that knows the FLOPs of the stage's batches and what the device could do."""
    count = FlopCounter(model)
    on_line = stage == "cpo" and LOSS_TYPES[args.loss_type].reference

    def flops(batch: PackedBatch) -> float:
        return count(batch, reference=on_line and batch.ref_logps is None).total

    return Clock(world, flops, peak_flops(device, torch.bfloat16 if args.bf16 else torch.float32))


def _every(steps: int, number: int) -> bool:
    return steps > 0 and number % steps == 0

"""One optimiser step: forward and backward of its packs; gradients summed, clipped and applied.

A step that is not finite never reaches the weights. A step that does not fit in memory is computed
again in smaller packs. A step that a stop request interrupts changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from cpo_fast.counting import counted
from cpo_fast.errors import CpoFastError
from cpo_fast.model.packed import PackedModel
from cpo_fast.training.clock import Clock
from cpo_fast.training.distributed import World
from cpo_fast.training.feed import StepBatch
from cpo_fast.training.metrics import MetricsLog, Sums
from cpo_fast.training.objectives import Objective
from cpo_fast.training.sharding import is_sharded, make_filler, sum_and_clip
from cpo_fast.training.state import restore_generators, save_generators
from cpo_fast.types import PackedBatch, PreferenceGroup


class Stops(Protocol):
    """Asked between packs whether the run should stop; interrupt.StopRequest implements it."""

    def pending(self) -> bool: ...


@dataclass(frozen=True)
class Outcome:
    """Result of a step. Not `finished`: a stop came between two packs and nothing changed."""

    grad_norm: float = 0.0
    loss: float = 0.0
    sums: dict[str, float] | None = None  # of this rank; None if the step was not finite
    oom_retries: int = 0
    finished: bool = True
    empty: bool = False  # no image of the step could be read on any rank


@dataclass
class Stepper:
    """Computes the steps of one stage. `nonfinite` logs steps that are not finite."""

    stage: str
    model: PackedModel
    objective: Objective
    optimizer: torch.optim.Optimizer
    like: PreferenceGroup  # any sample of the stage, the pattern of fillers (`add_fillers`)
    device: torch.device
    clock: Clock
    max_grad_norm: float = 1.0
    max_nonfinite_steps: int = 3
    nonfinite: MetricsLog | None = None
    nonfinite_in_a_row: int = 0
    stop: Stops | None = None
    world: World = World()  # noqa: RUF009 (frozen)

    @cached_property
    def sharded(self) -> bool:
        return is_sharded(list(self.model.model.parameters()))

    def add_fillers(self, batches: Sequence[PackedBatch]) -> list[tuple[PackedBatch, bool]]:
        """(batch, counts) pairs: fillers that do not count are added, because sharded layers must
        compute equally often on all ranks."""
        padded = [(batch, True) for batch in batches]
        if self.sharded:
            most = max(self.world.gather(len(padded)))
            padded += [(make_filler(self.like), False)] * (most - len(padded))
        return padded

    def should_stop(self, *, together: bool) -> bool:
        """Whether a stop was requested: on any rank if `together`, else on this rank."""
        pending = self.stop is not None and self.stop.pending()
        return self.world.any(pending) if together else pending

    def __call__(self, number: int, step: StepBatch, halve: Callable[[], StepBatch]) -> Outcome:
        """Step `number`: the summed losses of its packs, divided by the weight of the whole step.

        Out of memory, the step is computed once more on `halve()`. Raises CpoFastError when that
        does not fit either, or when `max_nonfinite_steps` steps in a row were not finite.
        """
        total = self.world.sum([sum(self.objective.weigh(batch) for batch in step.batches)])[0]
        if not total:  # every image of the step failed; the step still counts
            return Outcome(empty=not self.world.any(bool(step.batches)))
        before = save_generators()
        retries = 0
        try:
            own, full = self._backward(step, total), None
        except torch.OutOfMemoryError as error:
            own, full = None, str(error)  # retry outside: `error` keeps the activations alive
        if full is not None:
            own = self._retry_in_halves(halve, full, total)
            retries = 1
        with self.clock.phase("backward"):
            sums = own.read() if own is not None else {}  # waits for the device
        with self.clock.phase("wait"):  # for the other ranks
            summed, cut_short = self.world.sum([sums.get("loss", 0.0), float(own is None)])
        if cut_short:
            self.optimizer.zero_grad(set_to_none=True)
            restore_generators(before)
            return Outcome(finished=False)
        loss = summed / total
        with self.clock.phase("optimiser"):
            parameters = self.optimizer.param_groups[0]["params"]
            grad_norm = sum_and_clip(parameters, self.max_grad_norm or math.inf, self.world)
            good = math.isfinite(grad_norm) and math.isfinite(loss)
            if good:
                self.optimizer.step()
                self.nonfinite_in_a_row = 0
            else:
                self._log_nonfinite(number, step, grad_norm, loss)
            self.optimizer.zero_grad(set_to_none=True)
        return Outcome(grad_norm, loss, sums if good else None, retries)

    def _backward(self, step: StepBatch, total: float) -> Sums | None:
        """Accumulate the gradients of the step's packs and return their sums; None when a stop was
        requested before the last pack.
        """
        own = Sums()
        batches = self.add_fillers(step.batches)
        for index, (batch, counts) in enumerate(batches):
            if index and self.should_stop(together=self.sharded):
                return None
            with self.clock.phase("forward"):
                loss, values = self.objective.sum_losses(batch.to(self.device))
            if counts:
                own.add(values)
            with self.clock.phase("backward"):
                (loss / total if counts else loss * 0.0).backward()
        return own

    def _retry_in_halves(
        self, halve: Callable[[], StepBatch], reason: str, total: float
    ) -> Sums | None:
        """The whole step again in packs of half the size; partial gradients are dropped first."""
        advice = (
            f"{self.stage}: out of memory ({reason.splitlines()[0]}). Lower packing_length "
            "or set gradient_checkpointing"
        )
        if self.sharded:  # the other ranks would not gather the layers again
            raise CpoFastError(advice)
        self.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            return self._backward(halve(), total)
        except torch.OutOfMemoryError as error:
            raise CpoFastError(f"{advice} (packs of half the size did not fit either)") from error

    def _log_nonfinite(self, number: int, step: StepBatch, grad_norm: float, loss: float) -> None:
        """Log the samples of a step that is not finite; raise if it keeps happening."""
        own = sorted({n.rsplit("/", 1)[0] for b in step.batches for n in b.segment_names})
        names = sorted({name for of_rank in self.world.gather(own) for name in of_rank})
        if self.nonfinite is not None:
            numbers = {"loss": str(loss), "grad_norm": str(grad_norm)}
            self.nonfinite.write({"stage": self.stage, "step": number, **numbers, "ids": names})
        self.nonfinite_in_a_row += 1
        if self.nonfinite_in_a_row >= self.max_nonfinite_steps:
            bad = [
                name
                for name, value in self.model.model.named_parameters()
                if not value.detach().isfinite().all()
            ]
            path = self.nonfinite.path if self.nonfinite is not None else "The log"
            weights = f" Weights already not finite: {', '.join(bad[:5])}." if bad else ""
            raise CpoFastError(
                f"{self.stage} step {number}: loss {loss}, gradient norm {grad_norm}; not finite "
                f"for {counted(self.nonfinite_in_a_row, 'step')} in a row. The weights are "
                f"unchanged.{weights} {path} lists the samples. Check them or lower the "
                "learning rate"
            )

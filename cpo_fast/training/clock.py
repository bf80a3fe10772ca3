"""Throughput, MFU, memory and time shares of a stage, without start-up and warm-up steps."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from cpo_fast.training.distributed import World
from cpo_fast.types import PackedBatch

Item = TypeVar("Item")
WARM_UP_STEPS = 2  # first-touch memory, lazy initialisation, the loader's first batch


class Clock:
    """Counts samples and tokens against the wall time of training steps, not evaluation or saving.

    Physical tokens are computed; logical tokens are what the same pairs need without shared
    prompts. Rates are totals over all processes of `world`, except where their name says per GPU.
    `flops(batch)`: model FLOPs (model/flops.py); `peak`: peak FLOP/s of one device. Without them
    there is no MFU.
    """

    def __init__(
        self,
        world: World,
        flops: Callable[[PackedBatch], float] | None = None,
        peak: float | None = None,
    ) -> None:
        self.world = world
        self.steps = 0
        self.num_tokens = 0
        self.flops = flops
        self.peak = peak
        self._row = _Count()
        self._stage = _Count()
        self._row_phases: dict[str, float] = defaultdict(float)
        self._phases: dict[str, float] = defaultdict(float)
        self._excluded: dict[str, list[float]] = defaultdict(list)
        self._mark = time.perf_counter()

    @contextmanager
    def exclude(self, name: str) -> Iterator[None]:
        """Time an evaluation or checkpoint separately; it does not count in the throughput."""
        begun = time.perf_counter()
        yield
        now = time.perf_counter()
        self._excluded[name].append(now - begun)
        self._mark += now - begun

    def time_waiting(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield `items`; the time spent waiting for each counts as the phase "data"."""
        iterator = iter(items)
        nothing: Any = object()
        while True:
            begun = time.perf_counter()
            item = next(iterator, nothing)
            if item is nothing:  # waiting for the workers to end belongs to no step
                return
            self._add("data", time.perf_counter() - begun)
            yield item

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Host time of a phase; on CUDA, queued work can end in a later phase."""
        begun = time.perf_counter()
        yield
        self._add(name, time.perf_counter() - begun)

    def _add(self, name: str, seconds: float) -> None:
        self._row_phases[name] += seconds
        if self.steps >= WARM_UP_STEPS:
            self._phases[name] += seconds

    def seconds(self, phase: str) -> float:
        """Seconds of a phase since the last row."""
        return self._row_phases[phase]

    def count_step(self, batches: Iterable[PackedBatch]) -> None:
        count = _Count()
        for batch in batches:
            count.samples += len(batch.pairs) or batch.num_segments
            count.physical += batch.input_ids.numel()
            count.logical += batch.logical_tokens
            count.flops += self.flops(batch) if self.flops is not None else 0.0
        now = time.perf_counter()
        count.seconds = now - self._mark
        self._mark = now
        self._row.add(count)
        if self.steps >= WARM_UP_STEPS:
            self._stage.add(count)
        self.steps += 1
        self.num_tokens += count.physical

    def row(self) -> dict[str, float]:
        """Timing fields since the last row, `time/...` as shares; memory: peak of the run."""
        total = self._row.seconds
        shares = {name: seconds / total for name, seconds in sorted(self._row_phases.items())}
        shares["other"] = max(0.0, 1.0 - sum(shares.values()))
        rates = self._row.rates(self.world, self.peak)
        self._row = _Count()
        self._row_phases.clear()
        tokens = rates.pop("physical_tokens_per_second")
        rates["tokens_per_second_per_gpu"] = round(tokens / self.world.size, 1)
        rates["peak_memory_gib"] = round(max(self.world.gather(peak_memory())) / 2**30, 3)
        return rates | {f"time/{name}": round(share, 4) for name, share in shares.items()}

    def stage(self) -> dict[str, float | dict[str, float]]:
        """Throughput of the stage, time share of each phase, and mean seconds per evaluation and
        per checkpoint."""
        excluded: dict[str, float | dict[str, float]] = {
            f"seconds_per_{name}": round(sum(each) / len(each), 3)
            for name, each in self._excluded.items()
        }
        if not (total := self._stage.seconds):
            return excluded
        shares = {name: round(value / total, 4) for name, value in sorted(self._phases.items())}
        return {**self._stage.rates(self.world, self.peak), **excluded, "time": shares}


def peak_memory() -> int:
    """Peak bytes that PyTorch allocated on this process's GPU; without a GPU, peak RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Count:
    def __init__(self) -> None:
        self.seconds = self.flops = 0.0
        self.samples = self.physical = self.logical = 0

    def add(self, other: _Count) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def rates(self, world: World, peak: float | None) -> dict[str, float]:
        counts = [self.samples, self.physical, self.logical, self.flops]
        samples, physical, logical, flops = world.sum(counts)
        rates = {
            "pairs_per_second": round(samples / self.seconds, 3),
            "physical_tokens_per_second": round(physical / self.seconds, 1),
            "logical_tokens_per_second": round(logical / self.seconds, 1),
        }
        if peak is not None:
            rates["mfu"] = round(flops / self.seconds / (peak * world.size), 4)
        return rates

"""Throughput and time shares of a stage, start-up and warm-up steps left out."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from cpo_fast.training.distributed import World
from cpo_fast.types import PackedBatch

Item = TypeVar("Item")
WARM_UP_STEPS = 2  # first-touch memory, lazy initialisation, the loader's first batch


class Clock:
    """Counts samples and tokens against the wall time of training steps, not evaluation or saving.

    Physical tokens are those computed; logical tokens are what the same pairs would take unshared.
    Rates are those of all processes of `world` together, unless they say otherwise.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.steps = 0
        self.num_tokens = 0
        self._row = _Count()
        self._stage = _Count()
        self._phases: dict[str, float] = defaultdict(float)
        self._mark = time.perf_counter()

    def resume(self) -> None:
        """Start counting here: evaluation or a checkpoint before it is nobody's throughput."""
        self._mark = time.perf_counter()

    def waiting(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield `items`, counting the time that each one was waited for as the phase "data"."""
        iterator = iter(items)
        while True:
            with self.phase("data"):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Host time of a phase; on CUDA the work that was queued may end in a later phase."""
        begun = time.perf_counter()
        yield
        if self.steps >= WARM_UP_STEPS:
            self._phases[name] += time.perf_counter() - begun

    def count_step(self, batches: Iterable[PackedBatch]) -> None:
        now = time.perf_counter()
        count = _Count(seconds=now - self._mark)
        for batch in batches:
            count.samples += len(batch.pairs) or batch.num_segments
            count.physical += batch.input_ids.numel()
            count.logical += batch.logical_tokens
        self._mark = now
        self._row.add(count)
        if self.steps >= WARM_UP_STEPS:
            self._stage.add(count)
        self.steps += 1
        self.num_tokens += count.physical

    def row(self) -> dict[str, float]:
        """Timing fields since the last row."""
        rates = self._row.rates(self.world)
        self._row = _Count()
        tokens = rates.pop("physical_tokens_per_second")
        rates["tokens_per_second_per_gpu"] = round(tokens / self.world.size, 1)
        return rates

    def stage(self) -> dict[str, float | dict[str, float]]:
        """Throughput of the whole stage and the share of each phase in its time."""
        total = self._stage.seconds or float("nan")
        shares = {name: round(value / total, 4) for name, value in sorted(self._phases.items())}
        return {**self._stage.rates(self.world), "time": shares} if self._stage.seconds else {}


class _Count:
    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.samples = self.physical = self.logical = 0

    def add(self, other: _Count) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def rates(self, world: World) -> dict[str, float]:
        samples, physical, logical = world.sum([self.samples, self.physical, self.logical])
        return {
            "pairs_per_second": round(samples / self.seconds, 3),
            "physical_tokens_per_second": round(physical / self.seconds, 1),
            "logical_tokens_per_second": round(logical / self.seconds, 1),
        }

"""Batches prepared by worker processes, as in the trainer's feed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cpo_fast.training.feed import load_steps
from cpo_fast.training.stage_settings import StageSettings

WORKERS = StageSettings.dataloader_num_workers
ENDLESS = 1_000_000


@dataclass(frozen=True)
class Cycle:
    """The batches `make(x)` for all x in `parts`, repeated."""

    make: Callable[[Any], Any]
    parts: Sequence[Any]

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Any:
        return self.make(self.parts[index % len(self.parts)])


def prepare_batches(
    make: Callable[[Any], Any], parts: Sequence[Any], device: torch.device
) -> Iterator[Any]:
    """An endless stream of batches: prefetched by WORKERS processes for a GPU, built on demand for
    a CPU."""
    workers = WORKERS if device.type == "cuda" else 0
    return load_steps(Cycle(make, parts), num_workers=workers)

"""Optimiser steps as packed batches, prepared by worker processes."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset

from cpo_fast.errors import CpoFastError
from cpo_fast.packing import Step, collate
from cpo_fast.packing.plan import Pack
from cpo_fast.packing.readable import readable
from cpo_fast.training.checkpoint import RESUME
from cpo_fast.types import PackedBatch, Pixels, PreferenceGroup, RejectedRecord

MAX_DEATHS = 3  # worker processes that can die in a stage before the run stops


Item = TypeVar("Item", covariant=True)


class Items(Protocol[Item]):
    """Items that worker processes prepare by index, such as a StepFeed."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


@dataclass(frozen=True)
class StepBatch:
    """Micro-batches of one optimiser step, and the records whose images did not decode."""

    batches: tuple[PackedBatch, ...]
    rejected: tuple[RejectedRecord, ...] = ()

    def pin_memory(self) -> StepBatch:
        """Called by torch's DataLoader on machines with a GPU."""
        return replace(self, batches=tuple(batch.pin_memory() for batch in self.batches))


class StepFeed(Dataset):
    """Item i is optimiser step i of the plan. Groups with an unreadable image are left out and
    listed in `StepBatch.rejected`."""

    def __init__(
        self,
        groups: Sequence[PreferenceGroup],
        steps: Sequence[Step],
        pixels: Pixels | None,
        image_token_id: int | None,
        stage: str = "",
    ) -> None:
        self.groups = groups
        self.steps = steps
        self.pixels = pixels
        self.image_token_id = image_token_id
        self.stage = stage  # named in rejected records

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> StepBatch:
        return self._collate(self.steps[index])

    def halve(self, index: int) -> StepBatch:
        """The same step with every pack of several groups split in two."""
        return self._collate(
            half for pack in self.steps[index] for half in (pack[0::2], pack[1::2])
        )

    def _collate(self, packs: Iterable[Pack]) -> StepBatch:
        batches, rejected = [], []
        for pack in packs:
            found = readable(self.groups, pack, self.pixels, self.image_token_id)
            for index, error in found.failed:
                group = self.groups[index]
                rejected.append(RejectedRecord.of(group.id, group.origin, error, stage=self.stage))
            if found.pack:
                batch = collate(
                    self.groups,
                    found.pack,
                    pixels=found.decoded.__getitem__,
                    image_token_id=self.image_token_id,
                )
                batches.append(batch)
        return StepBatch(tuple(batches), tuple(rejected))


def _ignore_signals(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # both can reach the whole process group
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _kill_workers() -> None:
    """Kill the workers when an error ends the run: they ignore Python's SIGTERM, and Python would
    wait for them forever."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def load_steps(feed: Items[Item], *, num_workers: int, start: int = 0) -> Iterator[Item]:
    """Yield the items (steps) of `feed` from `start` on, in order for any number of workers.

    Workers that die (killed, out of memory) are replaced and their items made again, since an item
    is a pure function of its index. Raises CpoFastError after more than `MAX_DEATHS` deaths.
    """
    deaths = 0
    while start < len(feed):
        try:
            for batch in _start_loader(feed, num_workers, start):
                yield batch
                start += 1
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            deaths += 1
            if deaths > MAX_DEATHS:
                raise CpoFastError(
                    f"worker processes of the data feed died {deaths} times (out of memory? "
                    f"Lower dataloader_num_workers); {RESUME}"
                ) from error
            print(
                "warning: a worker process of the data feed died and was replaced", file=sys.stderr
            )


def _start_loader(feed: Items[Item], num_workers: int, start: int) -> Iterator[Item]:
    before = signal.getsignal(signal.SIGCHLD)
    loader = iter(
        DataLoader(
            cast(Any, feed),
            batch_size=None,
            sampler=range(start, len(feed)),
            num_workers=num_workers,
            prefetch_factor=2 if num_workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else every iterator draws from the global one
            worker_init_fn=_ignore_signals,
        )
    )
    # torch's handler would raise in the middle of a step; the next batch raises anyway.
    signal.signal(signal.SIGCHLD, before)
    return loader

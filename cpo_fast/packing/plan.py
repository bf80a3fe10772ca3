"""Groups -> optimiser steps -> packs, as a pure function of the data.

An optimiser step has exactly `pairs_per_step` pairs (samples for SFT); packs only determine how
they are computed. The mathematics of a run is therefore independent of the packing length and the
number of ranks.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cpo_fast.errors import UsageError
from cpo_fast.types import PreferenceGroup

Part = tuple[int, tuple[int, ...]]
"""(index of the group, indices of its rejected responses in this part; () for SFT)."""

Pack = tuple[Part, ...]
"""The parts of one forward; () is an empty pack, which only synchronises ranks."""


@dataclass(frozen=True, slots=True)
class Step:
    """The packs of one optimiser step on one rank.

    `num_pairs` counts the pairs (SFT: samples) of the step over *all* ranks, the divisor of the
    loss.
    """

    packs: tuple[Pack, ...]
    num_pairs: int

    def __iter__(self) -> Iterator[Pack]:
        return iter(self.packs)

    def __len__(self) -> int:
        return len(self.packs)


def part_tokens(groups: Sequence[PreferenceGroup], part: Part) -> int:
    """Tokens of a part in a pack: its prompts, chosen and rejected responses, each once."""
    index, which = part
    group = groups[index]
    tokens = len(group.prompt.input_ids) + len(group.chosen)
    for k in which:
        own = group.rejected_prompts[k] if group.rejected_prompts else None
        tokens += len(group.rejected[k]) + (len(own.input_ids) if own else 0)
    return tokens


def plan_epoch(
    groups: Sequence[PreferenceGroup],
    *,
    pairs_per_step: int,
    packing_length: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    expand_pairs: bool = False,
    shuffle: bool = True,
) -> list[Step]:
    """The optimiser steps of one epoch for one rank.

    Groups are shuffled by (number of groups, seed, epoch) alone and fill steps of exactly
    `pairs_per_step` pairs; the last step can be smaller. A group is split only where a step is full
    (its chosen response is then computed in both steps) or where it alone exceeds `packing_length`;
    a single pair that exceeds it has its own pack. `expand_pairs` shuffles single pairs, the sample
    order of trainers without groups. Within a step, parts are placed in as few packs as the
    heuristics find, with balanced sizes. All ranks have the same number of packs; some are empty if
    there are fewer parts.

    Raises UsageError for sizes below 1 and for SFT samples mixed with preference groups.
    """
    for name, value in (
        ("pairs_per_step", pairs_per_step),
        ("packing_length", packing_length),
        ("world_size", world_size),
    ):
        if value < 1:
            raise UsageError(f"{name}={value} must be at least 1")
    if not 0 <= rank < world_size:
        raise UsageError(f"rank={rank} is not one of {world_size} ranks")
    sft = [not group.rejected for group in groups]
    if any(sft) and not all(sft):
        raise UsageError(
            "SFT samples (without rejected) and preference pairs cannot be in the same epoch"
        )

    units = _units(groups, expand_pairs)
    if shuffle:
        random.Random(f"{seed}/{epoch}").shuffle(units)
    steps = []
    for parts in _fill_steps(units, pairs_per_step):
        pieces = [piece for part in parts for piece in _split(groups, part, packing_length)]
        packs = _pack(groups, pieces, packing_length, world_size)
        steps.append(Step(tuple(packs[rank::world_size]), sum(map(_pairs, parts))))
    return steps


def packing_efficiency(
    groups: Sequence[PreferenceGroup], steps: Sequence[Step], packing_length: int | None = None
) -> float:
    """Tokens in the packs / (number of packs x packing_length), without empty packs.

    Packs are not padded, so a value below 1 costs nothing as such. Without `packing_length` the
    divisor is each step's longest pack: the useful share of packs padded to equal length.
    """
    tokens = room = 0
    for step in steps:
        sizes = [sum(part_tokens(groups, part) for part in pack) for pack in step if pack]
        tokens += sum(sizes)
        room += len(sizes) * (packing_length or max(sizes, default=0))
    return tokens / room if room else 0.0


def _pairs(part: Part) -> int:
    return len(part[1]) or 1  # an SFT sample counts as one pair


def _units(groups: Sequence[PreferenceGroup], expand_pairs: bool) -> list[Part]:
    if expand_pairs:
        return [
            (i, (k,) if group.rejected else ())
            for i, group in enumerate(groups)
            for k in range(max(1, len(group.rejected)))
        ]
    return [(i, tuple(range(len(group.rejected)))) for i, group in enumerate(groups)]


def _fill_steps(units: Sequence[Part], pairs_per_step: int) -> Iterator[list[Part]]:
    parts: list[Part] = []
    room = pairs_per_step
    for index, which in units:
        while True:
            now, which = which[:room], which[room:]
            parts.append((index, now))
            room -= _pairs((index, now))
            if room == 0:
                yield parts
                parts, room = [], pairs_per_step
            if not which:
                break
    if parts:
        yield parts


def _split(groups: Sequence[PreferenceGroup], part: Part, packing_length: int) -> Iterator[Part]:
    """The part, split into pieces within the budget (single pairs excepted)."""
    index, which = part
    start = 0
    for end in range(1, len(which) + 1):
        over = part_tokens(groups, (index, which[start:end])) > packing_length
        if over and end - start > 1:
            yield index, which[start : end - 1]
            start = end - 1
    yield index, which[start:]


def _pack(
    groups: Sequence[PreferenceGroup],
    parts: Sequence[Part],
    packing_length: int,
    world_size: int,
) -> list[Pack]:
    """As few packs (a multiple of `world_size`) as the heuristics find, with balanced sizes.

    Ordered so that taking every world_size-th pack balances the ranks; a part over `packing_length`
    has its own pack.
    """
    sized = sorted(((part_tokens(groups, part), part) for part in parts), key=lambda s: -s[0])
    first_fit = _first_fit(sized, packing_length)
    tokens = sum(size for size, _ in sized)
    count = max(1, min(-(-tokens // packing_length), len(sized)))
    count += -count % world_size
    while (packs := _balance(sized, packing_length, count)) is None:
        if len(first_fit) == count:
            packs = first_fit
            break
        count += world_size
    if world_size == 1:
        return [tuple(pack) for pack in packs if pack]
    packs = sorted(packs, key=lambda pack: -sum(part_tokens(groups, part) for part in pack))
    rows = [packs[i : i + world_size] for i in range(0, len(packs), world_size)]
    return [tuple(pack) for i, row in enumerate(rows) for pack in (row[::-1] if i % 2 else row)]


def _balance(
    sized: Sequence[tuple[int, Part]], packing_length: int, count: int
) -> list[list[Part]] | None:
    """Parts, largest first, each into the emptiest of `count` packs; None if one does not fit."""
    packs: list[list[Part]] = [[] for _ in range(count)]
    emptiest = [(0, slot) for slot in range(count)]  # a heap
    for size, part in sized:
        load, slot = emptiest[0]
        if load and load + size > packing_length:
            return None
        packs[slot].append(part)
        heapq.heapreplace(emptiest, (load + size, slot))
    return packs


def _first_fit(sized: Sequence[tuple[int, Part]], packing_length: int) -> list[list[Part]]:
    """First-fit-decreasing, which sometimes needs one pack less than `_balance`."""
    packs: list[list[Part]] = []
    rooms: list[int] = []
    for size, part in sized:
        for slot, room in enumerate(rooms):
            if size <= room:
                packs[slot].append(part)
                rooms[slot] -= size
                break
        else:
            packs.append([part])
            rooms.append(packing_length - size)
    return packs

"""Time to plan an epoch, and packing efficiency.

Groups of CCF-like lengths: a prompt of 350 to 400 tokens with an image of 324 visual tokens, one
chosen and two rejected responses of 100 to 250 tokens each, about 900 tokens in total. Three
figures per setting: tokens / budget `packing_length`; the upper bound of that ratio for the same
steps (a step has a fixed number of pairs and a whole number of packs); tokens / length of the
step's longest pack, the efficiency if a step's packs were padded to one length. Packs are not
padded, so unused budget costs nothing.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from cpo_fast.packing import Step, packing_efficiency, plan_epoch
from cpo_fast.packing.plan import part_tokens
from cpo_fast.types import PreferenceGroup, Prompt

GROUPS = 20_000
PAIRS_PER_STEP = (32, 64, 128, 512)
PACKING_LENGTHS = (4096, 7424, 8192, 16384)


def make_groups(count: int) -> list[PreferenceGroup]:
    rng = random.Random(0)

    def draw(low: int, high: int) -> tuple[int, ...]:
        return (0,) * rng.randint(low, high)

    return [
        PreferenceGroup(
            str(i), Prompt(draw(350, 400)), draw(100, 250), (draw(100, 250), draw(100, 250))
        )
        for i in range(count)
    ]


def bound_efficiency(groups: list[PreferenceGroup], steps: list[Step], length: int) -> float:
    """Tokens / budget with the smallest possible number of packs per step."""
    sizes = [sum(part_tokens(groups, part) for pack in step for part in pack) for step in steps]
    return sum(sizes) / sum(-(-size // length) * length for size in sizes)


def test_planning(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    groups = make_groups(GROUPS)

    def plan(pairs: int, length: int) -> list[Step]:
        return plan_epoch(groups, pairs_per_step=pairs, packing_length=length, seed=0, epoch=0)

    benchmark.pedantic(plan, args=(64, 4096), rounds=3)
    lines = [
        f"\npacking efficiency of {GROUPS} groups: of the budget (upper bound) / "
        "of the longest pack"
    ]
    lines.append("pairs per step " + "".join(f"{length:>24}" for length in PACKING_LENGTHS))
    for pairs in PAIRS_PER_STEP:
        cells = []
        for length in PACKING_LENGTHS:
            steps = plan(pairs, length)
            of_budget = packing_efficiency(groups, steps, length)
            of_longest = packing_efficiency(groups, steps)
            bound = bound_efficiency(groups, steps, length)
            cells.append(f"{of_budget:.3f} ({bound:.3f}) / {of_longest:.3f}")
            figures = {"of_budget": of_budget, "possible": bound, "of_longest": of_longest}
            benchmark.extra_info[f"{pairs} pairs, {length} tokens"] = figures
        lines.append(f"{pairs:>14} " + "".join(f"{cell:>24}" for cell in cells))
    with capsys.disabled():
        print("\n".join(lines))

"""Planning an epoch: how long it takes, and how full the packs are.

Groups of CCF-like lengths: one image of 324 visual tokens in a prompt of 350 to 400, one chosen
and two rejected responses of 100 to 250 tokens each, so about 900 tokens. Three figures per
setting: tokens per token of the budget `packing_length`; the most that any packing of the same
steps could reach (a step is a fixed number of pairs and takes a whole number of packs); and tokens
per token of the step's longest pack. Packs are computed at their own length, so what is missing to
1 costs nothing by itself; the last figure is what would be useful if a step's packs were padded to
one length.
"""

from __future__ import annotations

import random

from cpo_fast.packing import Step, packing_efficiency, plan_epoch
from cpo_fast.packing.plan import part_tokens
from cpo_fast.types import PreferenceGroup, Prompt

GROUPS = 20_000
PAIRS_PER_STEP = (32, 64, 128, 512)
PACKING_LENGTHS = (4096, 7424, 8192, 16384)


def ccf_like(count: int) -> list[PreferenceGroup]:
    rng = random.Random(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return (0,) * rng.randint(low, high)

    return [
        PreferenceGroup(
            str(i), Prompt(ids(350, 400)), ids(100, 250), (ids(100, 250), ids(100, 250))
        )
        for i in range(count)
    ]


def most_possible(groups: list[PreferenceGroup], steps: list[Step], length: int) -> float:
    """Tokens / budget if every step took the fewest packs that its tokens could fill."""
    sizes = [sum(part_tokens(groups, part) for pack in step for part in pack) for step in steps]
    return sum(sizes) / sum(-(-size // length) * length for size in sizes)


def test_planning(benchmark, capsys):
    groups = ccf_like(GROUPS)

    def plan(pairs: int, length: int):
        return plan_epoch(groups, pairs_per_step=pairs, packing_length=length, seed=0, epoch=0)

    benchmark.pedantic(plan, args=(64, 4096), rounds=3)
    lines = [
        f"\npacking efficiency of {GROUPS} groups: of the budget (the most possible) / "
        "of the longest pack"
    ]
    lines.append("pairs per step " + "".join(f"{length:>24}" for length in PACKING_LENGTHS))
    for pairs in PAIRS_PER_STEP:
        found = []
        for length in PACKING_LENGTHS:
            steps = plan(pairs, length)
            of_budget = packing_efficiency(groups, steps, length)
            of_longest = packing_efficiency(groups, steps)
            most = most_possible(groups, steps, length)
            found.append(f"{of_budget:.3f} ({most:.3f}) / {of_longest:.3f}")
            figures = {"of_budget": of_budget, "possible": most, "of_longest": of_longest}
            benchmark.extra_info[f"{pairs} pairs, {length} tokens"] = figures
        lines.append(f"{pairs:>14} " + "".join(f"{one:>24}" for one in found))
    with capsys.disabled():
        print("\n".join(lines))

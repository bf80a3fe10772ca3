"""Planning an epoch: how long it takes, and how full the packs are.

Groups of CCF-like lengths: one image of 324 visual tokens in a prompt of 350 to 400, one chosen
and two rejected responses of 100 to 250 tokens each, so about 900 tokens. Two figures per setting:
tokens per token of the budget `packing_length`, and per token of the step's longest pack. Packs are
computed at their own length, so neither is waste by itself; the second is what would be useful if a
step's packs were padded to one length. The first is bounded by whole groups in whole packs (of
about 900 tokens four fit into 4096, so 0.88) and by whole packs in steps of a fixed size.
"""

from __future__ import annotations

import random

from cpo_fast.packing import packing_efficiency, plan_epoch
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


def test_planning(benchmark, capsys):
    groups = ccf_like(GROUPS)

    def plan(pairs: int, length: int):
        return plan_epoch(groups, pairs_per_step=pairs, packing_length=length, seed=0, epoch=0)

    benchmark.pedantic(plan, args=(64, 4096), rounds=3)
    lines = [f"\npacking efficiency of {GROUPS} groups: of the budget / of the longest pack"]
    lines.append("pairs per step " + "".join(f"{length:>16}" for length in PACKING_LENGTHS))
    for pairs in PAIRS_PER_STEP:
        found = []
        for length in PACKING_LENGTHS:
            steps = plan(pairs, length)
            of_budget = packing_efficiency(groups, steps, length)
            of_longest = packing_efficiency(groups, steps)
            found.append(f"{of_budget:.3f} / {of_longest:.3f}")
            benchmark.extra_info[f"{pairs} pairs, {length} tokens"] = (of_budget, of_longest)
        lines.append(f"{pairs:>14} " + "".join(f"{one:>16}" for one in found))
    with capsys.disabled():
        print("\n".join(lines))

"""The epoch plan: complete, exact in pairs, within budget, deterministic, balanced across ranks."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpo_fast.errors import UsageError
from cpo_fast.packing.plan import packing_efficiency, part_tokens, plan_epoch
from cpo_fast.types import PreferenceGroup, Prompt


def group(prompt: int, *responses: int, own_prompt: int = 0) -> PreferenceGroup:
    rejected = tuple((1,) * n for n in responses[1:])
    own = (Prompt((1,) * own_prompt), *[None] * (len(rejected) - 1)) if own_prompt else ()
    return PreferenceGroup("g", Prompt((1,) * prompt), (1,) * responses[0], rejected, own)


length = st.integers(1, 60)
preference_groups = st.lists(
    st.builds(
        lambda prompt, responses, own: group(prompt, *responses, own_prompt=own),
        length,
        st.lists(length, min_size=2, max_size=8),
        st.sampled_from([0, 0, 20]),
    ),
    min_size=1,
    max_size=12,
)
sft_groups = st.lists(st.builds(group, length, length), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    groups=preference_groups | sft_groups,
    pairs=st.integers(1, 9),
    budget=st.integers(20, 400),
    world=st.integers(1, 4),
    expand=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_plan_properties(groups, pairs, budget, world, expand, epoch):
    def plan(rank: int):
        return plan_epoch(
            groups,
            pairs_per_step=pairs,
            packing_length=budget,
            seed=3,
            epoch=epoch,
            rank=rank,
            world_size=world,
            expand_pairs=expand,
        )

    ranks = [plan(rank) for rank in range(world)]
    assert ranks == [plan(rank) for rank in range(world)]
    assert len({len(steps) for steps in ranks}) == 1
    total = sum(max(1, len(g.rejected)) for g in groups)
    seen: Counter = Counter()
    for number, parallel in enumerate(zip(*ranks, strict=True)):
        last = number == len(ranks[0]) - 1
        want = pairs if not last or total % pairs == 0 else total % pairs
        parts = [part for step in parallel for pack in step for part in pack]
        assert {step.num_pairs for step in parallel} == {want}
        assert sum(len(which) or 1 for _, which in parts) == want
        assert len({len(step) for step in parallel}) == 1  # the same number of micro-steps
        for step in parallel:
            for pack in step:
                within = sum(part_tokens(groups, part) for part in pack) <= budget
                assert within or (len(pack) == 1 and len(pack[0][1]) <= 1)
        seen.update((i, k) for i, which in parts for k in which or (None,))
    every = {(i, k) for i, g in enumerate(groups) for k in range(len(g.rejected)) or (None,)}
    if not groups[0].rejected:
        every = {(i, None) for i in range(len(groups))}
    assert set(seen) == every and set(seen.values()) == {1}


def plan(groups, pairs=4, budget=1000, **options):
    options = {"seed": 0, "epoch": 0, **options}
    return plan_epoch(groups, pairs_per_step=pairs, packing_length=budget, **options)


def test_groups_are_split_only_for_the_pair_count():
    groups = [group(5, 5, 5, 5) for _ in range(6)]
    assert all(len(which) == 2 for step in plan(groups) for pack in step for _, which in pack)
    odd = [part for step in plan(groups, pairs=3) for pack in step for part in pack]
    assert Counter(len(which) for _, which in odd) == {2: 4, 1: 4}


def test_group_beyond_the_budget_is_split():
    big = group(10, 10, *[10] * 6)  # 80 tokens
    (step,) = plan([big], pairs=6, budget=50)
    assert sorted(which for pack in step for _, which in pack) == [(0, 1, 2), (3, 4, 5)]


def test_order_depends_on_seed_and_epoch_and_can_be_kept():
    groups = [group(5, 5, 5) for _ in range(30)]

    def order(**options):
        return [i for step in plan(groups, pairs=1, **options) for pack in step for i, _ in pack]

    assert order() == order() not in (order(epoch=1), order(seed=1))
    assert sorted(order()) == list(range(30)) == order(shuffle=False)


def test_expanded_pairs_are_shuffled_one_by_one():
    groups = [group(5, 5, 5, 5) for _ in range(20)]
    steps = plan(groups, pairs=1, expand_pairs=True)
    order = [part for step in steps for pack in step for part in pack]
    assert len(order) == 40 and all(len(which) == 1 for _, which in order)
    assert any(a != b for (a, _), (b, _) in zip(order[::2], order[1::2], strict=True))


def test_packs_are_efficient():
    groups = [group(20 + i % 7, 30 + i % 5, 40, 35) for i in range(64)]
    steps = plan(groups, pairs=128, budget=600)
    assert packing_efficiency(groups, steps, 600) > 0.85


def test_packs_of_a_step_are_few_and_balanced():
    """CCF-like lengths, steps of 64 pairs: eight groups of about 900 tokens in a pack."""
    rng = random.Random(0)
    sizes = [
        [rng.randint(350, 400), *(rng.randint(100, 250) for _ in range(3))] for _ in range(960)
    ]
    groups = [group(*size) for size in sizes]
    steps = plan(groups, pairs=64, budget=7424)
    assert packing_efficiency(groups, steps, 7424) >= 0.95
    assert packing_efficiency(groups, steps) >= 0.99
    for ranks in (2, 3):
        plans = [
            plan(groups, pairs=64, budget=7424, rank=r, world_size=ranks) for r in range(ranks)
        ]
        loads = [sum(part_tokens(groups, p) for pack in s for p in pack) for s in plans[0]]
        others = [sum(part_tokens(groups, p) for pack in s for p in pack) for s in plans[1]]
        assert all(abs(a - b) < 0.1 * a for a, b in zip(loads, others, strict=True))


def test_first_fit_is_used_if_it_needs_fewer_packs():
    groups = [group(n - 2, 1, 1) for n in (60, 50, 40, 30, 20)]  # 60 + 40, 50 + 30 + 20
    (step,) = plan(groups, pairs=5, budget=100)
    sizes = sorted(sum(part_tokens(groups, part) for part in pack) for pack in step)
    assert sizes == [100, 100]


def test_bad_arguments_are_refused():
    pair, sft = group(5, 5, 5), group(5, 5)
    for options in ({"pairs": 0}, {"budget": 0}, {"world_size": 0}, {"rank": 1}):
        with pytest.raises(UsageError):
            plan([pair], **options)
    with pytest.raises(UsageError, match="SFT"):
        plan([pair, sft])

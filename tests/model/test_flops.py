"""Computed FLOPs against torch's counter of executed operations."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cpo_fast.model import flops
from cpo_fast.model.build import add_lora
from cpo_fast.model.flops import FlopCounter, mfu, peak_flops
from cpo_fast.model.packed import PackedModel
from cpo_fast.testing.packed_oracle import groups_of, pack_of
from cpo_fast.testing.samples import image, preference, text_model, vision_language_model


def count_flops(run) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_flops_of_linear_layers_and_head(lora):
    """Without attention: torch counts full squares of it."""
    model = text_model()
    model.train()
    if lora:
        model = add_lora(model, r=1)
    packed = PackedModel(model)
    batch = pack_of(groups_of([preference("a", 3), preference("b", 1, words=9)]))
    got = FlopCounter(packed)(batch, reference=False)

    def skip_attention(module, query, key, value, *args, **kwargs):
        return query.transpose(1, 2), None

    from transformers import AttentionInterface

    from cpo_fast.model.attention import BRANCHES, branch_attention

    AttentionInterface.register(BRANCHES, skip_attention)
    try:

        def step():
            weight, _ = packed.head()
            (packed.hidden(batch) @ weight.T).sum().backward()

        want = count_flops(step)
    finally:
        AttentionInterface.register(BRANCHES, branch_attention)
    # torch also counts rank-1 adapters, but no input gradient of the first layer.
    assert got.trunk + got.head == pytest.approx(want, rel=0.1)
    assert got.vision == 0
    more = FlopCounter(packed)(batch)
    assert more.trunk - got.trunk == pytest.approx(got.trunk / (2 if lora else 3))


def test_attention_counts_visible_pairs():
    packed = PackedModel(text_model())
    one = pack_of(groups_of([preference("a", 1)]))
    config = packed.trunk.config
    n = [int((one.branch_index == b).sum()) for b in range(3)]
    seen = sum(x * (x + 1) // 2 for x in n) + n[0] * (n[1] + n[2])
    per_pair = 12 * config.hidden_size * config.num_hidden_layers
    assert FlopCounter(packed)(one, reference=False).attention == seen * per_pair


def test_frozen_tower_is_counted_once():
    batch = pack_of(groups_of([preference("a", 2, image(100, 80))]))
    frozen = PackedModel(add_lora(vision_language_model(), r=1))
    once = FlopCounter(frozen)(batch).vision
    assert once == FlopCounter(frozen)(batch, reference=False).vision > 0
    want = count_flops(lambda: frozen._image_features(batch))
    assert once == pytest.approx(want, rel=0.15)  # without the tower's attention
    trained = PackedModel(vision_language_model())
    assert FlopCounter(trained)(batch, reference=False).vision == pytest.approx(3 * once)


def test_mfu_is_the_share_of_the_peak():
    assert mfu(3e12, 2.0, 6e12) == 0.25
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e8


@pytest.mark.parametrize(("rate", "sizes"), [(1e9, [256]), (1e11, [256, 1024])])
def test_slow_product_is_measured_small(monkeypatch, rate, sizes):
    measured = []
    monkeypatch.setattr(
        flops, "_measure_product", lambda size, device, dtype: measured.append(size) or rate
    )
    assert peak_flops.__wrapped__(torch.device("cpu"), torch.bfloat16) == rate
    assert measured == sizes

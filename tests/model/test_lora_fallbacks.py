"""LoRA layers that peft computes."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

from cpo_fast.model import lora
from cpo_fast.model.lora import use_fused_lora
from cpo_fast.testing.packed_oracle import assert_same_grads, trainable_grads
from tests.model.lora_layers import (
    assert_equals_peft,
    build_layer,
    compute_results,
    draw_inputs,
    get_layer,
    perturb,
)


def merge() -> Any:
    model = build_layer()
    model.merge_adapter()
    return model


def add_adapter() -> Any:
    model = build_layer()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])
    return perturb(model)


def train_base() -> Any:
    model = build_layer()
    get_layer(model).base_layer.weight.requires_grad_()
    return model


def add_hook() -> Any:
    model = build_layer()
    get_layer(model).base_layer.register_forward_hook(lambda module, args, out: 2 * out)
    return model


def change_dropout() -> Any:
    model = build_layer()
    get_layer(model).lora_dropout["default"] = nn.AlphaDropout(0.5)
    return model.train()


FALLBACKS = {
    "other-dropout": change_dropout,
    "two-adapters": add_adapter,
    "dora": lambda: build_layer(use_dora=True),
    "lora-bias": lambda: build_layer(lora_bias=True),
    "merged": merge,
    "trained-base": train_base,
    "hook": add_hook,
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_other_layers_equal_peft_bitwise(name: str) -> None:
    model = FALLBACKS[name]()
    if name == "merged":
        x, want = draw_inputs(), model(draw_inputs())
        use_fused_lora(model)
        assert lora.fused_adapter(get_layer(model), x) is None
        assert torch.equal(model(x), want)
        model.unmerge_adapter()
        assert lora.fused_adapter(get_layer(model), x) == "default"
    else:
        assert_equals_peft(model, draw_inputs(), fused=False)


def test_inactive_dropout_and_a_later_adapter_are_fused() -> None:
    model = build_layer(lora_dropout=0.5).eval()
    assert_equals_peft(model, draw_inputs(), fused=True, rtol=1e-5)
    model = add_adapter()
    model.set_adapter("other")
    assert_equals_peft(model, draw_inputs(), fused=True, rtol=1e-5)


def test_autocast_and_other_dtypes_are_left_to_peft() -> None:
    model = build_layer()
    use_fused_lora(model)
    x = draw_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert lora.fused_adapter(get_layer(model), x) is None
        got = model(x)
    assert got.dtype == torch.bfloat16
    get_layer(model).lora_A.bfloat16()  # peft casts x to this lower precision
    assert lora.fused_adapter(get_layer(model), x) is None
    # A backward within autocast equals one outside.
    model = build_layer()
    use_fused_lora(model)
    want = compute_results(model, x)
    y = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
    assert_same_grads(trainable_grads(model), {n: g for n, g in want.items() if n not in "xy"}, 0)

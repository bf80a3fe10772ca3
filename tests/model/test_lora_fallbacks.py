"""LoRA layers that stay with peft."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

from cpo_fast.model import lora
from cpo_fast.model.lora import use_fused_lora
from cpo_fast.testing.packed_oracle import (
    assert_same_grads,
    trainable_grads,
)
from tests.model.lora_layers import (
    assert_pefts,
    inputs,
    layer_of,
    results,
    small,
    stirred,
)


def merged() -> Any:
    model = small()
    model.merge_adapter()
    return model


def two_adapters() -> Any:
    model = small()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])
    return stirred(model)


def trained_base() -> Any:
    model = small()
    layer_of(model).base_layer.weight.requires_grad_()
    return model


def hooked() -> Any:
    model = small()
    layer_of(model).base_layer.register_forward_hook(lambda module, args, out: 2 * out)
    return model


def other_dropout() -> Any:
    model = small()
    layer_of(model).lora_dropout["default"] = nn.AlphaDropout(0.5)
    return model.train()


FALLBACKS = {
    "other-dropout": other_dropout,
    "two-adapters": two_adapters,
    "dora": lambda: small(use_dora=True),
    "lora-bias": lambda: small(lora_bias=True),
    "merged": merged,
    "trained-base": trained_base,
    "hook": hooked,
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_other_layers_are_pefts_bit_by_bit(name: str) -> None:
    model = FALLBACKS[name]()
    if name == "merged":
        x, want = inputs(), model(inputs())
        use_fused_lora(model)
        assert lora.fused_adapter(layer_of(model), x) is None
        assert torch.equal(model(x), want)
        model.unmerge_adapter()
        assert lora.fused_adapter(layer_of(model), x) == "default"
    else:
        assert_pefts(model, inputs(), fused=False)


def test_dropout_that_is_off_and_an_adapter_chosen_later() -> None:
    model = small(lora_dropout=0.5).eval()
    assert_pefts(model, inputs(), fused=True, rtol=1e-5)
    model = two_adapters()
    model.set_adapter("other")
    assert_pefts(model, inputs(), fused=True, rtol=1e-5)


def test_autocast_and_other_dtypes_are_left_to_peft() -> None:
    model = small()
    use_fused_lora(model)
    x = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert lora.fused_adapter(layer_of(model), x) is None
        got = model(x)
    assert got.dtype == torch.bfloat16
    layer_of(model).lora_A.bfloat16()  # less precise than x: peft casts x to it
    assert lora.fused_adapter(layer_of(model), x) is None
    # A backward within autocast equals one outside.
    model = small()
    use_fused_lora(model)
    want = results(model, x)
    y = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
    assert_same_grads(trainable_grads(model), {n: g for n, g in want.items() if n not in "xy"}, 0)

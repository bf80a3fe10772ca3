"""LoRA layers and their results, for tests."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn

from cpo_fast.model import lora
from cpo_fast.model.lora import FusedLinear, use_fused_lora
from cpo_fast.testing.packed_oracle import (
    trainable_grads,
)

TOKENS, WIDE, OUT = 70, 48, 96


def small(dtype: torch.dtype = torch.float32, *, bias: bool = True, **options: Any) -> Any:
    """One linear layer with peft's LoRA and nonzero B."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDE, OUT, bias=bias)).to(dtype)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["0"], **options}
    return stirred(peft.get_peft_model(model, peft.LoraConfig(**config)))


def stirred(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def layer_of(model: Any) -> Any:
    return model.base_model.model[0]


def inputs(dtype: torch.dtype = torch.float32, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(shape or (2, TOKENS // 2)), WIDE, generator=generator).to(dtype)


def results(model: Any, x: torch.Tensor, call: Any = None) -> dict[str, torch.Tensor]:
    """y, and the gradients of x and the trained weights for a fixed gradient of y."""
    x = x.clone().requires_grad_()
    y = (call or model)(x)
    generator = torch.Generator().manual_seed(2)
    y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **trainable_grads(model)}


def assert_pefts(model: Any, x: torch.Tensor, *, fused: bool, rtol: float = 0.0) -> None:
    torch.manual_seed(3)
    want = results(model, x)
    use_fused_lora(model)
    assert isinstance(layer_of(model), FusedLinear)
    assert (lora.fused_adapter(layer_of(model), x) is not None) == fused
    torch.manual_seed(3)
    got = results(model, x)
    assert got.keys() == want.keys()
    for name, expected in want.items():
        assert got[name].dtype == expected.dtype
        assert (got[name] - expected).abs().max() <= rtol * expected.abs().max(), name

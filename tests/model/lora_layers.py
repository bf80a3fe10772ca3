"""LoRA layers and their results."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn

from cpo_fast.model import lora
from cpo_fast.model.lora import FusedLinear, use_fused_lora
from cpo_fast.testing.packed_oracle import trainable_grads

TOKENS, WIDE, OUT = 70, 48, 96


def build_layer(dtype: torch.dtype = torch.float32, *, bias: bool = True, **options: Any) -> Any:
    """One linear layer with peft's LoRA; B is not zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDE, OUT, bias=bias)).to(dtype)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["0"], **options}
    return perturb(peft.get_peft_model(model, peft.LoraConfig(**config)))


def perturb(model: Any) -> Any:
    """Add noise to every trained weight."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.05 * noise.to(parameter.dtype)
    return model


def get_layer(model: Any) -> Any:
    return model.base_model.model[0]


def draw_inputs(dtype: torch.dtype = torch.float32, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(shape or (2, TOKENS // 2)), WIDE, generator=generator).to(dtype)


def compute_results(model: Any, x: torch.Tensor, call: Any = None) -> dict[str, torch.Tensor]:
    """y, and gradients of x and of the trained weights for a fixed gradient of y."""
    x = x.clone().requires_grad_()
    y = (call or model)(x)
    generator = torch.Generator().manual_seed(2)
    y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **trainable_grads(model)}


def assert_equals_peft(model: Any, x: torch.Tensor, *, fused: bool, rtol: float = 0.0) -> None:
    torch.manual_seed(3)
    want = compute_results(model, x)
    use_fused_lora(model)
    assert isinstance(get_layer(model), FusedLinear)
    assert (lora.fused_adapter(get_layer(model), x) is not None) == fused
    torch.manual_seed(3)
    got = compute_results(model, x)
    assert got.keys() == want.keys()
    for name, expected in want.items():
        assert got[name].dtype == expected.dtype
        assert (got[name] - expected).abs().max() <= rtol * expected.abs().max(), name

"""LoRA linear layers computed in the dtype of the base model.

    y = x W^T + b + s (d(x) A^T) B^T        d: dropout, where it is in effect

peft stores A and B in float32. With bfloat16 base weights it computes and adds the low-rank update
as a float32 tensor of the size of y, and applies dropout to a float32 copy of x. Here A and B are
cast to the dtype of x, as by autocast, dropout acts on x itself, and one low-rank matrix product
adds the update to y in place. For the same generator state the dropout masks equal peft's if x has
the dtype of A; for x in half precision they differ, with the same distribution.

LoRA: Hu et al. 2021 (arXiv:2106.09685), section 4.1.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from cpo_fast.model.attention import HALF


def use_fused_lora(model: PeftModel) -> None:
    """Let the LoRA layers of `model` use `lora_linear` where it is equivalent to peft.

    Modules, parameters and their names are unchanged; only the class of the layers becomes
    `FusedLinear`. The output layer is excluded: `cpo_fast.model.head` computes it.
    """
    base: Any = model.get_base_model()
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    for layer in model.modules():
        if type(layer) is Linear and layer is not head and type(layer.base_layer) is nn.Linear:
            layer.__class__ = FusedLinear


class FusedLinear(Linear):
    """peft's LoRA layer on a plain linear layer, with a fused forward if `fused_adapter` returns an
    adapter, else peft's forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else fused_adapter(self, x)
        if name is None:
            return super().forward(x, *args, **kwargs)
        base: Any = self.base_layer
        down: Any = self.lora_A[name]
        up: Any = self.lora_B[name]
        dropout = self.lora_dropout[name]
        dropped = dropout(x) if _is_active(dropout) else None
        return lora_linear(
            x, base.weight, base.bias, down.weight, up.weight, self.scaling[name], dropped
        )


def fused_adapter(layer: Linear, x: Tensor) -> str | None:
    """The adapter of `layer` that `lora_linear` can compute for `x` in the layer's current state.

    None if the adapters are off or merged, if not exactly one is active, if it has biases, a
    variant (DoRA and others) or a dropout that is not `nn.Dropout`, if the base layer is trained,
    if autocast is on, or if dtypes, devices, hooks or tensor subclasses need peft's forward.
    """
    if layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or active[0] in layer.lora_variant:
        return None
    name = active[0]
    base, down, up = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    if not (is_plain(base) and is_plain(down) and is_plain(up)):
        return None
    if down.bias is not None or up.bias is not None:
        return None
    if not isinstance(layer.lora_dropout[name], nn.Dropout | nn.Identity):
        return None
    frozen = [base.weight] if base.bias is None else [base.weight, base.bias]
    if any(weight.requires_grad or weight.dtype != x.dtype for weight in frozen):
        return None
    kept = torch.float32 if x.dtype in HALF else x.dtype
    if not all(weight.dtype in (x.dtype, kept) for weight in (down.weight, up.weight)):
        return None
    if any(weight.device != x.device for weight in (*frozen, down.weight, up.weight)):
        return None
    kind = x.device.type
    if kind not in ("cpu", "cuda") or torch.is_autocast_enabled(kind):
        return None
    return name


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: float,
    dropped: Tensor | None = None,
) -> Tensor:
    """x W^T + b + s (d A^T) B^T, [..., out] in the dtype of x, differentiable once.

    `x` [..., in], `weight` W [out, in] and `bias` b [out] have the same floating dtype; W and b get
    no gradient. d is `dropped`, x after dropout with the shape and dtype of x, else x itself; both
    x and `dropped` get a gradient. `down` A [r, in] and `up` B [out, r] can have another dtype:
    they are cast to the dtype of x, and their gradients, products in the dtype of x, are cast back
    before scaling. d, d A^T and the parameters are saved for the backward.
    """
    if dropped is not None:
        dropped = dropped.contiguous()
    return _LoraLinear.apply(x.contiguous(), dropped, weight, bias, down, up, scaling)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
    ) -> Tensor:
        inputs = x if dropped is None else dropped
        reduced = inputs.view(-1, x.shape[-1]) @ down.to(x.dtype).T  # [T, r]
        y = linear(x, weight, bias)
        # The scaling is applied within the product, where sums are float32.
        y.view(-1, y.shape[-1]).addmm_(reduced, up.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(inputs, reduced, weight, down, up)
        ctx.scaling, ctx.drops = scaling, dropped is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, reduced, weight, down, up = ctx.saved_tensors
        need_x, need_dropped, _, _, need_down, need_up, _ = ctx.needs_input_grad
        grad_x = grad_dropped = grad_down = grad_up = None
        with torch.autocast(inputs.device.type, enabled=False):
            grad = grad.reshape(-1, grad.shape[-1])  # [T, out]
            grad_reduced = grad @ up.to(grad.dtype)  # [T, r], without the scaling
            if need_dropped:
                grad_dropped = grad_reduced @ (down * ctx.scaling).to(grad.dtype)
                grad_dropped = grad_dropped.view(inputs.shape)
            if need_x:
                grad_x = grad @ weight  # [T, in]
                if not ctx.drops:
                    grad_x.addmm_(grad_reduced, down.to(grad.dtype), alpha=ctx.scaling)
                grad_x = grad_x.view(inputs.shape)
            if need_down:
                product = grad_reduced.T @ inputs.view(-1, inputs.shape[-1])
                grad_down = product.to(down.dtype) * ctx.scaling
            if need_up:
                grad_up = (grad.T @ reduced).to(up.dtype) * ctx.scaling
        return grad_x, grad_dropped, None, None, grad_down, grad_up, None


def is_plain(layer: nn.Module) -> bool:
    """Whether calling `layer` is just F.linear with a dense weight."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) in (Tensor, nn.Parameter)
        and "forward" not in layer.__dict__
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and not layer._backward_hooks
        and not layer._backward_pre_hooks
    )


def _is_active(dropout: nn.Module) -> bool:
    """Whether the dropout is active."""
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0

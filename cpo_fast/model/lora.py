"""LoRA linear layers computed in the dtype of the base model.

    y = x W^T + b + s (d(x) A^T) B^T        d: dropout, where it is in effect

peft keeps A and B in float32, so below bfloat16 base weights it computes and adds the low-rank
update as a float32 tensor of the size of y, and drops from a float32 copy of x. Here A and B are
cast to the dtype of x, as autocast would cast them, dropout acts on x itself, and one skinny matrix
product adds the update to y in place. From the same generator state the dropout masks are peft's
where x has the dtype of A; for x in half precision they are others of the same distribution.

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
    """Make the LoRA layers of `model` compute as `lora_linear` where that gives what peft computes.

    Modules, parameters and their names stay as they are; only the class of the layers changes, to
    `FusedLinear`. The output layer is left out: `cpo_fast.model.head` computes it.
    """
    base: Any = model.get_base_model()
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    for layer in model.modules():
        if type(layer) is Linear and layer is not head and type(layer.base_layer) is nn.Linear:
            layer.__class__ = FusedLinear


class FusedLinear(Linear):
    """peft's LoRA layer on a plain linear layer, with a fused forward where `fused_adapter` names
    an adapter, and peft's own forward otherwise."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else fused_adapter(self, x)
        if name is None:
            return super().forward(x, *args, **kwargs)
        base: Any = self.base_layer
        down: Any = self.lora_A[name]
        up: Any = self.lora_B[name]
        dropout = self.lora_dropout[name]
        dropped = dropout(x) if _drops(dropout) else None
        return lora_linear(
            x, base.weight, base.bias, down.weight, up.weight, self.scaling[name], dropped
        )


def fused_adapter(layer: Linear, x: Tensor) -> str | None:
    """The adapter of `layer` that `lora_linear` can compute for the input `x` as the layer is now.

    None if the adapters are off or merged, if not exactly one is active, if it has biases, a
    variant (DoRA and others) or a dropout that is not `nn.Dropout`, if the base layer is trained,
    if autocast is on, or if dtypes, devices, hooks or tensor subclasses need peft's own forward.
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

    `x` [..., in], `weight` W [out, in] and `bias` b [out] have one floating dtype; W and b get no
    gradient. d is `dropped`, x after dropout in the shape and dtype of x, or else x itself; x and
    `dropped` get a gradient each. `down` A [r, in] and `up` B [out, r] may have another dtype: they
    are cast to that of x, and their gradients, products in the dtype of x, are cast to theirs
    before they are scaled. For the backward d, d A^T and the parameters are kept.
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
        below = x if dropped is None else dropped
        reduced = below.view(-1, x.shape[-1]) @ down.to(x.dtype).T  # [T, r]
        y = linear(x, weight, bias)
        # The scaling is a factor of the product inside, where sums are float32.
        y.view(-1, y.shape[-1]).addmm_(reduced, up.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(below, reduced, weight, down, up)
        ctx.scaling, ctx.drops = scaling, dropped is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        below, reduced, weight, down, up = ctx.saved_tensors
        need_x, need_dropped, _, _, need_down, need_up, _ = ctx.needs_input_grad
        grad_x = grad_dropped = grad_down = grad_up = None
        with torch.autocast(below.device.type, enabled=False):
            grad = grad.reshape(-1, grad.shape[-1])  # [T, out]
            grad_reduced = grad @ up.to(grad.dtype)  # [T, r], without the scaling
            if need_dropped:
                grad_dropped = grad_reduced @ (down * ctx.scaling).to(grad.dtype)
                grad_dropped = grad_dropped.view(below.shape)
            if need_x:
                grad_x = grad @ weight  # [T, in]
                if not ctx.drops:
                    grad_x.addmm_(grad_reduced, down.to(grad.dtype), alpha=ctx.scaling)
                grad_x = grad_x.view(below.shape)
            if need_down:
                product = grad_reduced.T @ below.view(-1, below.shape[-1])
                grad_down = product.to(down.dtype) * ctx.scaling
            if need_up:
                grad_up = (grad.T @ reduced).to(up.dtype) * ctx.scaling
        return grad_x, grad_dropped, None, None, grad_down, grad_up, None


def is_plain(layer: nn.Module) -> bool:
    """Whether calling `layer` does no more than F.linear with a dense weight."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) in (Tensor, nn.Parameter)
        and "forward" not in layer.__dict__
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and not layer._backward_hooks
        and not layer._backward_pre_hooks
    )


def _drops(dropout: nn.Module) -> bool:
    """Whether the dropout is in effect."""
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0

"""The elementwise parts of a model's layers in one pass each, on CUDA in half precision.

On an H200, transformers' RMSNorm, SwiGLU and rotary embedding take a quarter of a 7B step, and
products of a vision tower with 3,420 columns, unsupported by the vendor's fast kernels, a twentieth
(docs/gpu.md). Here RMSNorm is torch's fused one, SwiGLU and rotary embedding are Triton kernels,
and a frozen tower's MLP is padded with columns of zeros. All compute in float32 and round once;
transformers rounds after every operation. Untested on a GPU: the kernels are run in Triton's
interpreter and compiled for sm_90.

Layers are not identified by name: a layer is replaced if its forward on a small input is bit-equal
to the formula here in transformers' order of operations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, rms_norm, silu

from cpo_fast.errors import UsageError
from cpo_fast.model.attention import HALF
from cpo_fast.model.lora import is_plain

ALIGNED = 8
"""Half-precision elements in the 16 bytes of a vectorised load."""

PARTS = ("gate_proj", "up_proj", "down_proj")
"""The linear layers of a gated MLP."""

_replaced: dict[tuple[str, str], Any] = {}
"""(module, function name) -> the original function."""


def check_fused(device: str, dtype: torch.dtype, *, compile: bool) -> None:
    """UsageError if fused layers do not support this device ("cpu", "cuda") and dtype, or for
    compiled layers, where torch.compile does the fusion."""
    if compile:
        raise UsageError("fused layers are not compiled: set either fused or compile")
    if device != "cuda" or dtype not in HALF:
        raise UsageError(
            "fused layers need a CUDA model in bfloat16 or float16, this one is "
            f"{dtype} on {device}"
        )
    if find_spec("triton") is None:
        raise UsageError("fused layers need triton, which is not installed")


def use_fused_layers(base: nn.Module, vision: nn.Module | None) -> None:
    """Replace the forwards of a transformers model's layers by fused ones (CUDA, half precision).

    Modules, parameters and their names are unchanged; the class of a layer becomes a subclass with
    another forward. The functions for rotary embedding are replaced in their module, for all models
    of the process, by functions that call the original for any other device or dtype;
    `restore_functions` restores them.
    """
    tower = set() if vision is None else set(vision.modules())
    homes: set[str] = set()
    layer: Any
    for layer in base.modules():
        if is_rms_norm(layer):
            _use(layer, _norm_forward)
        elif is_gated_mlp(layer):
            frozen = not any(p.requires_grad for p in layer.parameters())
            narrow = layer.gate_proj.weight.shape[0] % ALIGNED
            if layer in tower and frozen and narrow and all(map(is_plain, _parts(layer))):
                add_columns(layer)
                _use(layer, _padded_forward)
            else:
                _use(layer, _mlp_forward)
        elif hasattr(layer, "q_proj") or hasattr(layer, "qkv"):
            homes.add(type(layer).__module__)
    for home in homes:
        _replace(home, "apply_rotary_pos_emb", _fused_rotary)
        _replace(home, "apply_rotary_pos_emb_vision", _fused_vision_rotary)


def restore_functions() -> None:
    """Restore the functions of transformers replaced by `use_fused_layers`; layers stay fused."""
    for (home, name), original in _replaced.items():
        setattr(sys.modules[home], name, original)
    _replaced.clear()


def _use(layer: nn.Module, forward: Callable[..., Tensor]) -> None:
    cls = type(layer)
    if getattr(cls, "_fused", False):
        return
    layer.__class__ = type(cls.__name__, (cls,), {"forward": forward, "_fused": True})


@torch.no_grad()
def is_rms_norm(layer: Any) -> bool:
    """Whether the layer computes weight * (x / rms(x)) with transformers' rounding."""
    weight, eps = getattr(layer, "weight", None), getattr(layer, "variance_epsilon", None)
    if list(dict(layer.named_parameters())) != ["weight"] or not isinstance(eps, float):
        return False
    assert isinstance(weight, Tensor)
    if weight.ndim != 1 or _has_hooks(layer):
        return False
    x = _ramp(weight)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return torch.equal(layer(x), weight * wide.to(x.dtype))


def is_gated_mlp(layer: Any) -> bool:
    """Whether the layer computes down(silu(gate(x)) * up(x))."""
    if not all(hasattr(layer, name) for name in (*PARTS, "act_fn")) or _has_hooks(layer):
        return False
    if not isinstance(layer.act_fn, nn.SiLU) and type(layer.act_fn).__name__ != "SiLUActivation":
        return False
    if {name.split(".")[0] for name, _ in layer.named_parameters()} != set(PARTS):
        return False
    gate: Any = layer.gate_proj
    weight = getattr(gate, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return False
    training = [(m, m.training) for m in layer.modules()]
    try:
        layer.eval()
        with torch.no_grad():
            x = _ramp(weight[0])
            expected = layer.down_proj(silu(layer.gate_proj(x)) * layer.up_proj(x))
            return torch.equal(layer(x), expected)
    finally:
        for module, value in training:
            module.training = value


def _ramp(like: Tensor) -> Tensor:
    """[1, 2, D] of distinct values."""
    size = like.numel()
    values = torch.linspace(-2.0, 3.0, 2 * size, device=like.device).sin() * 1.5
    return values.to(like.dtype).view(1, 2, size)


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    from cpo_fast.kernels.decoder_layer import swiglu

    out: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
    return out


def add_columns(layer: Any) -> None:
    """Pad the weights of a gated MLP with zeros, so that the inner size is a multiple of ALIGNED.
    The weights of the first two products become views of the padded ones."""
    inner = layer.gate_proj.weight.shape[0]
    more = -inner % ALIGNED
    wide: dict[str, Any] = {}
    for name in ("gate_proj", "up_proj"):
        part = getattr(layer, name)
        wide[name] = pad(part.weight.data, (0, 0, 0, more))
        part.weight.data = wide[name][:inner]
        bias = part.bias
        wide[name + ".bias"] = None if bias is None else pad(bias.data, (0, more))
    wide["down_proj"] = pad(layer.down_proj.weight.data, (0, more))
    layer._wide = wide
    layer._wide_of = _identity(layer)


def _parts(layer: Any) -> list[Any]:
    return [getattr(layer, name) for name in PARTS]


def _identity(layer: Any) -> tuple[int, ...]:
    """A value that changes when weights are moved, replaced or modified."""
    weights = [weight for part in _parts(layer) for weight in part.parameters()]
    return tuple(x for weight in weights for x in (weight.data_ptr(), weight._version))


def _padded_forward(self: Any, x: Tensor) -> Tensor:
    from cpo_fast.kernels.decoder_layer import swiglu

    if self._wide_of != _identity(self):
        return _mlp_forward(self, x)
    wide = self._wide
    gate = linear(x, wide["gate_proj"], wide["gate_proj.bias"])
    up = linear(x, wide["up_proj"], wide["up_proj.bias"])
    return linear(swiglu(gate, up), wide["down_proj"], self.down_proj.bias)


def _replace(home: str, name: str, make: Callable[[Callable[..., Any]], Any]) -> None:
    module = sys.modules[home]
    original = getattr(module, name, None)
    if original is None or (home, name) in _replaced or not _is_rotation(name, original):
        return
    _replaced[home, name] = original
    setattr(module, name, make(original))


def _is_rotation(name: str, function: Callable[..., Any]) -> bool:
    """Whether the function rotates halves of heads as `rotate` does."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    try:
        if name == "apply_rotary_pos_emb":
            q, k, cos, sin = draw(1, 4, 3, 8), draw(1, 2, 3, 8), draw(1, 3, 8), draw(1, 3, 8)
        else:
            q, k, cos, sin = draw(3, 4, 8), draw(3, 4, 8), draw(3, 8), draw(3, 8)
        found = function(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError):
        return False
    c, s = cos[:, None], sin[:, None]
    expected = [x * c + torch.cat((-x[..., 4:], x[..., :4]), -1) * s for x in (q, k)]
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _fused_rotary(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, **kwargs: Any
    ) -> Any:
        one_row = q.ndim == 4 and q.shape[0] == 1 and cos.shape == (1, q.shape[2], q.shape[3])
        if unsqueeze_dim != 1 or kwargs or not one_row or not _supports(q, k):
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim, **kwargs)
        from cpo_fast.kernels.decoder_layer import rotate

        turned = (rotate(x[0].transpose(0, 1), cos[0], sin[0]) for x in (q, k))
        return tuple(x.transpose(0, 1)[None] for x in turned)

    return apply_rotary_pos_emb


def _fused_vision_rotary(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_rotary_pos_emb_vision(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        if q.ndim != 3 or cos.shape != (q.shape[0], q.shape[2]) or not _supports(q, k):
            return original(q, k, cos, sin)
        from cpo_fast.kernels.decoder_layer import rotate

        return rotate(q, cos, sin), rotate(k, cos, sin)

    return apply_rotary_pos_emb_vision


def _supports(*tensors: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return all(x.is_cuda and x.dtype in HALF for x in tensors)


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)

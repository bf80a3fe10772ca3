"""The elementwise parts of a decoder layer, one launch each: SwiGLU and rotary embedding.

    swiglu    silu(gate) * up (Shazeer 2020, arXiv:2002.05202)
    rotate    x cos + rotate_half(x) sin for every head of a row (Su et al. 2021, arXiv:2104.09864)

In eager torch they take three and five launches, and as many passes over memory. Here the
arithmetic is float32 and rounds once. Both have a first derivative only.

Untested on a GPU; tested in Triton's interpreter and by ahead-of-time compilation for sm_90.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from cpo_fast.kernels.numerics import launching_on, sigmoid

BLOCK = 2048
"""Elements per program of SwiGLU."""


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, out_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < N
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, gate * sigmoid(gate) * up, mask=mask)


@triton.jit
def swiglu_backward_kernel(
    grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, N, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < N
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    s = sigmoid(gate)
    tl.store(grad_gate_ptr + at, grad * up * s * (1.0 + gate * (1.0 - s)), mask=mask)
    tl.store(grad_up_ptr + at, grad * gate * s, mask=mask)


@triton.jit
def rotate_kernel(
    x_ptr,  # [T, H, d], contiguous in d
    cos_ptr,  # [T, d], contiguous
    sin_ptr,  # [T, d], contiguous
    out_ptr,  # [T, H, d], contiguous
    row_stride,
    head_stride,
    H,
    HALF: tl.constexpr,  # d / 2
    HEADS: tl.constexpr,  # a power of two >= H
    WIDTH: tl.constexpr,  # a power of two >= d / 2
    BACKWARD: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_h, o_d = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    inside = o_d < HALF
    mask = (o_h < H)[:, None] & inside[None, :]
    angles = i_t * (2 * HALF) + o_d
    cos_1 = tl.load(cos_ptr + angles, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_2 = tl.load(cos_ptr + angles + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_1 = tl.load(sin_ptr + angles, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_2 = tl.load(sin_ptr + angles + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    x = x_ptr + i_t * row_stride + o_h[:, None] * head_stride + o_d[None, :]
    x_1 = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    x_2 = tl.load(x + HALF, mask=mask, other=0.0).to(tl.float32)
    if BACKWARD:
        out_1 = x_1 * cos_1 + x_2 * sin_2
        out_2 = x_2 * cos_2 - x_1 * sin_1
    else:
        out_1 = x_1 * cos_1 - x_2 * sin_1
        out_2 = x_2 * cos_2 + x_1 * sin_2
    out = out_ptr + (i_t * H + o_h[:, None]) * (2 * HALF) + o_d[None, :]
    tl.store(out, out_1, mask=mask)
    tl.store(out + HALF, out_2, mask=mask)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in the inputs' shape and floating dtype; differentiable in both."""
    return _SwiGlu.apply(gate, up)  # type: ignore[no-any-return]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of every head of x [T, H, d] by the row's angles; contiguous [T, H, d].

    Any floating dtype, d even. `cos` and `sin` are [T, d] and get no gradients.
    """
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return]


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        with launching_on(gate):
            swiglu_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
                gate, up, out, gate.numel(), BLOCK=BLOCK
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        with launching_on(gate):
            swiglu_backward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
                grad.contiguous(), gate, up, grad_gate, grad_up, gate.numel(), BLOCK=BLOCK
            )
        return grad_gate, grad_up


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _apply_rotation(x, cos, sin, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _apply_rotation(grad, *ctx.saved_tensors, backward=True), None, None


def _apply_rotation(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool) -> Tensor:
    rows, heads, size = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = torch.empty((rows, heads, size), dtype=x.dtype, device=x.device)
    with launching_on(x):
        rotate_kernel[(rows,)](
            x,
            cos,
            sin,
            out,
            x.stride(0),
            x.stride(1),
            heads,
            HALF=size // 2,
            HEADS=triton.next_power_of_2(heads),
            WIDTH=triton.next_power_of_2(size // 2),
            BACKWARD=backward,
        )
    return out

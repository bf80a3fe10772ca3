"""The native CPU implementation: a fused kernel, or vendor GEMMs around row kernels (csrc/cpu).

For each token d logp / d h is one vector g, whatever loss follows, so the forward pass computes it
while the logits are at hand, and the backward pass is one scalar per token times g: two GEMMs in
all, nothing recomputed. The vocabulary is worked off in blocks; sums over blocks are float32, under
an offset per token that is raised when needed. bfloat16 logits on a processor with AMX or
AVX512-BF16 never reach memory (csrc/cpu/fused.h); all others are blocks between two vendor GEMMs
(csrc/cpu/rows.h), in float32 where the inputs are float16, or bfloat16 on a processor whose vendor
GEMM is slow in it.

A head that is trained needs the residual, onehot - p, once more: dW = residual^T (coefficient * H).
It is kept from the forward pass where all of it fits the workspace (three GEMMs), else computed
again, vocabulary block by block over all tokens, so that one GEMM sums each row of dW (four).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from cpo_fast import _cpu  # type: ignore[attr-defined]
from cpo_fast.loss.cpu_rows import ENGINES, Rows, fused_engine, slots, workspace
from cpo_fast.loss.operators import no_second_derivative, operator
from cpo_fast.loss.processor import fast_bfloat16
from cpo_fast.loss.workspace import limit

_TOKENS, _ENTRIES = 512, 32768  # of a block of logits: few long parallel regions, 32 MiB


def obstacle(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "for CPU tensors only"


def supports(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16, torch.float32)


def token_logps(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [T] int64
    bias: Tensor | None,  # [V]
    ref_hidden: Tensor | None,  # [T, D]
    *,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor | None]:
    """See the package docstring."""
    graph = torch.is_grad_enabled()
    head_grad = weight.requires_grad or (bias is not None and bias.requires_grad)
    room = limit(hidden.device)
    size = hidden.shape[0] * weight.shape[0] * _compute_dtype(hidden.dtype).itemsize
    engine = fused_engine(hidden.dtype, hidden.shape[1], room)
    logps, ref_logps, *_ = _forward(
        hidden,
        weight,
        labels,
        bias,
        ref_hidden,
        softcap or 0.0,
        1 / temperature,
        ignore_index,
        graph and hidden.requires_grad,
        graph and head_grad and size <= room,
        engine,
        slots() if engine else 1,
        room,
    )
    return logps, None if ref_hidden is None else ref_logps.detach()


# The residual that the fused kernel keeps is bfloat16.
_BLOCKS_OF_BFLOAT16 = fast_bfloat16() or any(map(_cpu.fused_available, ENGINES))


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a block of logits. float16 cannot hold exp(z - k): its blocks are float32."""
    if dtype == torch.bfloat16 and _BLOCKS_OF_BFLOAT16:
        return dtype
    return torch.float32


def _plan(n: int, V: int, D: int, dtype: torch.dtype, converts: bool, room: int) -> tuple[int, int]:
    """(tokens per chunk, vocabulary entries per block); the same whatever gradients are wanted.

    `converts`: a block of the head is converted to dtype, and lies in the workspace, too.
    """
    width = min(V, _ENTRIES)
    chunk = max(_TOKENS, _TOKENS * _ENTRIES // width)

    def size() -> int:
        return (chunk * (width + D) + converts * width * D) * dtype.itemsize

    while converts and size() > room and width > max(chunk, 64):
        width = max(width // 2, 64)
    while size() > room and max(chunk, width) > 64:
        chunk, width = max(chunk // 2, 64), max(width // 2, min(V, 64))
    chunks = max(-(-n // chunk), 1)
    return max(-(-n // chunks), 1), width


def _block(weight: Tensor, first: int, width: int, converted: Tensor) -> Tensor:
    """Rows first .. of the head [<= width, D], in the dtype of `converted`; there, if need be."""
    block = weight[first : first + width]
    if block.dtype == converted.dtype:
        return block
    return converted[: block.numel()].view_as(block).copy_(block)


@operator("cpu_logps")
def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    softcap: float,
    scale: float,
    ignore_index: int,
    want_grad: bool,
    want_residual: bool,
    engine: str,
    slots: int,
    room: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs [T] of policy and reference, g [T, D], stats, residual [T * V].

    stats [3 + slots, T] are the log-sum-exp, 1 - p_y, the soft-cap's slope at the label, and the
    factors that make onehot - p of the residual's slots. What is not wanted is empty.
    """
    (T, D), V = hidden.shape, weight.shape[0]
    dtype = _compute_dtype(hidden.dtype)
    rows = Rows(labels, ignore_index, bias, softcap, scale)
    n = rows.n
    grad = torch.zeros((T, D) if want_grad else (0, D))
    policy = rows.scored(hidden, dtype)
    reference = None if ref_hidden is None else rows.scored(ref_hidden, dtype)
    memory = torch.empty(T * V if want_residual else 0, dtype=dtype)
    offsets = torch.zeros(slots, n, dtype=torch.float64)

    if engine:
        state, ref_state = rows.fold(
            engine,
            policy,
            reference,
            weight,
            grad if want_grad else None,
            memory if want_residual else None,
            offsets,
        )
    else:
        state, ref_state = rows.new_state(), rows.new_state()
        converts = weight.dtype != dtype
        chunk, width = _plan(n, V, D, dtype, converts, room)
        logits, product, converted = workspace.take(
            chunk * width, chunk * D, converts * width * D, dtype=dtype
        )
        kept = _Kept(memory, n, V, width)
        with torch.autocast("cpu", enabled=False):
            for start in range(0, n, chunk):
                stop = min(start + chunk, n)
                for first in range(0, V, width):
                    block = _block(weight, first, width, converted)  # [cols, D]
                    z = logits[: (stop - start) * block.shape[0]].view(stop - start, -1)
                    if reference is not None:
                        torch.mm(reference[start:stop], block.t(), out=z)
                        rows.softmax_block(z, first, start, ref_state, False)
                    if want_residual:
                        z = kept.block(first)[start:stop]
                    torch.mm(policy[start:stop], block.t(), out=z)
                    rows.softmax_block(z, first, start, state, want_grad or want_residual)
                    if want_residual:
                        kept.offsets[first // width, start:stop] = state[0, start:stop]
                    if want_grad:
                        part = torch.mm(z, block, out=product[: (stop - start) * D].view(-1, D))
                        rows.accumulate(grad, part, start, state)
        if want_residual:
            kept.settle(state, rows.labels)
        offsets[:] = state[0]

    logps, stats = rows.finish(state, grad if want_grad else None, weight)
    ref_logps = torch.empty(0)
    if reference is not None:
        ref_logps, _ = rows.finish(ref_state, None, weight)
    factors = torch.zeros(slots, T, dtype=torch.float64)
    if want_residual:
        factors[:, rows.index] = -scale * torch.exp(offsets - stats[0, rows.index])
    return logps, ref_logps, grad, torch.cat([stats, factors]), memory


class _Kept:
    """Exponentials of all blocks of the row kernels, [n, cols] each, one behind the other."""

    def __init__(self, memory: Tensor, n: int, V: int, width: int) -> None:
        self.memory, self.n, self.V, self.width = memory, n, V, width
        self.offsets = torch.empty(-(-V // width) if memory.numel() else 0, n, dtype=torch.float64)

    def block(self, first: int) -> Tensor:
        cols = min(self.width, self.V - first)
        return self.memory[first * self.n : (first + cols) * self.n].view(self.n, cols)

    def settle(self, state: Tensor, labels: Tensor) -> None:
        """Bring all blocks under the final offset, and put minus the sum of the others at the
        label."""
        for b, offset in enumerate(self.offsets):
            raised = (offset != state[0]).nonzero().squeeze(1)
            if raised.numel():
                block = self.block(b * self.width)
                factor = torch.exp(offset - state[0])[raised]
                block[raised] = (block[raised] * factor.unsqueeze(1)).to(block.dtype)
        first = labels // self.width * self.width
        cols = (self.V - first).clamp(max=self.width)
        at = first * self.n + torch.arange(self.n) * cols + (labels - first)
        self.memory[at] = (-state[1] * state[3]).to(self.memory.dtype)


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    softcap: float,
    scale: float,
    ignore_index: int,
    want_grad: bool,
    want_residual: bool,
    engine: str,
    slots: int,
    room: int,
) -> tuple[Tensor, ...]:
    T, D = hidden.shape
    float32 = hidden.new_empty(0, dtype=torch.float32)
    return (
        float32.new_empty(T),
        float32.new_empty(0 if ref_hidden is None else T),
        float32.new_empty((T, D) if want_grad else (0, D)),
        float32.new_empty((3 + slots, T), dtype=torch.float64),
        float32.new_empty(
            T * weight.shape[0] if want_residual else 0, dtype=_compute_dtype(hidden.dtype)
        ),
    )


@operator("cpu_head_grads", differentiable=False)
def _head_grads(
    coef: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    stats: Tensor,
    residual: Tensor,
    softcap: float,
    scale: float,
    ignore_index: int,
    want_weight: bool,
    want_bias: bool,
    engine: str,
    slots: int,
    room: int,
) -> tuple[Tensor, Tensor]:
    """dW [V, D] and dbias [V] = sum over tokens of coef * (onehot - p) * (h, 1); empty if
    unwanted."""
    V, D = weight.shape
    dtype = _compute_dtype(hidden.dtype)
    rows = Rows(labels, ignore_index, bias, softcap, scale)
    n = rows.n
    inputs = rows.scored(hidden, dtype)
    stats = stats[:, rows.index].contiguous()
    coef = coef[rows.index]
    weight_grad = torch.empty(V if want_weight else 0, D, dtype=weight.dtype)
    bias_grad = torch.zeros(V if want_bias else 0)
    converts = weight.dtype != dtype
    converted = inputs.new_empty(0)  # a block of the head, then of its gradient

    def add(z: Tensor, first: int, last: int, factor: Tensor) -> None:
        """The entries first .. last - 1: z [n, cols] times factor [n] makes onehot - p."""
        factor = (coef * factor).float()
        if want_weight:
            scaled = (inputs * factor.unsqueeze(1)).to(dtype)
            out = weight_grad[first:last]
            if out.dtype == dtype:
                torch.mm(z.t(), scaled, out=out)
            else:
                product = converted[: out.numel()].view_as(out)
                out.copy_(torch.mm(z.t(), scaled, out=product))
        if want_bias and z.is_contiguous():
            rows.column_sums(z, factor, bias_grad[first:last])
        elif want_bias:
            step = 2**20 // n + 1
            for sums, part in zip(
                bias_grad[first:last].split(step), z.t().split(step), strict=True
            ):
                torch.mv(part.float(), factor, out=sums)

    with torch.autocast("cpu", enabled=False):
        if n == 0:
            weight_grad.zero_()
        elif residual.numel() and engine:
            kept = residual[: V * n].view(V, n).t()
            ends = [_cpu.fused_slot(V, slots, slot) for slot in range(slots + 1)]
            for slot, (first, last) in enumerate(itertools.pairwise(ends)):
                if first < last:
                    add(kept[:, first:last], first, last, stats[3 + slot])
        elif residual.numel():
            _, width = _plan(n, V, D, dtype, converts, room)
            (converted,) = workspace.take(converts * width * D, dtype=dtype)
            blocks = _Kept(residual, n, V, width)
            for first in range(0, V, width):
                add(blocks.block(first), first, min(first + width, V), stats[3])
        else:
            bytes_of_entry = (n + converts * D) * dtype.itemsize  # over all tokens
            width = max(min(V, _ENTRIES, room // bytes_of_entry), 1)
            logits, converted = workspace.take(n * width, converts * width * D, dtype=dtype)
            packed = rows.pack(inputs) if engine else None
            minus_scale = torch.full_like(coef, -scale)
            for first in range(0, V, width):
                block = _block(weight, first, width, converted)
                part = logits[: n * block.shape[0]]
                if packed is not None:
                    z = part.view(-1, n).t()
                    rows.residual_transposed(engine, packed, block, first, stats[:3], z.t())
                else:
                    z = torch.mm(inputs, block.t(), out=part.view(n, -1))
                    rows.residual_block(z, first, stats[:3])
                add(z, first, first + block.shape[0], minus_scale)
    return weight_grad, bias_grad.to(bias.dtype if bias is not None else weight.dtype)


@_head_grads.register_fake
def _(
    coef: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    stats: Tensor,
    residual: Tensor,
    softcap: float,
    scale: float,
    ignore_index: int,
    want_weight: bool,
    want_bias: bool,
    engine: str,
    slots: int,
    room: int,
) -> tuple[Tensor, Tensor]:
    V, D = weight.shape
    return (
        weight.new_empty((V, D) if want_weight else (0, D)),
        (weight if bias is None else bias).new_empty(V if want_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, labels, bias, _, softcap, scale, ignore_index, *_ = inputs
    _, _, grad, stats, residual = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, labels, bias, grad, stats, residual)
    ctx.options = (softcap, scale, ignore_index, *inputs[-3:])


def _backward(ctx: Any, coef: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    if any(other is not None for other in others):
        no_second_derivative()
    hidden, weight, labels, bias, grad, stats, residual = ctx.saved_tensors
    softcap, scale, ignore_index, engine, slots, room = ctx.options
    grads: list[Tensor | None] = [None] * 13
    if coef is None:
        return tuple(grads)
    if ctx.needs_input_grad[0]:
        grads[0] = (coef.unsqueeze(1) * grad).to(hidden.dtype)
    of_weight, of_bias = ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[3]
    if of_weight or of_bias:
        weight_grad, bias_grad = _head_grads(
            coef,
            hidden,
            weight,
            labels,
            bias,
            stats,
            residual,
            softcap,
            scale,
            ignore_index,
            of_weight,
            of_bias,
            engine,
            slots,
            room,
        )
        grads[1] = weight_grad if of_weight else None
        grads[3] = bias_grad if of_bias else None
    return tuple(grads)


_forward.register_autograd(_backward, setup_context=_setup_context)

"""The native CPU implementation: a fused kernel, or vendor GEMMs around row kernels (csrc/cpu).

For each token, d logp / d h is one vector g for every loss. The forward pass computes it while the
logits are in memory, and the backward pass multiplies it by one scalar per token: two GEMMs in
total, no recomputation. The vocabulary is processed in blocks; sums over blocks are float32, under
an offset per token that is raised when needed. With AMX or AVX512-BF16, bfloat16 logits never reach
memory (csrc/cpu/fused.h). All others are blocks between two vendor GEMMs (csrc/cpu/rows.h), in
float32 for float16 inputs and for bfloat16 where the vendor GEMM is slow in it.

A trained head needs the residual, onehot - p, a second time: dW = residual^T (coefficient * H). It
is kept from the forward pass where all of it fits the workspace (three GEMMs), else recomputed,
vocabulary block by block over all tokens, so that one GEMM sums each row of dW (four).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from cpo_fast import _cpu  # type: ignore[attr-defined]
from cpo_fast.loss.cpu_rows import ENGINES, Rows, fused_engine, slots, workspace
from cpo_fast.loss.operators import Plan, token_operator
from cpo_fast.loss.options import LossOptions
from cpo_fast.loss.processor import fast_bfloat16
from cpo_fast.loss.workspace import limit

_TOKENS, _ENTRIES = 512, 32768  # per block of logits: few long parallel regions, 32 MiB


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
    options: LossOptions,
) -> tuple[Tensor, Tensor | None]:
    """See the package docstring."""
    room = limit(hidden.device)
    engine = fused_engine(hidden.dtype, hidden.shape[1], room)
    plan = Plan.of(
        options,
        hidden,
        weight,
        bias,
        room=room,
        keep_bytes=hidden.shape[0] * weight.shape[0] * _compute_dtype(hidden.dtype).itemsize,
        kernel=engine,
        slots=slots() if engine else 1,
    )
    logps, ref_logps, *_ = _operator(hidden, weight, labels, bias, ref_hidden, plan)
    return logps, None if ref_hidden is None else ref_logps


# The residual that the fused kernel keeps is bfloat16.
_BLOCKS_OF_BFLOAT16 = fast_bfloat16() or any(map(_cpu.fused_available, ENGINES))


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a block of logits: float32 for float16 inputs, which cannot hold exp(z - k)."""
    if dtype == torch.bfloat16 and _BLOCKS_OF_BFLOAT16:
        return dtype
    return torch.float32


def _block_sizes(
    n: int, V: int, D: int, dtype: torch.dtype, converts: bool, room: int
) -> tuple[int, int]:
    """(tokens per chunk, vocabulary entries per block); independent of the gradients wanted.

    `converts`: a block of the head is converted to `dtype`, which also takes workspace.
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
    """Rows first.. of the head [<= width, D] in the dtype of `converted`, which holds a converted
    block."""
    block = weight[first : first + width]
    if block.dtype == converted.dtype:
        return block
    return converted[: block.numel()].view_as(block).copy_(block)


def _logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs [T] of policy and reference, g [T, D], stats, residual [T * V].

    stats [3 + slots, T] are the log-sum-exp, 1 - p_y, the slope of the soft cap at the label, and
    for each slot the factors that turn the stored residual into onehot - p. Unwanted outputs are
    empty.
    """
    (T, D), V = hidden.shape, weight.shape[0]
    dtype = _compute_dtype(hidden.dtype)
    rows = Rows(labels, bias, plan)
    n = rows.n
    grad = torch.zeros((T, D) if plan.want_hidden else (0, D))
    policy = rows.scored(hidden, dtype)
    reference = None if ref_hidden is None else rows.scored(ref_hidden, dtype)
    memory = torch.empty(T * V if plan.keep else 0, dtype=dtype)
    offsets = torch.zeros(plan.slots, n, dtype=torch.float64)

    if plan.kernel:
        state, ref_state = rows.fold(
            plan.kernel,
            policy,
            reference,
            weight,
            grad if plan.want_hidden else None,
            memory if plan.keep else None,
            offsets,
        )
    else:
        state, ref_state = rows.new_state(), rows.new_state()
        converts = weight.dtype != dtype
        chunk, width = _block_sizes(n, V, D, dtype, converts, plan.room)
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
                    if plan.keep:
                        z = kept.block(first)[start:stop]
                    torch.mm(policy[start:stop], block.t(), out=z)
                    rows.softmax_block(z, first, start, state, plan.want_hidden or plan.keep)
                    if plan.keep:
                        kept.offsets[first // width, start:stop] = state[0, start:stop]
                    if plan.want_hidden:
                        part = torch.mm(z, block, out=product[: (stop - start) * D].view(-1, D))
                        rows.accumulate(grad, part, start, state)
        if plan.keep:
            kept.settle(state, rows.labels)
        offsets[:] = state[0]

    logps, stats = rows.finish(state, grad if plan.want_hidden else None, weight)
    ref_logps = torch.empty(0)
    if reference is not None:
        ref_logps, _ = rows.finish(ref_state, None, weight)
    factors = torch.zeros(plan.slots, T, dtype=torch.float64)
    if plan.keep:
        factors[:, rows.index] = -rows.scale * torch.exp(offsets - stats[0, rows.index])
    return logps, ref_logps, grad, torch.cat([stats, factors]), memory


class _Kept:
    """The stored exponentials of the row kernels: contiguous blocks [n, cols]."""

    def __init__(self, memory: Tensor, n: int, V: int, width: int) -> None:
        self.memory, self.n, self.V, self.width = memory, n, V, width
        self.offsets = torch.empty(-(-V // width) if memory.numel() else 0, n, dtype=torch.float64)

    def block(self, first: int) -> Tensor:
        cols = min(self.width, self.V - first)
        return self.memory[first * self.n : (first + cols) * self.n].view(self.n, cols)

    def settle(self, state: Tensor, labels: Tensor) -> None:
        """Rescale all blocks to the final offset and write minus the sum of the others at the
        labels."""
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


def _fake_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (T, D), V = hidden.shape, weight.shape[0]
    float32 = hidden.new_empty(0, dtype=torch.float32)
    return (
        float32.new_empty(T),
        float32.new_empty(0 if ref_hidden is None else T),
        float32.new_empty((T, D) if plan.want_hidden else (0, D)),
        float32.new_empty((3 + plan.slots, T), dtype=torch.float64),
        hidden.new_empty(T * V if plan.keep else 0, dtype=_compute_dtype(hidden.dtype)),
    )


def _head_grads(
    coefficients: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    stats: Tensor,
    residual: Tensor,
    want_weight: bool,
    want_bias: bool,
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    """dW [V, D] and dbias [V] = sum over tokens of coefficient * (onehot - p) * (h, 1); empty if
    unwanted."""
    V, D = weight.shape
    dtype = _compute_dtype(hidden.dtype)
    rows = Rows(labels, bias, plan)
    n = rows.n
    inputs = rows.scored(hidden, dtype)
    stats = stats[:, rows.index].contiguous()
    coefficients = coefficients[rows.index]
    weight_grad = torch.empty(V if want_weight else 0, D, dtype=weight.dtype)
    bias_grad = torch.zeros(V if want_bias else 0)
    converts = weight.dtype != dtype
    converted = inputs.new_empty(0)  # a block of the head, then of its gradient

    def add(z: Tensor, first: int, last: int, factor: Tensor) -> None:
        """Gradients of entries first .. last - 1, where z [n, cols] * factor [n] is onehot - p."""
        factor = (coefficients * factor).float()
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
        elif residual.numel() and plan.kernel:
            kept = residual[: V * n].view(V, n).t()
            ends = [_cpu.fused_slot(V, plan.slots, slot) for slot in range(plan.slots + 1)]
            for slot, (first, last) in enumerate(itertools.pairwise(ends)):
                if first < last:
                    add(kept[:, first:last], first, last, stats[3 + slot])
        elif residual.numel():
            _, width = _block_sizes(n, V, D, dtype, converts, plan.room)
            (converted,) = workspace.take(converts * width * D, dtype=dtype)
            blocks = _Kept(residual, n, V, width)
            for first in range(0, V, width):
                add(blocks.block(first), first, min(first + width, V), stats[3])
        else:
            bytes_of_entry = (n + converts * D) * dtype.itemsize  # over all tokens
            width = max(min(V, _ENTRIES, plan.room // bytes_of_entry), 1)
            logits, converted = workspace.take(n * width, converts * width * D, dtype=dtype)
            packed = rows.pack(inputs) if plan.kernel else None
            minus_scale = torch.full_like(coefficients, -rows.scale)
            for first in range(0, V, width):
                block = _block(weight, first, width, converted)
                part = logits[: n * block.shape[0]]
                if packed is not None:
                    z = part.view(-1, n).t()
                    rows.residual_transposed(plan.kernel, packed, block, first, stats[:3], z.t())
                else:
                    z = torch.mm(inputs, block.t(), out=part.view(n, -1))
                    rows.residual_block(z, first, stats[:3])
                add(z, first, first + block.shape[0], minus_scale)
    return weight_grad, bias_grad.to(bias.dtype if bias is not None else weight.dtype)


def _row_scale(rows: Tensor, coefficients: Tensor) -> Tensor:
    return coefficients.unsqueeze(1) * rows


_operator = token_operator("cpu", _logps, _fake_logps, _head_grads, _row_scale)

"""The Triton implementation: vendor GEMMs around the row kernel of kernels/.

Per chunk of rows: logits = H W^T into a workspace; the row kernel turns them into log-probs and, in
place, into (onehot - p); a second GEMM with W gives g = d logp / d hidden, unscaled. g is stored
([T, D], as small as hidden), so that the backward with a frozen head scales rows and multiplies
nothing: two GEMMs in all, whatever loss follows. With a trainable head the backward forms
dW = (onehot - p)^T (coefficient x hidden), from the forward's (onehot - p) where all of it may be
kept (three GEMMs; chunked.keeps_slopes), else from recomputed chunks, summed in fp32 (four).

The reference rows go through GEMMs of the same shapes and the same kernel, so that equal hidden
states give bitwise equal log-probs. They are not joined to the policy's rows in one GEMM, whose
tiles a vendor library may sum differently. A call without gradients takes the same path, since its
log-probs may serve as the cached reference of a later call that has them: on an H200 the vendor
GEMM and a row pass also run at 92 % of the bare product's rate, the fused log-sum-exp of
kernels/linear_lse.py at 78 % (docs/gpu.md).

There are two row kernels, "lean" and "masked" (kernels/lean_rows.py, kernels/row_kernel.py). Lean
is the default: it needs a third of the instructions and is faster on an H200.

Run on an H200 in bfloat16 (docs/gpu.md). TRITON_INTERPRET=1 runs all of it on CPU tensors, for
tests.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cpo_fast.loss.chunked import (
    add_product,
    aligned,
    chunks,
    fp32_sums,
    keeps_slopes,
    logits_buffer,
    padded,
)
from cpo_fast.loss.operators import operator
from cpo_fast.loss.segments import spread
from cpo_fast.loss.workspace import limit

ROW_KERNELS = {"lean": "cpo_fast.kernels.lean_rows", "masked": "cpo_fast.kernels.row_kernel"}
_rows = "lean"


@contextlib.contextmanager
def forced_rows(name: str) -> Iterator[None]:
    """Take the row kernel "lean" or "masked" inside the block: for tests and benchmarks.

    Raises ValueError for another name.
    """
    global _rows
    if name not in ROW_KERNELS:
        raise ValueError(f"the row kernel must be one of {', '.join(ROW_KERNELS)}, got {name!r}")
    before, _rows = _rows, name
    try:
        yield
    finally:
        _rows = before


def row_kernel() -> Callable[..., Tensor]:
    """`row_logps_` of the row kernel in use."""
    return importlib.import_module(ROW_KERNELS[_rows]).row_logps_


def obstacle(device: torch.device) -> str | None:
    """Triton installed, and a GPU of compute capability 8.0 or later, or the interpreter."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "on CPU tensors only for tests, with TRITON_INTERPRET=1"
    if device.type != "cuda" or not torch.cuda.is_available():
        return "torch finds no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor}; 8.0 is the least"


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
    tracking = torch.is_grad_enabled()
    want_hidden = tracking and hidden.requires_grad
    want_head = tracking and (weight.requires_grad or (bias is not None and bias.requires_grad))
    room = limit(hidden.device)
    want_weight = tracking and weight.requires_grad
    logps, ref_logps, _, _ = torch.ops.cpo_fast.triton_logps(
        hidden.contiguous(),
        weight,
        labels.contiguous(),
        None if bias is None else bias.contiguous(),
        None if ref_hidden is None else ref_hidden.contiguous(),
        softcap,
        temperature,
        ignore_index,
        want_hidden,
        want_head,
        want_head and keeps_slopes(hidden, weight, room, want_weight),
        room,
    )
    return logps, None if ref_hidden is None else ref_logps


@operator("triton_logps")
def _logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    want_hidden: bool,
    want_head: bool,
    keep_slopes: bool,
    room: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logps [T], ref_logps [T], unscaled [T, D], slopes [T, padded V]; 0 rows where not wanted.

    slopes are d logp / d raw logits of all rows, if they are to be kept. `room` bounds, in bytes,
    the logits of a chunk; one row is held in any case.
    """
    row_logps_ = row_kernel()
    options: dict[str, Any] = {
        "bias": bias,
        "softcap": softcap,
        "temperature": temperature,
        "ignore_index": ignore_index,
    }
    (T, D), V = hidden.shape, weight.shape[0]
    # A vendor library chooses its kernel by alignment too: policy and reference must agree.
    hidden = aligned(hidden)
    ref_hidden = None if ref_hidden is None else aligned(ref_hidden)
    logps = hidden.new_empty(T, dtype=torch.float32)
    ref_logps = hidden.new_empty(0 if ref_hidden is None else T, dtype=torch.float32)
    unscaled = hidden.new_empty(T if want_hidden else 0, D)
    slopes = logits_buffer(hidden, T if keep_slopes else 0, V)

    bounds = chunks(hidden, weight, room)
    logits = slopes
    if bounds and not keep_slopes:
        logits = logits_buffer(hidden, bounds[0][1], V)
    with fp32_sums():
        for start, stop in bounds:
            part = slice(start, stop)
            buffer = logits[part] if keep_slopes else logits[: stop - start]
            if ref_hidden is not None:
                torch.mm(ref_hidden[part], weight.t(), out=buffer[:, :V])
                row_logps_(buffer, labels[part], V, grad_rows=0, out=ref_logps[part], **options)
            torch.mm(hidden[part], weight.t(), out=buffer[:, :V])
            grad_rows = stop - start if want_hidden or keep_slopes else 0
            row_logps_(buffer, labels[part], V, grad_rows=grad_rows, out=logps[part], **options)
            if want_hidden:
                torch.mm(buffer[:, :V], weight, out=unscaled[part])
    return logps, ref_logps, unscaled, slopes


@_logps.register_fake
def _logps_fake(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    want_hidden: bool,
    want_head: bool,
    keep_slopes: bool,
    room: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, D = hidden.shape
    return (
        hidden.new_empty(T, dtype=torch.float32),
        hidden.new_empty(0 if ref_hidden is None else T, dtype=torch.float32),
        hidden.new_empty(T if want_hidden else 0, D),
        hidden.new_empty(T if keep_slopes else 0, padded(weight.shape[0])),
    )


def segment_sums(
    logps: Tensor, segment_ids: Tensor, labels: Tensor, segments: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """See segments.py; one program per segment sums in a fixed order."""
    return torch.ops.cpo_fast.triton_segment_sums(
        logps.contiguous(), segment_ids.contiguous(), labels.contiguous(), segments, ignore_index
    )


@operator("triton_segment_sums")
def _segment_sums(
    logps: Tensor, segment_ids: Tensor, labels: Tensor, segments: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    from cpo_fast.kernels.pair_reduction import segment_sums

    sums, counts = segment_sums(logps, labels, segment_ids, segments, ignore_index=ignore_index)
    return sums, counts.double()


@_segment_sums.register_fake
def _segment_sums_fake(
    logps: Tensor, segment_ids: Tensor, labels: Tensor, segments: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    sums, counts = (logps.new_empty(segments, dtype=torch.float64) for _ in range(2))
    return sums, counts


def _sums_save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[1])


def _sums_backward(ctx, grad_sums, _):  # type: ignore[no-untyped-def]
    return spread(grad_sums, *ctx.saved_tensors), None, None, None, None


_segment_sums.register_autograd(_sums_backward, setup_context=_sums_save)


@operator("triton_row_scale", differentiable=False)
def _row_scale(rows: Tensor, coefficients: Tensor) -> Tensor:
    """rows [T, D] times coefficients [T] float32."""
    from cpo_fast.kernels.pair_reduction import row_scale

    return row_scale(rows, coefficients)


@_row_scale.register_fake
def _row_scale_fake(rows: Tensor, coefficients: Tensor) -> Tensor:
    return torch.empty_like(rows)


@operator("triton_head_grad", differentiable=False)
def _head_grad(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    slopes: Tensor,
    coefficients: Tensor,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    room: int,
    want_weight: bool,
) -> tuple[Tensor, Tensor]:
    """d loss / d weight [V, D] (0 rows if not wanted) and d bias [V] (empty without a bias)."""
    from cpo_fast.kernels.pair_reduction import row_scale

    row_logps_ = row_kernel()
    V, D = weight.shape
    hidden = aligned(hidden)
    scaled = row_scale(hidden, coefficients)  # [T, D]
    shares = coefficients.to(hidden.dtype)[:, None]  # [T, 1]
    grad_bias = hidden.new_zeros((0 if bias is None else V, 1), dtype=torch.float32)
    with fp32_sums():
        if slopes.shape[0]:
            if bias is not None:
                add_product(grad_bias, slopes[:, :V].t(), shares)
            grad_weight = weight.new_empty(V if want_weight else 0, D)
            if want_weight:
                torch.mm(slopes[:, :V].t(), scaled, out=grad_weight)
            return grad_weight, grad_bias.view(-1).to(weight.dtype)

        total = hidden.new_zeros((V if want_weight else 0, D), dtype=torch.float32)
        bounds = chunks(hidden, weight, room)
        logits = logits_buffer(hidden, bounds[0][1] if bounds else 0, V)
        for start, stop in bounds:
            buffer = logits[: stop - start]
            part = slice(start, stop)
            torch.mm(hidden[part], weight.t(), out=buffer[:, :V])
            row_logps_(
                buffer,
                labels[part],
                V,
                grad_rows=stop - start,
                bias=bias,
                softcap=softcap,
                temperature=temperature,
                ignore_index=ignore_index,
            )
            if want_weight:
                add_product(total, buffer[:, :V].t(), scaled[part])
            if bias is not None:
                add_product(grad_bias, buffer[:, :V].t(), shares[part])
    return total.to(weight.dtype), grad_bias.view(-1).to(weight.dtype)


@_head_grad.register_fake
def _head_grad_fake(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    slopes: Tensor,
    coefficients: Tensor,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    room: int,
    want_weight: bool,
) -> tuple[Tensor, Tensor]:
    V, D = weight.shape
    return weight.new_empty(V if want_weight else 0, D), weight.new_empty(0 if bias is None else V)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, labels, bias, _, *options, _, want_head, _, room = inputs
    _, ref_logps, unscaled, slopes = output
    ctx.mark_non_differentiable(ref_logps, unscaled, slopes)
    ctx.options = (*options, room)
    ctx.want_head = want_head
    head = (hidden, weight, labels, bias, slopes) if want_head else ()
    ctx.save_for_backward(unscaled, *head)


def _backward(ctx, grad_logps, *_):  # type: ignore[no-untyped-def]
    unscaled, *head = ctx.saved_tensors
    coefficients = grad_logps.contiguous()
    grad_hidden = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_hidden = torch.ops.cpo_fast.triton_row_scale(unscaled, coefficients)
    if ctx.want_head:
        want_weight, want_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        d_weight, d_bias = torch.ops.cpo_fast.triton_head_grad(
            *head, coefficients, *ctx.options, want_weight
        )
        grad_weight = d_weight if want_weight else None
        grad_bias = d_bias if want_bias else None
    return grad_hidden, grad_weight, None, grad_bias, *[None] * 8


_logps.register_autograd(_backward, setup_context=_save)

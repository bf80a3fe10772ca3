"""The Triton implementation: vendor GEMMs around the row kernel of kernels/lean_rows.py.

Per chunk of rows: logits = H W^T into a buffer; the row kernel computes log-probs and overwrites
the logits with (onehot - p); a second GEMM with W gives g = d logp / d hidden, unscaled. g is
stored ([T, D], the size of hidden), so the backward pass with a frozen head only scales its rows:
two GEMMs in total for every loss. With a trained head the backward pass forms
dW = (onehot - p)^T (coefficient x hidden), from the forward's (onehot - p) where all of it may be
kept (three GEMMs; chunked.slope_bytes), else from recomputed chunks, summed in fp32 (four).

Reference rows take GEMMs of the same shapes and the same kernel, so that equal hidden states give
bitwise equal log-probs. They do not share a GEMM with the policy's rows, because a vendor library
may sum the tiles of one GEMM differently. A call without gradients takes the same path, since its
log-probs may be cached as the reference of a later call with gradients: on an H200 the vendor GEMM
and a row pass also run at 92 % of the rate of the product alone; a fused log-sum-exp in Triton
reached 78 % (docs/gpu.md) and is removed.

Tested on an H200 in bfloat16 (docs/gpu.md), and on CPU tensors in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from cpo_fast.loss.chunked import (
    add_product,
    aligned,
    chunks,
    fp32_sums,
    logits_buffer,
    padded_columns,
    slope_bytes,
)
from cpo_fast.loss.operators import Plan, token_operator
from cpo_fast.loss.options import LossOptions
from cpo_fast.loss.segments import sums_and_counts_operator
from cpo_fast.loss.workspace import limit


def obstacle(device: torch.device) -> str | None:
    """None with Triton installed and a GPU of compute capability 8.0 or later."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda":
        return "for CUDA tensors only"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor}; at least 8.0 is needed"


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
    room, keep_bytes = limit(hidden.device), slope_bytes(hidden, weight)
    logps, ref_logps, *_ = _operator(
        hidden.contiguous(),
        weight,
        labels.contiguous(),
        None if bias is None else bias.contiguous(),
        None if ref_hidden is None else ref_hidden.contiguous(),
        Plan.of(options, hidden, weight, bias, room=room, keep_bytes=keep_bytes),
    )
    return logps, None if ref_hidden is None else ref_logps


def _row_logps_(
    buffer: Tensor,  # [C, padded V]
    labels: Tensor,  # [C]
    V: int,
    bias: Tensor | None,
    plan: Plan,
    *,
    want: bool,
    out: Tensor | None = None,  # [C]
) -> None:
    """Log-probs of a chunk of logits into `out`; with `want`, d logp / d logits into the buffer."""
    from cpo_fast.kernels.lean_rows import row_logps_

    row_logps_(
        buffer,
        labels,
        V,
        grad_rows=buffer.shape[0] if want else 0,
        bias=bias,
        softcap=plan.softcap,
        temperature=plan.temperature,
        ignore_index=plan.ignore_index,
        out=out,
    )


def _outputs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logps [T], ref_logps [T], unscaled [T, D], slopes [T, padded V], uninitialised."""
    T, D = hidden.shape
    return (
        hidden.new_empty(T, dtype=torch.float32),
        hidden.new_empty(0 if ref_hidden is None else T, dtype=torch.float32),
        hidden.new_empty(T if plan.want_hidden else 0, D),
        hidden.new_empty(T if plan.keep else 0, padded_columns(weight.shape[0])),
    )


def _logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `_outputs`; slopes are d logp / d raw logits. At least one row is in memory, whatever the
    room."""
    V = weight.shape[0]
    logps, ref_logps, unscaled, slopes = _outputs(hidden, weight, labels, bias, ref_hidden, plan)
    # The vendor library also selects its kernel by alignment: policy and reference must agree.
    hidden = aligned(hidden)
    ref_hidden = None if ref_hidden is None else aligned(ref_hidden)
    slopes[:, V:].zero_()
    bounds = chunks(hidden, weight, plan.room)
    logits = slopes
    if bounds and not plan.keep:
        logits = logits_buffer(hidden, bounds[0][1], V)
    want = plan.want_hidden or plan.keep
    with fp32_sums():
        for start, stop in bounds:
            part = slice(start, stop)
            buffer = logits[part] if plan.keep else logits[: stop - start]
            if ref_hidden is not None:
                torch.mm(ref_hidden[part], weight.t(), out=buffer[:, :V])
                _row_logps_(buffer, labels[part], V, bias, plan, want=False, out=ref_logps[part])
            torch.mm(hidden[part], weight.t(), out=buffer[:, :V])
            _row_logps_(buffer, labels[part], V, bias, plan, want=want, out=logps[part])
            if plan.want_hidden:
                torch.mm(buffer[:, :V], weight, out=unscaled[part])
    return logps, ref_logps, unscaled, slopes


def _head_grads(
    coefficients: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    slopes: Tensor,
    want_weight: bool,
    want_bias: bool,
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    """d loss / d weight [V, D] and d loss / d bias [V]; 0 rows where not wanted."""
    V, D = weight.shape
    hidden = aligned(hidden)
    scaled = _row_scale(hidden, coefficients)  # [T, D]
    shares = coefficients.to(hidden.dtype)[:, None]  # [T, 1]
    grad_bias = hidden.new_zeros((V if want_bias else 0, 1), dtype=torch.float32)
    with fp32_sums():
        if slopes.shape[0]:
            if want_bias:
                add_product(grad_bias, slopes[:, :V].t(), shares)
            grad_weight = weight.new_empty(V if want_weight else 0, D)
            if want_weight:
                torch.mm(slopes[:, :V].t(), scaled, out=grad_weight)
            return grad_weight, grad_bias.view(-1).to(weight.dtype)

        total = hidden.new_zeros((V if want_weight else 0, D), dtype=torch.float32)
        bounds = chunks(hidden, weight, plan.room)
        logits = logits_buffer(hidden, bounds[0][1] if bounds else 0, V)
        for start, stop in bounds:
            buffer, part = logits[: stop - start], slice(start, stop)
            torch.mm(hidden[part], weight.t(), out=buffer[:, :V])
            _row_logps_(buffer, labels[part], V, bias, plan, want=True)
            if want_weight:
                add_product(total, buffer[:, :V].t(), scaled[part])
            if want_bias:
                add_product(grad_bias, buffer[:, :V].t(), shares[part])
    return total.to(weight.dtype), grad_bias.view(-1).to(weight.dtype)


def _row_scale(rows: Tensor, coefficients: Tensor) -> Tensor:
    from cpo_fast.kernels.reduction import row_scale

    return row_scale(rows, coefficients)


def _sums_and_counts(
    logps: Tensor, segment_ids: Tensor, labels: Tensor, segments: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    from cpo_fast.kernels.reduction import segment_sums

    sums, counts = segment_sums(logps, labels, segment_ids, segments, ignore_index=ignore_index)
    return sums, counts.double()


_operator = token_operator("triton", _logps, _outputs, _head_grads, _row_scale)
sums_and_counts = sums_and_counts_operator("triton_segment_sums", _sums_and_counts)

"""The CUDA C++ implementation: the kernels of csrc/cuda around vendor GEMMs, on two paths.

Both make, chunk by chunk of rows, a buffer B [C, V] and one factor per row such that
d logp_t / d z_t = factor_t * B_t, and g = B W by a vendor GEMM. g is stored without the factors
([T, D], as small as hidden), so that the backward with a frozen head is one scale per row.

    rows    vendor GEMM H W^T, then the row kernel: log-probs, and (onehot - p) in place; factor 1.
            Any V, D, bias, soft cap; compute capability 8.x (rows read twice) and 9.0 (once).
    fused   the WGMMA kernel: log-probs from fp32 accumulators, B = exp(z - k) stored in its
            epilogue, with k the reference model's LSE of the same token where there is one, else 0
            (the kernel repairs rows whose LSE is too far from k). bfloat16 on compute capability
            9.0, D a multiple of 8, no bias, no soft cap. Without gradients it writes no logits.

Policy and reference take the same path in the same chunks, with gradients or without, so that equal
hidden states give bitwise equal log-probs. A head that is trained costs one more GEMM where B of
all rows may be kept (chunked.keeps_slopes); else B is computed again in the backward and dW is
summed in fp32.

Both ran on an H200 in bfloat16, within the rules on errors (docs/gpu.md); other dtypes and compute
capability 8.x are untested on a GPU. In the tests the kernels' source runs in an emulator, and the
Python of this file against stand-ins for them.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any, NamedTuple

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
from cpo_fast.loss.cuda_launch import Head, scale_rows, sum_segments
from cpo_fast.loss.operators import operator
from cpo_fast.loss.segments import spread
from cpo_fast.loss.workspace import limit

_STEP, _FUSED_STEP = 128, 256  # rows of a vendor GEMM's tile; of a cluster of the WGMMA kernel


class Measured(NamedTuple):
    """The faster path for a head, where this implementation beat all others."""

    path: str  # "rows" or "fused"
    origin: str  # device, versions of torch and CUDA, commit; the report that holds the figures


_H200 = "NVIDIA H200, torch 2.11.0, triton 3.6.0, commit 13d5edb4ee31"
MEASURED: dict[tuple[int, int], Measured] = {
    (151936, 896): Measured("fused", _H200),
    (151936, 2048): Measured("fused", _H200),
    (152064, 3584): Measured("fused", _H200),
}
"""By (V, D); bench/results/ has the figures. `make gpu-check` prints the entries that its figures
justify. Without an entry `impl=None` does not come here and `impl="cuda"` takes `rows`."""

_forced: str | None = None


@contextlib.contextmanager
def forced_path(path: str) -> Iterator[None]:
    """Take "rows" or "fused" whatever was measured: for tests and benchmarks."""
    global _forced
    before, _forced = _forced, path
    try:
        yield
    finally:
        _forced = before


def wins(V: int, D: int) -> bool:
    return any(head == (V, D) for head in MEASURED)  # torch.compile hashes no symbols


def obstacle(device: torch.device) -> str | None:
    """Built, and a device that its machine code runs on: compute capability 8.x or 9.0."""
    if device.type != "cuda":
        return "for CUDA tensors only"
    if importlib.util.find_spec("cpo_fast._cuda") is None:
        return "cpo_fast._cuda is not built (no nvcc at install time?)"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch finds no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    built = major == 8 or (major, minor) == (9, 0)
    return None if built else f"compute capability {major}.{minor}; built for 8.x and 9.0"


def supports(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


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
    path: str | None = None,  # "rows" or "fused"; None: by the table of what was measured
) -> tuple[Tensor, Tensor | None]:
    """See the package docstring. Raises ValueError where `path="fused"` cannot take the inputs."""
    obstacle = _fused_obstacle(hidden, bias, softcap)
    path = path or _forced
    if path is None:
        V, D = weight.shape
        best = MEASURED[V, D].path if wins(V, D) else "rows"
        path = best if obstacle is None else "rows"
    elif path not in ("rows", "fused"):
        raise ValueError(f"path must be 'rows' or 'fused', got {path!r}")
    elif path == "fused" and obstacle is not None:
        raise ValueError(f"path 'fused' needs {obstacle}; use 'rows'")
    tracking = torch.is_grad_enabled()
    want_hidden = tracking and hidden.requires_grad
    want_head = tracking and (weight.requires_grad or (bias is not None and bias.requires_grad))
    room = limit(hidden.device)
    want_weight = tracking and weight.requires_grad
    logps, ref_logps, *_ = torch.ops.cpo_fast.cuda_logps(
        hidden,
        weight,
        labels.masked_fill(labels == ignore_index, -1),
        bias,
        ref_hidden,
        softcap or 0.0,
        temperature,
        path == "fused",
        want_hidden,
        want_head,
        want_head and keeps_slopes(hidden, weight, room, want_weight),
        room,
    )
    return logps, None if ref_hidden is None else ref_logps


def _fused_obstacle(hidden: Tensor, bias: Tensor | None, softcap: float | None) -> str | None:
    """What keeps the fused path from these inputs, as a requirement."""
    if hidden.dtype != torch.bfloat16:
        return "bfloat16"
    if hidden.shape[1] % 8:
        return "a hidden size that is a multiple of 8"
    if bias is not None or softcap is not None:
        return "a head without bias and soft cap"
    return None if _has_wgmma(hidden.device) else "compute capability 9.0"


def _has_wgmma(device: torch.device) -> bool:
    # CPU tensors come here in tests only, with stand-ins for the kernels.
    return device.type != "cuda" or torch.cuda.get_device_capability(device) == (9, 0)


# torch.compile would put the question into its graph, where no tensor comes of it.
_has_wgmma._dynamo_marked_constant = True  # type: ignore[attr-defined]


def segment_sums(
    logps: Tensor, segment_ids: Tensor, labels: Tensor, segments: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """See segments.py; one CTA per segment sums in a fixed order."""
    return torch.ops.cpo_fast.cuda_segment_sums(
        logps.contiguous(), segment_ids.contiguous(), labels.contiguous(), segments, ignore_index
    )


# --- operators ------------------------------------------------------------------------------------


@operator("cuda_logps")
def _logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    softcap: float,
    temperature: float,
    fused: bool,
    want_hidden: bool,
    want_head: bool,
    keep: bool,
    room: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logps [T], ref_logps [T], product B W [T, D], factors [T], lse [T], B [T, padded V].

    What is not wanted has 0 rows. `labels` are -1 where ignored. `room` bounds, in bytes, the
    logits held at once; one row is held in any case.
    """
    (T, D), V = hidden.shape, weight.shape[0]
    hidden, labels = aligned(hidden), labels.contiguous()
    head = Head(weight, bias, softcap, temperature, fused)
    logps = hidden.new_empty(T, dtype=torch.float32)
    lse = hidden.new_empty(T, dtype=torch.float32)
    ref_logps = hidden.new_empty(0 if ref_hidden is None else T, dtype=torch.float32)
    offsets = hidden.new_zeros(T, dtype=torch.float32)
    factors = hidden.new_ones(T, dtype=torch.float32)
    product = hidden.new_empty(T if want_hidden else 0, D)
    kept = logits_buffer(hidden, T if keep else 0, V)
    if ref_hidden is not None:
        ref_hidden = aligned(ref_hidden)

    if fused and ref_hidden is not None:
        head.lse_only(ref_hidden, labels, ref_logps, offsets)
    if fused and not want_hidden and not keep:
        head.lse_only(hidden, labels, logps, lse)
        return logps, ref_logps, product, factors, lse, kept

    bounds = chunks(hidden, weight, room, _FUSED_STEP if fused else _STEP)
    buffers = kept if keep else logits_buffer(hidden, bounds[0][1] if bounds else 0, V)
    with fp32_sums():
        for start, stop in bounds:
            part = slice(start, stop)
            buffer = buffers[part] if keep else buffers[: stop - start]
            if fused:
                head.fused_chunk(
                    hidden[part],
                    labels[part],
                    buffer,
                    offsets[part],
                    factors[part],
                    logps[part],
                    lse[part],
                )
            else:
                if ref_hidden is not None:
                    ref = ref_hidden[part]
                    head.rows_chunk(ref, labels[part], buffer, False, ref_logps[part], lse[part])
                want = want_hidden or keep
                head.rows_chunk(hidden[part], labels[part], buffer, want, logps[part], lse[part])
            if want_hidden:
                torch.mm(buffer[:, :V], head.weight, out=product[part])
    return logps, ref_logps, product, factors, lse, kept


@_logps.register_fake
def _logps_fake(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    softcap: float,
    temperature: float,
    fused: bool,
    want_hidden: bool,
    want_head: bool,
    keep: bool,
    room: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    T, D = hidden.shape
    per_token = [hidden.new_empty(T, dtype=torch.float32) for _ in range(3)]
    return (
        per_token[0],
        hidden.new_empty(0 if ref_hidden is None else T, dtype=torch.float32),
        hidden.new_empty(T if want_hidden else 0, D),
        per_token[1],
        per_token[2],
        hidden.new_empty(T if keep else 0, padded(weight.shape[0])),
    )


@operator("cuda_segment_sums")
def _segment_sums(
    logps: Tensor, segment_ids: Tensor, labels: Tensor, segments: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    return sum_segments(logps, segment_ids, labels, segments, ignore_index)


@_segment_sums.register_fake
def _segment_sums_fake(
    logps: Tensor, segment_ids: Tensor, labels: Tensor, segments: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    sums, counts = (logps.new_empty(segments, dtype=torch.float64) for _ in range(2))
    return sums, counts


def _sums_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[1])


def _sums_backward(ctx: Any, grad_sums: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return spread(grad_sums, *ctx.saved_tensors), None, None, None, None


_segment_sums.register_autograd(_sums_backward, setup_context=_sums_save)


@operator("cuda_row_scale", differentiable=False)
def _row_scale(rows: Tensor, coefficients: Tensor) -> Tensor:
    return scale_rows(rows, coefficients)


@_row_scale.register_fake
def _row_scale_fake(rows: Tensor, coefficients: Tensor) -> Tensor:
    return rows.new_empty(rows.shape)


@operator("cuda_head_grad", differentiable=False)
def _head_grad(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    factors: Tensor,
    lse: Tensor,
    kept: Tensor,
    coefficients: Tensor,
    softcap: float,
    temperature: float,
    fused: bool,
    room: int,
) -> tuple[Tensor, Tensor]:
    """d loss / d weight [V, D] and d bias [V] (0 elements without a bias), in weight's dtype."""
    V, D = weight.shape
    hidden, labels = aligned(hidden), labels.contiguous()
    head = Head(weight, bias, softcap, temperature, fused)
    keeps = kept.shape[0] > 0
    step = _FUSED_STEP if fused else _STEP
    bounds = [(0, hidden.shape[0])] if keeps else chunks(hidden, weight, room, step)
    single = len(bounds) == 1  # one product is the whole sum: rounded once, as it is stored
    total = hidden.new_zeros((0 if single else V, D), dtype=torch.float32)
    total_bias = hidden.new_zeros((0 if bias is None else V, 1), dtype=torch.float32)
    grad_weight = torch.empty_like(head.weight)
    buffers = kept
    if bounds and not keeps:
        buffers = logits_buffer(hidden, bounds[0][1], V)
        factors = factors.clone()  # the fused kernel writes them for its offsets
    unused = lse.new_empty(2, lse.shape[0])
    with fp32_sums():
        for start, stop in bounds:
            part = slice(start, stop)
            buffer, outputs = buffers[: stop - start], (unused[0, part], unused[1, part])
            if not keeps and fused:
                # Under the LSE as offset: the one that never needs repair.
                head.fused_chunk(
                    hidden[part], labels[part], buffer, lse[part], factors[part], *outputs
                )
            elif not keeps:
                head.rows_chunk(hidden[part], labels[part], buffer, True, *outputs)
            shares = coefficients[part] * factors[part]
            scaled = scale_rows(hidden[part], shares)
            if single:
                torch.mm(buffer[:, :V].t(), scaled, out=grad_weight)
            else:
                add_product(total, buffer[:, :V].t(), scaled)
            if bias is not None:
                add_product(total_bias, buffer[:, :V].t(), shares.to(hidden.dtype)[:, None])
    if not single:
        grad_weight.copy_(total)
    return grad_weight, total_bias.view(-1).to(weight.dtype)


@_head_grad.register_fake
def _head_grad_fake(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    factors: Tensor,
    lse: Tensor,
    kept: Tensor,
    coefficients: Tensor,
    softcap: float,
    temperature: float,
    fused: bool,
    room: int,
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), weight.new_empty(0 if bias is None else weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, labels, bias, _, softcap, temperature, fused, _, want_head, _, room = inputs
    _, ref_logps, product, factors, lse, kept = output
    ctx.mark_non_differentiable(ref_logps, product, factors, lse, kept)
    ctx.want_head = want_head
    ctx.options = (softcap, temperature, fused, room)
    head = (hidden, weight, labels, bias, factors, lse, kept) if want_head else ()
    ctx.save_for_backward(product, factors, *head)


def _backward(ctx: Any, grad_logps: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    product, factors, *head = ctx.saved_tensors
    grad_hidden = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_hidden = torch.ops.cpo_fast.cuda_row_scale(product, grad_logps * factors)
    if ctx.want_head:
        grad_weight, grad_bias = torch.ops.cpo_fast.cuda_head_grad(*head, grad_logps, *ctx.options)
        if head[3] is None:
            grad_bias = None
    return grad_hidden, grad_weight, None, grad_bias, *[None] * 8


_logps.register_autograd(_backward, setup_context=_save)

"""The CUDA C++ implementation: the kernels of csrc/cuda around vendor GEMMs, on two paths.

For each chunk of rows, both paths compute a buffer B [C, V] and one factor per row with
d logp_t / d z_t = factor_t * B_t, and g = B W by a vendor GEMM. g is stored without the factors
([T, D], the size of hidden), so the backward pass with a frozen head only scales its rows.

    rows    vendor GEMM H W^T, then the row kernel: log-probs, and (onehot - p) in place; factor 1.
            Any V, D, bias, soft cap; compute capability 8.x (rows read twice) and 9.0 (once).
    fused   the WGMMA kernel: log-probs from fp32 accumulators, B = exp(z - k) stored in its
            epilogue. k is the reference model's LSE of the same token, or 0 without a reference
            (the kernel repairs rows whose LSE is too far from k). bfloat16 on compute capability
            9.0, D a multiple of 8, no bias, no soft cap. Without gradients it writes no logits.

Policy and reference take the same path in the same chunks, with or without gradients, so that equal
hidden states give bitwise equal log-probs. A trained head costs one more GEMM where B of all rows
may be kept (chunked.slope_bytes); else the backward pass recomputes B and sums dW in fp32.

Both paths ran on an H200 in bfloat16, within the error rules (docs/gpu.md); other dtypes and
compute capability 8.x are untested on a GPU. The tests run the kernels' source in an emulator, and
the Python of this file against stand-ins for the kernels.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import NamedTuple

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
from cpo_fast.loss.cuda_launch import Head, scale_rows, sum_segments
from cpo_fast.loss.operators import Plan, token_operator
from cpo_fast.loss.options import LossOptions
from cpo_fast.loss.segments import sums_and_counts_operator
from cpo_fast.loss.workspace import limit

_STEPS = {"rows": 128, "fused": 256}  # rows of a vendor GEMM's tile; of a WGMMA kernel's cluster


class Measured(NamedTuple):
    """The faster path for a head for which this implementation was the fastest of all."""

    path: str  # "rows" or "fused"
    origin: str  # device, versions of torch and Triton, commit


_H200 = "NVIDIA H200, torch 2.11.0, triton 3.6.0, commit 13d5edb4ee31"
MEASURED: dict[tuple[int, int], Measured] = {
    (151936, 896): Measured("fused", _H200),
    (151936, 2048): Measured("fused", _H200),
    (152064, 3584): Measured("fused", _H200),
}
"""By (V, D); bench/results/ has the figures. `make gpu-check` prints the entries that its figures
justify. For other heads `impl=None` prefers Triton, and `impl="cuda"` takes `rows`."""

_forced: str | None = None


@contextlib.contextmanager
def forced_path(path: str) -> Iterator[None]:
    """Take "rows" or "fused" inside the block; for tests and benchmarks.

    Raises ValueError for another name.
    """
    global _forced
    if path not in _STEPS:
        raise ValueError(f"path must be 'rows' or 'fused', got {path!r}")
    before, _forced = _forced, path
    try:
        yield
    finally:
        _forced = before


def wins(V: int, D: int) -> bool:
    """Whether this implementation was the fastest for heads [V, D]."""
    return any(head == (V, D) for head in MEASURED)  # torch.compile cannot hash symbols


def obstacle(device: torch.device) -> str | None:
    """None where cpo_fast._cuda is built and the device has compute capability 8.x or 9.0."""
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
    options: LossOptions,
) -> tuple[Tensor, Tensor | None]:
    """See the package docstring. Raises ValueError where a forced fused path cannot take the
    inputs."""
    obstacle = _fused_obstacle(hidden, bias, options.softcap)
    V, D = weight.shape
    if _forced == "fused" and obstacle is not None:
        raise ValueError(f"path 'fused' needs {obstacle}; use 'rows'")
    path = _forced or (MEASURED[V, D].path if wins(V, D) else "rows")
    logps, ref_logps, *_ = _operator(
        hidden,
        weight,
        labels.masked_fill(labels == options.ignore_index, -1),
        bias,
        ref_hidden,
        Plan.of(
            options,
            hidden,
            weight,
            bias,
            room=limit(hidden.device),
            keep_bytes=slope_bytes(hidden, weight),
            kernel="rows" if obstacle else path,
        ),
    )
    return logps, None if ref_hidden is None else ref_logps


def _fused_obstacle(hidden: Tensor, bias: Tensor | None, softcap: float | None) -> str | None:
    """What the inputs lack for the fused path; None: nothing."""
    if hidden.dtype != torch.bfloat16:
        return "bfloat16"
    if hidden.shape[1] % 8:
        return "a hidden size that is a multiple of 8"
    if bias is not None or softcap is not None:
        return "a head without bias and soft cap"
    return None if _has_wgmma(hidden.device) else "compute capability 9.0"


def _has_wgmma(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


# torch.compile would trace the call into its graph, which accepts only calls that return tensors.
_has_wgmma._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _outputs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logps [T], ref_logps [T], product B W [T, D], factors [T], lse [T], B [T, padded V],
    uninitialised."""
    T, D = hidden.shape

    def floats(rows: int) -> Tensor:
        return hidden.new_empty(rows, dtype=torch.float32)

    return (
        floats(T),
        floats(0 if ref_hidden is None else T),
        hidden.new_empty(T if plan.want_hidden else 0, D),
        floats(T),
        floats(T),
        hidden.new_empty(T if plan.keep else 0, padded_columns(weight.shape[0])),
    )


def _logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `_outputs`; `labels` are -1 where ignored. At least one row is in memory, whatever the
    room."""
    T, V = hidden.shape[0], weight.shape[0]
    outputs = _outputs(hidden, weight, labels, bias, ref_hidden, plan)
    logps, ref_logps, product, factors, lse, kept = outputs
    hidden, labels = aligned(hidden), labels.contiguous()
    head = Head(weight, bias, plan)
    offsets = hidden.new_zeros(T, dtype=torch.float32)
    factors.fill_(1)
    kept[:, V:].zero_()
    if ref_hidden is not None:
        ref_hidden = aligned(ref_hidden)

    if head.fused and ref_hidden is not None:
        head.lse_only(ref_hidden, labels, ref_logps, offsets)
    if head.fused and not plan.want_hidden and not plan.keep:
        head.lse_only(hidden, labels, logps, lse)
        return outputs

    bounds = chunks(hidden, weight, plan.room, _STEPS[plan.kernel])
    buffers = kept if plan.keep else logits_buffer(hidden, bounds[0][1] if bounds else 0, V)
    with fp32_sums():
        for start, stop in bounds:
            part = slice(start, stop)
            buffer = buffers[part] if plan.keep else buffers[: stop - start]
            if head.fused:
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
                want = plan.want_hidden or plan.keep
                head.rows_chunk(hidden[part], labels[part], buffer, want, logps[part], lse[part])
            if plan.want_hidden:
                torch.mm(buffer[:, :V], head.weight, out=product[part])
    return outputs


def _head_grads(
    coefficients: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    factors: Tensor,
    lse: Tensor,
    kept: Tensor,
    want_weight: bool,
    want_bias: bool,
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    """d loss / d weight [V, D] and d loss / d bias [V], in weight's dtype; 0 rows where not
    wanted."""
    V, D = weight.shape
    hidden, labels = aligned(hidden), labels.contiguous()
    head = Head(weight, bias, plan)
    keeps = kept.shape[0] > 0
    bounds = [(0, hidden.shape[0])]
    if not keeps:
        bounds = chunks(hidden, weight, plan.room, _STEPS[plan.kernel])
    single = len(bounds) == 1  # a single product is the whole sum and is rounded once
    rows = V if want_weight else 0
    total = hidden.new_zeros((0 if single else rows, D), dtype=torch.float32)
    total_bias = hidden.new_zeros((V if want_bias else 0, 1), dtype=torch.float32)
    grad_weight = weight.new_empty(rows, D)
    buffers = kept
    if bounds and not keeps:
        buffers = logits_buffer(hidden, bounds[0][1], V)
        factors = factors.clone()  # the fused kernel overwrites them to match its offsets
    unused = lse.new_empty(2, lse.shape[0])
    with fp32_sums():
        for start, stop in bounds:
            part = slice(start, stop)
            buffer, outputs = buffers[: stop - start], (unused[0, part], unused[1, part])
            if not keeps and head.fused:
                # The LSE is the offset that never needs repair.
                head.fused_chunk(
                    hidden[part], labels[part], buffer, lse[part], factors[part], *outputs
                )
            elif not keeps:
                head.rows_chunk(hidden[part], labels[part], buffer, True, *outputs)
            shares = coefficients[part] * factors[part]
            if want_weight:
                scaled = scale_rows(hidden[part], shares)
                if single:
                    torch.mm(buffer[:, :V].t(), scaled, out=grad_weight)
                else:
                    add_product(total, buffer[:, :V].t(), scaled)
            if want_bias:
                add_product(total_bias, buffer[:, :V].t(), shares.to(hidden.dtype)[:, None])
    if not single:
        grad_weight.copy_(total)
    return grad_weight, total_bias.view(-1).to(weight.dtype)


_operator = token_operator("cuda", _logps, _outputs, _head_grads, scale_rows, has_factors=True)
sums_and_counts = sums_and_counts_operator("cuda_segment_sums", sum_segments)
"""See segments.py; one CTA per segment sums in a fixed order."""

"""Launches of the csrc/cuda kernels on tensors: addresses, strides, device and stream."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from cpo_fast.loss.chunked import aligned
from cpo_fast.loss.operators import Plan

_FUSED_ROWS = 1 << 15  # per launch without gradients; bounds the partial sums (78 MB at V = 152064)


def kernels() -> Any:
    return importlib.import_module("cpo_fast._cuda")


def site(tensor: Tensor) -> dict[str, Any]:
    """Device index and current stream for a kernel on `tensor`. ValueError for a CPU tensor."""
    if not tensor.is_cuda:
        raise ValueError(f"the CUDA kernels take CUDA tensors, got one on {tensor.device}")
    index = tensor.device.index
    return {"device": index, "stream": torch.cuda.current_stream(index).cuda_stream}


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


class Head:
    """The output layer and the options of one call, for its launches."""

    def __init__(self, weight: Tensor, bias: Tensor | None, plan: Plan) -> None:
        self.weight = aligned(weight)
        self.bias = None if bias is None else aligned(bias.float())
        self.softcap, self.temperature = plan.softcap or 0.0, plan.temperature
        self.fused = plan.kernel == "fused"

    def rows_chunk(
        self,
        hidden: Tensor,  # [C, D]
        labels: Tensor,  # [C]
        buffer: Tensor,  # [C, padded V] out
        want: bool,  # overwrite the logits in the buffer with d logp / d z
        logps: Tensor,  # [C] out
        lse: Tensor,  # [C] out
    ) -> None:
        V = self.weight.shape[0]
        torch.mm(hidden, self.weight.t(), out=buffer[:, :V])
        kernels().row_kernel(
            dtype=_name(buffer),
            logits=buffer.data_ptr(),
            stride=buffer.stride(0),
            rows=buffer.shape[0],
            vocab=V,
            grad_rows=buffer.shape[0] if want else 0,
            labels=labels.data_ptr(),
            bias=0 if self.bias is None else self.bias.data_ptr(),
            softcap=self.softcap,
            temperature=self.temperature,
            logps=logps.data_ptr(),
            lse=lse.data_ptr(),
            **site(buffer),
        )

    def fused_chunk(
        self,
        hidden: Tensor,  # [C, D]
        labels: Tensor,  # [C]
        buffer: Tensor | None,  # [C, padded V] out, B = exp(z - offset); None: log-probs only
        offsets: Tensor,  # [C]
        factors: Tensor,  # [C] out, unless the buffer is None
        logps: Tensor,  # [C] out
        lse: Tensor,  # [C] out
    ) -> None:
        (C, D), V = hidden.shape, self.weight.shape[0]
        size = kernels().linear_workspace_bytes(rows=C, vocab=V)
        workspace = torch.empty(size, dtype=torch.uint8, device=hidden.device)
        kernels().linear_lse(
            dtype=_name(hidden),
            hidden=hidden.data_ptr(),
            hidden_stride=hidden.stride(0),
            weight=self.weight.data_ptr(),
            weight_stride=self.weight.stride(0),
            rows=C,
            vocab=V,
            width=D,
            labels=labels.data_ptr(),
            temperature=self.temperature,
            logps=logps.data_ptr(),
            lse=lse.data_ptr(),
            workspace=workspace.data_ptr(),
            exp=0 if buffer is None else buffer.data_ptr(),
            exp_stride=0 if buffer is None else buffer.stride(0),
            offsets=0 if buffer is None else offsets.data_ptr(),
            factors=0 if buffer is None else factors.data_ptr(),
            **site(hidden),
        )

    def lse_only(self, hidden: Tensor, labels: Tensor, logps: Tensor, lse: Tensor) -> None:
        """Log-probs of all rows [T, D] on the fused path, without gradients."""
        for start in range(0, hidden.shape[0], _FUSED_ROWS):
            part = slice(start, start + _FUSED_ROWS)
            self.fused_chunk(hidden[part], labels[part], None, lse, lse, logps[part], lse[part])


def scale_rows(rows: Tensor, coefficients: Tensor) -> Tensor:
    """rows [T, D] times coefficients [T] float32, in the dtype of `rows`. A coefficient 0 gives 0,
    also for rows that are not finite."""
    if rows.shape[1] % 8:
        product = (rows * coefficients[:, None]).to(rows.dtype)
        return product.masked_fill(coefficients[:, None] == 0, 0)
    rows, coefficients = aligned(rows), coefficients.contiguous()
    out = torch.empty_like(rows)
    kernels().row_scale(
        dtype=_name(rows),
        rows=rows.data_ptr(),
        coefficients=coefficients.data_ptr(),
        out=out.data_ptr(),
        tokens=rows.shape[0],
        width=rows.shape[1],
        **site(rows),
    )
    return out


def sum_segments(
    logps: Tensor, segment_ids: Tensor, labels: Tensor, segments: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Sums and counts [segments] float64 of the log-probs [T] of scored tokens."""
    sums = logps.new_empty(segments, dtype=torch.float64)
    counts = logps.new_empty(segments, dtype=torch.int64)
    kernels().segment_sums(
        logps=logps.data_ptr(),
        segment_ids=segment_ids.data_ptr(),
        labels=labels.data_ptr(),
        ignore_index=ignore_index,
        tokens=logps.shape[0],
        segments=segments,
        sums=sums.data_ptr(),
        counts=counts.data_ptr(),
        **site(logps),
    )
    return sums, counts.double()

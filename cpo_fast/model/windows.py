"""Attention in a vision tower: every patch attends to its own window, or its own image.

transformers splits a row of patches at the ends of the windows and calls the attention function for
each: 25 times per layer for an image of 504 x 504 pixels. Here a layer makes one variable-length
flash attention call on CUDA in half precision, else one SDPA call for all windows of a length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cpo_fast.model.attention import HALF, supports_head_size, varlen_kernel

WINDOWS = "cpo_fast_flash_windows"
"""The name of `window_attention`. transformers passes the whole row and the ends of the windows to
functions with "flash" in their name."""


def use_windows(vision: nn.Module) -> None:
    """Use `window_attention` in a vision tower of transformers."""
    config: Any = vision.config
    # Not with set_attn_implementation, which treats a name with "flash" as a package to import.
    config._attn_implementation = WINDOWS


class Windows:
    """The windows of a row of patches, grouped by length."""

    def __init__(self, ends: torch.Tensor) -> None:
        lengths = ends.diff().cpu()
        distinct, counts = lengths.unique(return_counts=True)
        self.sizes = list(zip(counts.tolist(), distinct.tolist(), strict=True))  # (windows, length)
        self.order: torch.Tensor | None = None  # rows sorted by the length of their window
        if len(self.sizes) > 1:
            order = lengths.repeat_interleave(lengths).argsort(stable=True)
            self.order = order.to(ends.device)
            self.back = order.argsort().to(ends.device)

    def attend(self, *rows: torch.Tensor, scale: float | None, dropout: float) -> torch.Tensor:
        """Query, key and value [T, H, d] -> [T, H, d]."""
        if self.order is not None:
            rows = tuple(x.index_select(0, self.order) for x in rows)
        pieces = [x.split([count * length for count, length in self.sizes]) for x in rows]
        out = []
        for (count, length), *qkv in zip(self.sizes, *pieces, strict=True):
            q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv)
            part = scaled_dot_product_attention(q, k, v, scale=scale, dropout_p=dropout)
            out.append(part.transpose(1, 2).flatten(0, 1))  # of [windows, H, length, d]
        joined = torch.cat(out)
        return joined if self.order is None else joined.index_select(0, self.back)


_windows: Any = WeakTensorKeyDictionary()  # the layers of a forward share two tensors of ends


def windows_of(ends: torch.Tensor) -> Windows:
    if ends not in _windows:
        _windows[ends] = Windows(ends)
    return _windows[ends]  # type: ignore[no-any-return]


@torch.compiler.disable
def window_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function with transformers' signature: [1, H, T, d] -> [1, T, H, d]."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, d]
    kernel = varlen_kernel() if _supports_flash(q) and not dropout else None
    if kernel is None:
        windows = windows_of(cu_seq_lens_q)
        return windows.attend(q, k, v, scale=scaling, dropout=dropout)[None], None
    ends = cu_seq_lens_q.to(torch.int32)
    longest = max_length_q or int(ends.diff().max())
    return kernel(q, k, v, ends, ends, longest, longest, scaling, False)[None], None


def _supports_flash(q: torch.Tensor) -> bool:
    return q.is_cuda and q.dtype in HALF and supports_head_size(q.shape[-1])


AttentionInterface.register(WINDOWS, window_attention)

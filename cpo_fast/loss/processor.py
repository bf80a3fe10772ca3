"""What this processor's matrix products are good at."""

from __future__ import annotations

import sys

import torch


def fast_bfloat16() -> bool:
    """Has PyTorch a bfloat16 product here worth using? Without AVX512 its own loops serve, which
    take 35 times as long as a product in float32 (docs/performance.md)."""
    known: bool = torch.backends.mkldnn.is_available()
    return known and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def warn_of_slow_bfloat16() -> None:
    """A line on stderr where a model in bfloat16 would be slow for want of a GPU or AVX512."""
    if not torch.cuda.is_available() and not fast_bfloat16():
        print(
            "warning: --bf16 on a processor without AVX512: products take many times as long as in "
            "float32; leave it out here",
            file=sys.stderr,
        )

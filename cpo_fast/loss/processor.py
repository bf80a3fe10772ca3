"""Hardware support of this processor for bfloat16."""

from __future__ import annotations

import sys

import torch


def fast_bfloat16() -> bool:
    """Whether bf16 GEMM is hardware-accelerated. Without AVX512, PyTorch uses its own loops, which
    take 35 times as long as a float32 GEMM (docs/performance.md)."""
    available: bool = torch.backends.mkldnn.is_available()
    return available and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def warn_of_slow_bfloat16() -> None:
    """Warn on stderr where a bfloat16 model would be slow: no GPU and no AVX512."""
    if not torch.cuda.is_available() and not fast_bfloat16():
        print(
            "warning: bf16 on a processor without AVX512: matrix products take many times as long "
            "as in float32; use float32 here",
            file=sys.stderr,
        )

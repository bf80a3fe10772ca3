"""The one setting of the loss op: how much memory it may use for parts of the logits."""

from __future__ import annotations

import os

import torch

# CUDA: room for 3584 rows at V = 152064 (1040 MiB) and 4096 at V = 151936 (1187 MiB). At T = 8192,
# D = 3584 and 132 multiprocessors, chunks of 3584, 3584 and 1024 rows take 7 waves of the product
# with W, as one chunk would; 1024 MiB holds 3328 rows, whose chunks take 8. At D = 896 two chunks
# of 4096 rows take 2 waves instead of 3.
_DEFAULT_MIB = {"cpu": 256, "cuda": 1190}


def limit(device: torch.device) -> int:
    """Bytes of logits that may exist at once: CPO_FAST_WORKSPACE_MIB, or 256 MiB (CUDA: 1190 MiB).

    Beside it, the op keeps 4 bytes for each of the T x D hidden numbers. On CUDA a trained head may
    take 4 bytes for each of its V x D numbers more (chunked.keeps_slopes). Raises ValueError where
    the variable is not a number >= 1.
    """
    text = os.environ.get("CPO_FAST_WORKSPACE_MIB", "")
    mib = int(text) if text.isdigit() else 0 if text else _DEFAULT_MIB.get(device.type, 256)
    if mib < 1:
        raise ValueError(f"CPO_FAST_WORKSPACE_MIB must be a whole number >= 1, got {text!r}")
    return mib * 2**20

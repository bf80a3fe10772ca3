"""How much memory the loss op may use for parts of the logits."""

from __future__ import annotations

import os

import torch

# CUDA: room for 3584 rows at V = 152064 (1040 MiB) and 4096 at V = 151936 (1187 MiB). At T = 8192,
# D = 3584 and 132 multiprocessors, chunks of 3584, 3584 and 1024 rows take 7 waves of the product
# with W, the same as one chunk; 1024 MiB hold 3328 rows, and such chunks take 8. At D = 896, two
# chunks of 4096 rows take 2 waves instead of 3.
_DEFAULT_MIB = {"cpu": 256, "cuda": 1190}


def limit(device: torch.device) -> int:
    """Bytes of logits that may be in memory: CPO_FAST_WORKSPACE_MIB, or 256 MiB (CUDA: 1190 MiB).

    In addition, the op stores 4 bytes per element of hidden [T, D]. On CUDA a trained head can take
    4 more bytes per element of weight [V, D] (chunked.slope_bytes). Raises ValueError where the
    variable is not a whole number >= 1.
    """
    text = os.environ.get("CPO_FAST_WORKSPACE_MIB", "")
    mib = int(text) if text.isdigit() else 0 if text else _DEFAULT_MIB.get(device.type, 256)
    if mib < 1:
        raise ValueError(f"CPO_FAST_WORKSPACE_MIB must be a whole number >= 1, got {text!r}")
    return mib * 2**20

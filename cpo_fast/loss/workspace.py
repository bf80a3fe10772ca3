"""The one setting of the loss op: how much memory it may use for parts of the logits."""

from __future__ import annotations

import os

import torch

_DEFAULT_MIB = {"cpu": 256, "cuda": 1024}


def limit(device: torch.device) -> int:
    """Bytes of logits that may exist at once: CPO_FAST_WORKSPACE_MIB, or 256 MiB (CUDA: 1 GiB).

    Beside it, the op keeps 4 bytes for each of the T x D hidden numbers. Raises ValueError where
    the variable is not a number >= 1.
    """
    text = os.environ.get("CPO_FAST_WORKSPACE_MIB", "")
    mib = int(text) if text.isdigit() else 0 if text else _DEFAULT_MIB.get(device.type, 256)
    if mib < 1:
        raise ValueError(f"CPO_FAST_WORKSPACE_MIB must be a whole number >= 1, got {text!r}")
    return mib * 2**20

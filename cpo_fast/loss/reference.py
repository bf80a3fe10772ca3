"""The specification: log-probs of a linear head in eager PyTorch, for any device and float dtype.

Every other implementation agrees with it up to rounding. It stores all T x V logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cpo_fast.loss.options import LossOptions


def obstacle(device: torch.device) -> str | None:
    return None


def supports(dtype: torch.dtype) -> bool:
    return True


def token_logps(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [T] int64
    bias: Tensor | None,  # [V]
    ref_hidden: Tensor | None,  # [T, D]
    options: LossOptions,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(z)[label] per token, z = softcap * tanh((h W^T + b) / softcap) / temperature."""
    softcap, temperature = options.softcap, float(options.temperature)

    def logps(h: Tensor) -> Tensor:
        logits = F.linear(h, weight, bias)  # [T, V], in the inputs' precision
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        scored = labels != options.ignore_index
        index = labels.where(scored, 0).unsqueeze(1)
        picked = (logits / temperature).log_softmax(-1).gather(1, index).squeeze(1)
        return picked.where(scored, 0)

    if ref_hidden is None:
        return logps(hidden), None
    with torch.no_grad():
        ref = logps(ref_hidden)
    return logps(hidden), ref

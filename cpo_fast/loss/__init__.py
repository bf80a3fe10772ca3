"""The loss op: per-token log-probs of a linear head, and preference losses on their sums.

Stands on its own (torch only). Letters: T tokens, V vocabulary, D hidden size, S segments, P pairs.

    api.py        checks its arguments, chooses an implementation, sums tokens to segments
    losses.py     each preference loss once, on vectors over pairs
    checks.py     what an argument must be, checked before any work is done
    advice.py     what the caller of a refused argument most likely meant
    padded.py     the arguments for a padded batch of a transformers model
    segments.py   sums over the tokens of a segment
    reference.py  eager PyTorch: the specification
    cpu.py        the native CPU implementation (csrc/cpu)
    triton.py     the Triton implementation (kernels/)
    cuda.py       the CUDA C++ implementation (csrc/cuda)

An implementation is a module with three functions:

    obstacle(device) -> str | None      why it cannot run on this device, in this process
    supports(dtype) -> bool             does it take this dtype?
    token_logps(hidden, weight, labels, bias, ref_hidden, *, softcap, temperature, ignore_index)
        -> (logps [T], ref_logps [T] or None)

`token_logps` gets arguments that are already checked, and gives float32 (float64 for float64)
log-probs, 0 where a label is `ignore_index`. `logps` is differentiable in hidden, weight and
bias. `ref_hidden` [T, D], when given, is scored with the same weight and labels by the same
arithmetic without gradients, so that equal hidden states give bitwise equal log-probs.
`weight.requires_grad` says that the head
is trained even where no graph is recorded: arithmetic may depend on it. Implementations never
import one another.

It may also have `segment_sums`, which then stands for that of segments.py, and `wins(V, D)`: was it
measured to be the fastest for heads [V, D]?
"""

from __future__ import annotations

from cpo_fast.loss.api import (
    CPOLoss,
    CPOOutput,
    available_impls,
    cpo_loss,
    linear_logprobs,
)
from cpo_fast.loss.padded import PaddedInputs, from_padded

__all__ = [
    "CPOLoss",
    "CPOOutput",
    "PaddedInputs",
    "available_impls",
    "cpo_loss",
    "from_padded",
    "linear_logprobs",
]

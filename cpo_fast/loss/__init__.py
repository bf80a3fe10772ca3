"""The loss op: per-token log-probs of a linear head, and preference losses on their sums.

Depends on torch only. Letters: T tokens, V vocabulary, D hidden size, S segments, P pairs.

    api.py              validates arguments, sums tokens to segments; the public functions
    module.py           `cpo_loss` as a torch module
    options.py          the loss types and `LossOptions`; needs no torch
    losses.py           the formula of each preference loss, on vectors over pairs
    padded.py           the arguments for a padded batch of a transformers model
    checks.py           validation of arguments before any work is done
    advice.py           what the caller of a refused argument most likely meant
    segments.py         sums over the tokens of a segment
    implementations.py  which implementations are available, and which one a call uses
    reference.py        eager PyTorch: the specification
    cpu.py              the native CPU implementation (csrc/cpu, called by cpu_rows.py)
    triton.py           the Triton implementation (kernels/)
    cuda.py             the CUDA C++ implementation (csrc/cuda, called by cuda_launch.py)
    chunked.py          row chunks of the logits, for triton.py and cuda.py
    operators.py        registration of the implementations with torch.library
    workspace.py        how much memory logits may take
    processor.py        hardware support for bfloat16

An implementation is a module with three functions:

    obstacle(device) -> str | None      why it is unavailable on this device, in this process
    supports(dtype) -> bool             whether it takes this dtype
    token_logps(hidden, weight, labels, bias, ref_hidden, options: LossOptions)
        -> (logps [T], ref_logps [T] or None)

`token_logps` gets validated arguments and returns float32 log-probs (float64 for float64), 0 where
a label is `ignore_index`. `logps` is differentiable in hidden, weight and bias. `ref_hidden` [T, D]
is scored with the same weight and labels by the same arithmetic without gradients, so that equal
hidden states give bitwise equal log-probs. `weight.requires_grad` says that the head is trained,
also where no graph is recorded: the arithmetic can depend on it. Implementations never import one
another.

Optional: `sums_and_counts`, which replaces the one in segments.py, and `wins(V, D)`: whether it was
measured to be the fastest for heads [V, D].
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpo_fast.loss.api import CPOOutput, available_impls, cpo_loss, linear_logprobs
    from cpo_fast.loss.module import CPOLoss
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


def __getattr__(name: str) -> Any:  # on first use, so that options.py loads without torch
    if name not in __all__:
        raise AttributeError(f"module 'cpo_fast.loss' has no attribute {name!r}")
    from cpo_fast.loss import api, module, padded

    return next(getattr(part, name) for part in (api, module, padded) if hasattr(part, name))

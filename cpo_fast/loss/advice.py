"""Hints for arguments that checks.py refuses: what the caller most likely meant.

Every function returns "" or ": " and what to do. None reads the values of a tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cpo_fast.flags import near
from cpo_fast.loss.options import OTHER_NAMES

# Arguments with one entry per token, and the likely cause of another length.
_PER_TOKEN = {
    "labels": "hidden[t] predicts labels[t], so drop the last state and the first label of each "
    "sequence, or use cpo_fast.from_padded",
    "segment_ids": "it holds the sequence of every token; for lengths [S] pass "
    "torch.arange(S).repeat_interleave(lengths)",
}


def on_type(name: str, value: object) -> str:
    """For a value that is not a tensor."""
    if isinstance(value, nn.Module):
        if hasattr(value, "lm_head"):
            return f": pass model.lm_head.{'bias' if 'bias' in name else 'weight'}"
        return f": pass lm_head.{'bias' if 'bias' in name else 'weight'}"
    if getattr(value, "last_hidden_state", None) is not None:
        return f": pass {name}.last_hidden_state"
    if hasattr(value, "hidden_states"):
        return ": pass hidden_states[-1] of the output, called with output_hidden_states=True"
    if name == "pairs" and isinstance(value, tuple) and all(isinstance(v, Tensor) for v in value):
        return ": pass torch.stack([chosen, rejected], 1)"
    if name.endswith("hidden") and isinstance(value, tuple):
        return ": pass hidden_states[-1], the states after the final norm"
    if type(value).__module__ == "numpy":
        return f": pass torch.from_numpy({name})"
    if isinstance(value, list | tuple):
        return f": pass torch.tensor({name})"
    return ""


def on_shape(name: str, value: Tensor, shape: tuple[int | str, ...]) -> str:
    sizes = list(value.shape)
    if name.endswith("hidden") and len(sizes) == 3:
        return (
            f": pass {name}.flatten(0, 1), with the labels flattened in the same way, or use "
            "cpo_fast.from_padded"
        )
    if name == "pairs":
        if len(sizes) == 2 and sizes[0] == 2:
            return ": pass pairs.T, one row (chosen, rejected) for each pair"
        if sizes == [2]:
            return ": pass pairs[None], one row (chosen, rejected) for each pair"
        return ": one row (chosen, rejected) for each pair"
    if name in _PER_TOKEN:
        if len(sizes) == 2 and value.numel() == shape[0]:
            return f": pass {name}.flatten()"
        return f": {_PER_TOKEN[name]}"
    if name == "ref_logps":
        return ": one sum of log-probs for each segment, not one log-prob for each token"
    return ""


def on_dtype(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...]) -> str:
    if torch.int64 in dtypes:
        if name == "segment_ids" and value.dtype == torch.bool:
            return ": a mask does not say which sequence a token belongs to"
        return f": pass {name}.long()"
    if len(dtypes) == 1:
        short = str(dtypes[0]).removeprefix("torch.")
        return f": pass {name}.to(torch.{short}), or call under torch.autocast"
    return f": pass {name}.float()"


def on_number(name: str, value: object) -> str:
    if isinstance(value, Tensor):
        return f": pass {name}.item(); no gradient flows to it"
    return "" if value is None or isinstance(value, bool) else f": pass float({name})"


def on_head(hidden: Tensor, weight: Tensor, names: tuple[str, str]) -> str | None:
    """The whole message where hidden's last size is weight's first, as with logits or a transposed
    weight; else None."""
    if hidden.shape[1] == weight.shape[1] or hidden.shape[1] != weight.shape[0]:
        return None
    states, head = names
    sizes = f"got {states} {list(hidden.shape)} and {head} {list(weight.shape)}"
    if weight.shape[0] > weight.shape[1]:
        return (
            f"{states} must be hidden states [T, D], {sizes}: these look like logits [T, V]; pass "
            "the states before the output layer"
        )
    return f"{head} must be [V, D], {sizes}: pass {head}.T.contiguous()"


def on_loss_type(value: str, known: tuple[str, ...]) -> str:
    name = value.lower().replace("-", "_").removesuffix("_loss")
    if name in known:
        return f": use {name!r}"
    if name in OTHER_NAMES:
        return f": {OTHER_NAMES[name]}"
    close = [k for k in known if k.startswith(name) and name]
    if not close and (meant := near(name, known)):
        close = [meant]
    return f": did you mean {' or '.join(map(repr, close))}?" if close else ""

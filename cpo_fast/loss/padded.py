"""The arguments of `cpo_loss` from the padded batch of a transformers model."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from cpo_fast.loss import checks


class PaddedInputs(TypedDict):
    """Arguments of `cpo_loss`; T is B L, or the number of scored tokens."""

    hidden: Tensor  # [T, D]
    labels: Tensor  # [T]
    segment_ids: Tensor  # [T] row of the batch
    pairs: Tensor  # [P, 2]
    ref_hidden: Tensor | None  # [T, D]
    num_segments: int  # B


def from_padded(
    hidden: Tensor,
    labels: Tensor,
    ref_hidden: Tensor | None = None,
    *,
    pairs: Tensor | None = None,
    ignore_index: int = -100,
    drop_ignored: bool = False,
) -> PaddedInputs:
    """The arguments of `cpo_loss` for a padded batch: `cpo_loss(weight=..., **from_padded(...))`.

    - `hidden` [B, L, D]: the last hidden states of all positions, after the final norm
      (`model.model(...).last_hidden_state`, or `hidden_states[-1]` of the output). Not shifted.
    - `labels` [B, L] int64: the token ids at the same positions, `ignore_index` for prompt and
      padding. Not shifted: position l is predicted by the state at l - 1, as in transformers, so
      the label at position 0 is never scored. Padding can be on either side.
    - `ref_hidden` [B, L, Dr]: the states of the reference model, or None.
    - `pairs` [P, 2] int64: rows (chosen, rejected) of the batch. Default: the first half of the
      batch is chosen and the second half rejected, in the same order, as in trl's collator.
    - `drop_ignored`: remove the tokens that are not scored. Their number depends on values, so this
      waits once for a GPU. It pays off with many prompt and padding tokens: the Triton and CUDA
      implementations compute every token. The native CPU implementation always skips ignored
      tokens.

    Returns a dict: `hidden` and `ref_hidden` [T, D] (views unless `drop_ignored`), `labels` and
    `segment_ids` [T], `pairs`, `num_segments` B. T is B L. Pass a non-default
    `ignore_index` to `cpo_loss`, too.

    Raises TypeError or ValueError, which name the argument and say what to pass.
    """
    whole = "from_padded shifts: pass the states and the labels of all positions of the batch"
    checks.check_tensor("hidden", hidden, ("B", "L", "D"), checks.FLOATS, shape_hint=whole)
    B, L, _ = hidden.shape
    checks.check_tensor("labels", labels, (B, L), (torch.int64,), hidden.device, shape_hint=whole)
    checks.check_integer("ignore_index", ignore_index)
    if ref_hidden is not None:
        checks.check_tensor(
            "ref_hidden", ref_hidden, (B, L, "D"), checks.FLOATS, hidden.device, shape_hint=whole
        )
    rows = torch.arange(B, device=hidden.device)
    if pairs is None:
        if B % 2:
            raise ValueError(
                f"hidden must have an even number of rows (chosen, then rejected), got {B}: pass "
                "pairs [P, 2] for another layout"
            )
        pairs = torch.stack(rows.chunk(2), 1) if B else rows.new_zeros(0, 2)
    else:
        checks.check_indices("pairs", pairs, ("P", 2), hidden.device)
        checks.check_pairs(pairs, B, hint="pairs name rows of the batch")
    shifted = torch.cat([labels[:, 1:], labels.new_full((B, 1), ignore_index)], 1)
    states = hidden.flatten(0, 1)
    targets = shifted.flatten()
    segments = rows.repeat_interleave(L)
    ref_states = None if ref_hidden is None else ref_hidden.flatten(0, 1)
    if drop_ignored:
        kept = (targets != ignore_index).nonzero().squeeze(1)
        states, targets, segments = states[kept], targets[kept], segments[kept]
        ref_states = None if ref_states is None else ref_states[kept]
    return PaddedInputs(
        hidden=states,
        labels=targets,
        segment_ids=segments,
        pairs=pairs,
        ref_hidden=ref_states,
        num_segments=B,
    )

"""Attention over a pack: every token sees its own prompt and its own branch, causally.

Two ways with the same result: one dense mask over the whole row (the specification), and K/V
gathered per branch, which does no work across branches. The second is an attention function of
ours, registered through transformers' public AttentionInterface and handed its layout as a keyword
of the forward; without a layout (as in `generate`) it is plain SDPA.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cpo_fast.types import PackedBatch

GATHERED = "cpo_fast_gathered"


def dense_mask(batch: PackedBatch) -> torch.Tensor:
    """bool [1, 1, T, T], True where the row token may see the column token."""
    study, branch = batch.study_index, batch.branch_index
    same_study = study[:, None] == study[None, :]
    same_branch = (branch[:, None] == branch[None, :]) | (branch[None, :] == 0)
    return (same_study & same_branch).tril()[None, None]


class BranchLayout:
    """Where prompts and branches lie in the row of a pack, for `attend`.

    `studies` holds, in row order, (prompt length, lengths of its branches).
    """

    def __init__(self, batch: PackedBatch) -> None:
        keys = zip(batch.study_index.tolist(), batch.branch_index.tolist(), strict=True)
        runs = [(key, sum(1 for _ in run)) for key, run in groupby(keys)]
        self.studies: list[tuple[int, list[int]]] = []
        for (_, branch), length in runs:
            if branch == 0:
                self.studies.append((length, []))
            else:
                self.studies[-1][1].append(length)
        self.lengths = [n for prompt, branches in self.studies for n in (prompt, *branches)]
        self._masks: dict[tuple[int, int, torch.dtype], torch.Tensor] = {}

    def _mask(self, prompt: int, length: int, like: torch.Tensor) -> torch.Tensor:
        """Additive [length, prompt + length]: all of the prompt, the branch causally."""
        key = (prompt, length, like.dtype)
        if key not in self._masks:
            mask = like.new_full((length, prompt + length), float("-inf"))
            self._masks[key] = mask.triu(prompt + 1)
        return self._masks[key]

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """[1, H, T, d] from query [1, H, T, d] and key, value [1, H_kv, T, d]."""
        # One split per tensor: its backward is one concatenation; slices would each fill a row.
        pieces = zip(*(x.split(self.lengths, dim=2) for x in (query, key, value)), strict=True)
        out = []
        for prompt, branches in self.studies:
            q, k_prompt, v_prompt = next(pieces)
            out.append(
                scaled_dot_product_attention(q, k_prompt, v_prompt, is_causal=True, **options)
            )
            for length in branches:
                q, k, v = next(pieces)
                out.append(
                    scaled_dot_product_attention(
                        q,
                        torch.cat((k_prompt, k), dim=2),
                        torch.cat((v_prompt, v), dim=2),
                        attn_mask=self._mask(prompt, length, q),
                        **options,
                    )
                )
        return torch.cat(out, dim=2)


def gathered_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    branch_layout: BranchLayout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function as transformers calls it; [1, T, H, d] from [1, H, T, d]."""
    if branch_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    grouped = query.shape[1] != key.shape[1]
    out = branch_layout.attend(
        query, key, value, dropout_p=dropout, scale=scaling, enable_gqa=grouped
    )
    return out.transpose(1, 2), None


AttentionInterface.register(GATHERED, gathered_attention)
AttentionMaskInterface.register(GATHERED, sdpa_mask)

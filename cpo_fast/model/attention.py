"""Attention over a pack: every token attends causally to its own prompt and its own branch.

Four equivalent implementations. `sdpa`, one dense mask over the whole row, is the specification.
The others compute nothing across branches: `gathered` makes one SDPA call per prompt and branch
with gathered K and V (the default on a CPU and in float32); `varlen` makes one variable-length
flash attention call (torch's or flash-attn's) for the whole pack, with gathered K and V (the
default on CUDA in half precision); `flex` uses torch's flex_attention, which skips empty blocks of
the mask (CUDA).
These three are one attention function, registered through transformers' public AttentionInterface,
which receives its layout as a keyword of the forward; without a layout (as in `generate`) it is
plain SDPA. Vision towers have their own function (`cpo_fast.model.windows`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from itertools import accumulate, groupby
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cpo_fast.errors import UsageError
from cpo_fast.types import PackedBatch

BRANCHES = "cpo_fast_branches"
"""The name of `branch_attention` in transformers' registry."""

HALF = (torch.bfloat16, torch.float16)

SHORTEST_FLEX = 1024
"""Shorter rows are padded to this length for flex_attention."""

FLEX_GRAPHS = 32
"""Maximum number of compiled versions of flex_attention: up to 1,024 x 2^7 tokens there are 8
lengths, each with and without gradients, and with first-layer queries that need none.
"""


def dense_mask(batch: PackedBatch) -> torch.Tensor:
    """bool [1, 1, T, T], True where the row token attends to the column token."""
    study, branch = batch.study_index, batch.branch_index
    same_study = study[:, None] == study[None, :]
    same_branch = (branch[:, None] == branch[None, :]) | (branch[None, :] == 0)
    return (same_study & same_branch).tril()[None, None]


def studies_of(batch: PackedBatch) -> list[tuple[int, list[int]]]:
    """(prompt length, lengths of its branches) of every study, in row order."""
    keys = zip(batch.study_index.tolist(), batch.branch_index.tolist(), strict=True)
    studies: list[tuple[int, list[int]]] = []
    for (_, branch), run in groupby(keys):
        length = sum(1 for _ in run)
        if branch == 0:
            studies.append((length, []))
        else:
            studies[-1][1].append(length)
    return studies


class Layout(Protocol):
    """The attention layout of a pack, for `branch_attention`."""

    def attend(
        self,
        query: torch.Tensor,  # [1, H, T, d]
        key: torch.Tensor,  # [1, H_kv, T, d]
        value: torch.Tensor,  # [1, H_kv, T, d]
        *,
        scale: float | None,
        dropout: float,
    ) -> torch.Tensor: ...  # [1, T, H, d]


class GatheredLayout:
    """One SDPA call per prompt (causal) and per branch (its whole prompt, and itself causally)."""

    def __init__(self, batch: PackedBatch) -> None:
        self.studies = studies_of(batch)
        self.lengths = [n for prompt, branches in self.studies for n in (prompt, *branches)]
        self._masks: dict[tuple[int, int, torch.dtype], torch.Tensor] = {}

    def _mask(self, prompt: int, length: int, like: torch.Tensor) -> torch.Tensor:
        """Additive mask [length, prompt + length], cached for all layers."""
        key = (prompt, length, like.dtype)
        if key not in self._masks:
            mask = like.new_full((length, prompt + length), float("-inf"))
            self._masks[key] = mask.triu(prompt + 1)
        return self._masks[key]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float | None,
        dropout: float,
    ) -> torch.Tensor:
        options: dict[str, Any] = {
            "scale": scale,
            "dropout_p": dropout,
            "enable_gqa": query.shape[1] != key.shape[1],
        }
        # One split per tensor: its backward is one concatenation, while slices would each fill a
        # row.
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
        return torch.cat(out, dim=2).transpose(1, 2)


class VarlenLayout:
    """Every prompt and branch is a sequence of one variable-length flash attention call: its
    queries in row order, its keys the prompt and itself, causal from the lower right corner.

    CUDA with bfloat16 or float16 only; checked on an H200 against float32. The layout is tested on
    the CPU with stand-ins for the kernels.
    """

    def __init__(self, batch: PackedBatch) -> None:
        index: list[torch.Tensor] = []  # key positions of every sequence
        queries: list[int] = []
        position = 0
        for prompt, branches in studies_of(batch):
            seen = torch.arange(0)  # a prompt attends to itself, a branch also to its prompt
            for length in (prompt, *branches):
                own = torch.arange(position, position + length)
                index.append(torch.cat((seen, own)))
                queries.append(length)
                seen = index[-1][:prompt]
                position += length
        keys = [len(sequence) for sequence in index]
        device = batch.input_ids.device
        self.keys = RepeatedRows(torch.cat(index), position, device)
        self.query_ends, self.key_ends = (
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
            for lengths in (queries, keys)
        )
        self.longest_query, self.longest_key = max(queries), max(keys)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float | None,
        dropout: float,
    ) -> torch.Tensor:
        kernel = varlen_kernel()
        if kernel is None:
            raise UsageError("attention='varlen' needs torch 2.12 or later, or flash-attn")
        if dropout:
            raise UsageError("attention='varlen' has no dropout; set attention_dropout to 0")
        out = kernel(
            query[0].transpose(0, 1),  # [T, H, d]
            self.keys.of(key[0].transpose(0, 1)),
            self.keys.of(value[0].transpose(0, 1)),
            self.query_ends,
            self.key_ends,
            self.longest_query,
            self.longest_key,
            scale,
            True,
        )
        return out[None]


class RepeatedRows:
    """Rows of a tensor by an index that contains every row at least once.

    The backward of torch's indexing uses atomics on CUDA, in a nondeterministic order. Here the
    gradients of a row are summed in index order, in float32.
    """

    def __init__(self, index: torch.Tensor, rows: int, device: torch.device) -> None:
        self.index = index.to(device)
        # For the k-th occurrence of rows: the rows that have one, and its positions in the index.
        order = index.argsort(stable=True)
        counts = index.bincount(minlength=rows)
        first = counts.cumsum(0) - counts
        self.first = order[first].to(device)
        self.again = []
        for k in range(1, int(counts.max())):
            repeated = torch.nonzero(counts > k)[:, 0]
            self.again.append((repeated.to(device), order[first[repeated] + k].to(device)))

    def of(self, x: torch.Tensor) -> torch.Tensor:
        return _Repeat.apply(x, self)  # type: ignore[no-any-return]


class _Repeat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: RepeatedRows) -> torch.Tensor:
        ctx.rows = rows
        return x.index_select(0, rows.index)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        rows = ctx.rows
        total = grad.index_select(0, rows.first).float()
        for repeated, positions in rows.again:  # distinct rows, so that no additions collide
            total.index_add_(0, repeated, grad.index_select(0, positions).float())
        return total.to(grad.dtype), None


@cache
def varlen_kernel() -> Callable[..., torch.Tensor] | None:
    """Variable-length attention: torch's, else flash-attn's if installed, else None. CUDA, half
    precision.

    Arguments: q [T, H, d], k and v [keys, H_kv, d], cumulative ends of the sequences' queries and
    keys (int32, starting with 0), the maximum lengths of both, the scale, and whether it is causal,
    from the lower right corner. Both kernels support grouped heads.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        pass
    else:
        parameters = inspect.signature(varlen_attn).parameters
        if "window_size" in parameters:
            # torch 2.11 has no keyword for grouping and leaves it to the kernel.
            grouping: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in parameters else {}

            def by_torch(*tensors: Any) -> Any:
                *qkv_ends, scale, causal = tensors
                window = (-1, 0 if causal else -1)
                return varlen_attn(*qkv_ends, scale=scale, window_size=window, **grouping)

            return by_torch
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None

    def by_flash_attn(*tensors: Any) -> Any:
        *qkv_ends, scale, causal = tensors
        return flash_attn_varlen_func(*qkv_ends, softmax_scale=scale, causal=causal)

    return by_flash_attn


def supports_head_size(head_size: int) -> bool:
    """Whether the kernels of `varlen_kernel` support heads of this size."""
    return head_size % 8 == 0 and head_size <= 256


class FlexLayout:
    """torch's flex_attention with a block mask from the study and branch of every token.

    CUDA. It is compiled per length, so rows are padded to a power of two, at least `SHORTEST_FLEX`,
    to limit compilations. A padding token attends to itself only, at almost no cost. On a CPU
    flex_attention has no public backward; forward (also compiled) and backward (its dense form) are
    tested there. Checked on an H200 against float32.
    """

    def __init__(self, batch: PackedBatch) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        tokens = len(batch.input_ids)
        length = max(SHORTEST_FLEX, 1 << (tokens - 1).bit_length())
        self.filler = length - tokens
        study = torch.nn.functional.pad(batch.study_index, (0, self.filler), value=-1)
        branch = torch.nn.functional.pad(batch.branch_index, (0, self.filler))

        def sees(
            b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor
        ) -> torch.Tensor:
            same_branch = (branch[query] == branch[key]) | (branch[key] == 0)
            same_study = (study[query] == study[key]) & (study[query] >= 0)
            return (same_study & same_branch & (query >= key)) | (query == key)

        device = str(batch.input_ids.device)
        self.mask = create_block_mask(sees, None, None, length, length, device=device)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float | None,
        dropout: float,
    ) -> torch.Tensor:
        if dropout:
            raise UsageError("attention='flex' has no dropout; set attention_dropout to 0")
        filled = [torch.nn.functional.pad(x, (0, 0, 0, self.filler)) for x in (query, key, value)]
        out: Any = _flex_attention(query.device.type)(
            *filled,
            block_mask=self.mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out[:, :, : query.shape[2]].transpose(1, 2)


@cache
def _flex_attention(device_type: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    if device_type == "cpu":
        return flex_attention
    # With fullgraph, torch raises instead of silently running uncompiled.
    compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    # Four lengths with and without gradients would reach torch's default limit of 8.
    return torch._dynamo.config.patch(recompile_limit=FLEX_GRAPHS)(compiled)


def branch_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    branch_layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function with transformers' signature: [1, H, T, d] -> [1, T, H, d]."""
    if branch_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    return _attend(branch_layout, query, key, value, scaling, dropout), None


@torch.compiler.disable
def _attend(
    layout: Layout,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    dropout: float,
) -> torch.Tensor:
    """Excluded from compiled layers, which would be recompiled for the layout of every pack."""
    return layout.attend(query, key, value, scale=scale, dropout=dropout)


AttentionInterface.register(BRANCHES, branch_attention)
AttentionMaskInterface.register(BRANCHES, sdpa_mask)

"""Log-probs of thousands of continuations of one prompt with shared prefixes.

Continuations form a tree of tokens; each token is computed once, however many continuations contain
it. The prompt and one long continuation, the trunk, are computed first and stay in the KV cache.
The branches follow in passes of bounded size; each token attends to the prompt, its part of the
trunk and its own ancestors. The answer after *every* token of a thought therefore costs little more
than the answers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cpo_fast.errors import UsageError
from cpo_fast.types import Pixels, Prompt

if TYPE_CHECKING:
    import torch

    from cpo_fast.model.packed import PackedModel


@dataclass
class TokenTree:
    """Token, parent and depth of each node. A parent has a smaller number than its children; -1 is
    the end of the prompt. Nodes 0 .. trunk - 1 are the trunk in order.
    """

    trunk: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    @classmethod
    def of(cls, trunk: Sequence[int]) -> TokenTree:
        tree = cls(len(trunk))
        tree.insert(trunk)
        return tree

    def insert(self, continuation: Sequence[int]) -> int:
        """Add a continuation and return the node of its last token."""
        node = -1
        for depth, token in enumerate(continuation):
            key = (node, token)
            if key not in self._children:
                self._children[key] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
                self.depths.append(depth)
            node = self._children[key]
        return node


def score_tree(
    model: PackedModel,
    prompt: Prompt,
    continuations: Sequence[Sequence[int]],
    pixels: Pixels | None = None,
    *,
    trunk: Sequence[int],
    image_token_id: int | None = None,
    tokens_per_pass: int = 512,
    impl: str | None = None,
) -> torch.Tensor:
    """Summed log-probability of each of N continuations after `prompt`: [N] float64 on the CPU.

    `trunk` is the sequence whose prefixes most continuations share; it need not be one of them.
    Every subtree off the trunk is computed in one pass, of at most `tokens_per_pass` tokens unless
    the subtree itself is larger. The result depends on neither. `impl` is passed to
    `linear_logprobs`. Raises UsageError for an empty prompt, trunk or continuation.
    """
    import torch

    from cpo_fast.evaluation.generate import evaluating
    from cpo_fast.loss import linear_logprobs

    if not prompt.input_ids or not trunk or not all(map(len, continuations)):
        raise UsageError("the prompt, the trunk and every continuation need at least one token")
    tree = TokenTree.of(trunk)
    ends = [tree.insert(continuation) for continuation in continuations]
    weight, bias = model.head()
    logps = np.zeros(len(tree.tokens))
    with evaluating(model.model), torch.inference_mode():
        forward = _Forward(model, prompt, tree, pixels, image_token_id)
        for nodes, hidden, parents in forward.passes(tokens_per_pass):
            labels = torch.tensor([tree.tokens[node] for node in nodes], device=weight.device)
            rows = hidden.index_select(0, torch.tensor(parents, device=weight.device))
            rows = model.head_inputs(rows)
            found = linear_logprobs(rows, weight, labels, bias=bias, impl=impl)
            logps[nodes] = found.double().cpu().numpy()
    sums = np.zeros(len(tree.tokens) + 1)  # index -1 is the end of the prompt
    for node, parent in enumerate(tree.parents):
        sums[node] = sums[parent] + logps[node]
    return torch.from_numpy(sums[ends])


Pass = tuple[list[int], "torch.Tensor", list[int]]
"""(nodes, hidden states [n, D], row of `hidden` that predicts each node)."""


class _Forward:
    """The forward passes over a tree; keys and values of prompt and trunk stay cached."""

    def __init__(
        self,
        model: PackedModel,
        prompt: Prompt,
        tree: TokenTree,
        pixels: Pixels | None,
        image_token_id: int | None,
    ) -> None:
        import torch
        from transformers import DynamicCache

        from cpo_fast.packing.collate import prompt_positions

        base: Any = model.model
        self._inner = base.get_base_model().model if hasattr(base, "peft_config") else base.model
        self._device = model.head()[0].device
        self._tree = tree
        self._start = len(prompt.input_ids)
        self._cache = DynamicCache()
        loaded = [pixels(image) for image in prompt.images] if pixels else []
        if len(loaded) != len(prompt.images):
            raise UsageError("the prompt has images, but no `pixels` function was given")
        images: dict[str, torch.Tensor] = {}
        if loaded:
            images["pixel_values"] = torch.cat([values for values, _ in loaded])
            images["image_grid_thw"] = torch.stack([grid for _, grid in loaded])
        self._sees = hasattr(self._inner, "visual")
        prompt_ids = torch.tensor(prompt.input_ids)
        positions = prompt_positions(prompt_ids, [grid for _, grid in loaded], image_token_id)
        self._next = int(positions.max()) + 1
        ids = torch.cat([prompt_ids, torch.tensor(tree.tokens[: tree.trunk])])
        after = torch.arange(self._next, self._next + tree.trunk).expand(3, -1)
        mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        states = self._run(ids, torch.cat([positions, after], 1), mask, **images)
        self._trunk_states = states[
            self._start - 1 :
        ]  # row i predicts children of trunk node i - 1

    def passes(self, tokens_per_pass: int) -> Any:
        """The trunk and its direct children first, then the deeper nodes pass by pass."""
        tree = self._tree
        on_trunk = [n for n, parent in enumerate(tree.parents) if parent < tree.trunk]
        yield on_trunk, self._trunk_states, [tree.parents[node] + 1 for node in on_trunk]
        for nodes in self._groups(tokens_per_pass):
            row = {node: i for i, node in enumerate(nodes)}
            children = [c for node in nodes for c in self._children[node]]
            yield children, self._branches(nodes, row), [row[tree.parents[c]] for c in children]

    def _groups(self, tokens_per_pass: int) -> Any:
        """Nodes off the trunk that have children, whole subtrees together, parents first."""
        tree = self._tree
        self._children: list[list[int]] = [[] for _ in tree.tokens]
        roots: dict[int, list[int]] = {}
        root_of: dict[int, int] = {}
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                self._children[parent].append(node)
            if node >= tree.trunk:
                root_of[node] = node if parent < tree.trunk else root_of[parent]
        for node, root in root_of.items():
            if self._children[node]:
                roots.setdefault(root, []).append(node)
        group: list[int] = []
        for subtree in roots.values():
            if group and len(group) + len(subtree) > tokens_per_pass:
                yield group
                group = []
            group = group + subtree
        if group:
            yield group

    def _branches(self, nodes: list[int], row: dict[int, int]) -> torch.Tensor:
        """Hidden states [n, D] of nodes off the trunk; the cache is restored afterwards."""
        import torch

        tree, kept = self._tree, self._start + self._tree.trunk
        mask = np.zeros((len(nodes), kept + len(nodes)), dtype=bool)
        for i, node in enumerate(nodes):
            parent = tree.parents[node]
            if parent in row:
                mask[i] = mask[row[parent]]
            else:
                mask[i, : self._start + parent + 1] = True
            mask[i, kept + i] = True
        ids = torch.tensor([tree.tokens[node] for node in nodes])
        depths = torch.tensor([tree.depths[node] for node in nodes])
        states = self._run(ids, (self._next + depths).expand(3, -1), torch.from_numpy(mask))
        self._cache.crop(-len(nodes))
        return states

    def _run(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        **images: torch.Tensor,
    ) -> torch.Tensor:
        """Hidden states [n, D] of tokens [n] at positions [3, n]; `mask` [n, cached + n] is true
        where a token attends.
        """
        out = self._inner(
            input_ids=ids[None].to(self._device),
            position_ids=(positions[:, None] if self._sees else positions[:1]).to(self._device),
            attention_mask=mask[None, None].to(self._device),
            past_key_values=self._cache,
            use_cache=True,
            **{name: value.to(self._device) for name, value in images.items()},
        )
        return out.last_hidden_state[0]

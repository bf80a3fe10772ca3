"""Inputs of the checks: random tensors of several kinds, and a workspace limit."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cpo_fast.loss import cpo_loss, linear_logprobs

IGNORED = -100


@contextlib.contextmanager
def workspace(mib: int) -> Iterator[None]:
    """Limits the workspace of the loss op within the block."""
    before = os.environ.get("CPO_FAST_WORKSPACE_MIB")
    os.environ["CPO_FAST_WORKSPACE_MIB"] = str(mib)
    try:
        yield
    finally:
        if before is None:
            del os.environ["CPO_FAST_WORKSPACE_MIB"]
        else:
            os.environ["CPO_FAST_WORKSPACE_MIB"] = before


class Inputs:
    """Random inputs of a kind; `leaves` gives copies that require gradients."""

    def __init__(
        self,
        kind: str,
        T: int,
        V: int,
        D: int,
        dtype: torch.dtype,
        device: str,
        *,
        bias: bool = False,
        seed: int = 0,
    ) -> None:
        g = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=device)

        hidden = normal(T, D)
        weight = normal(V, D) * (3 / D**0.5)
        self.labels = torch.randint(0, V, (T,), generator=g, device=device)
        if kind == "flat":
            hidden *= 1e-3
        elif kind == "peaked":  # most mass on the label, or on another token
            scale = torch.linspace(0, 4, T, device=device)[:, None]
            hidden = weight[self.labels] * scale + 0.1 * hidden
        elif kind == "negative":  # every logit far below zero
            hidden, weight = 30 * hidden.abs(), -weight.abs()
        self.labels[torch.rand(T, generator=g, device=device) < 0.15] = IGNORED
        self.tensors = [hidden.to(dtype), weight.to(dtype)]
        if bias:
            self.tensors.append(normal(V).to(dtype))
        self.upstream = normal(T)
        self.segments = torch.arange(T, device=device) * 4 // max(T, 4)
        self.pairs = torch.tensor([[0, 1], [2, 3]], device=device)

    def leaves(self, dtype: torch.dtype | None = None, head: bool = True) -> list[Tensor]:
        found = [x.detach().to(dtype or x.dtype, copy=True) for x in self.tensors]
        for i, leaf in enumerate(found):
            leaf.requires_grad_(i == 0 or head)
        return found

    def score(self, dtype: torch.dtype, impl: str, **options: Any) -> list[Tensor]:
        """Log-probs, and the gradients of their weighted sum with random weights."""
        leaves = self.leaves(dtype)
        bias = leaves[2] if len(leaves) == 3 else None
        logps = linear_logprobs(*leaves[:2], self.labels, bias=bias, impl=impl, **options)
        grads = torch.autograd.grad((logps * self.upstream).sum(), leaves)
        return [logps.detach(), *grads]

    def loss(self, hidden: Tensor, weight: Tensor, ref: Tensor, impl: str) -> Any:
        return cpo_loss(
            hidden,
            weight,
            self.labels,
            self.segments,
            self.pairs,
            ref_hidden=ref,
            num_segments=4,
            impl=impl,
        )

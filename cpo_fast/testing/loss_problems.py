"""Problems for the loss op: random hidden states, head and labels of several kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpo_fast.loss import cpo_loss, linear_logprobs

IGNORED = -100
KINDS = ("random", "flat", "peaked", "negative")
NAMES = ("logps", "hidden", "weight", "bias")
"""What `score` returns: log-probs, and gradients of the leaves."""


class LossProblem:
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
        scale: float = 3.0,
    ) -> None:
        g = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=device)

        hidden = normal(T, D)
        weight = normal(V, D) * (scale / D**0.5)  # logits of about this size
        self.labels = torch.randint(0, V, (T,), generator=g, device=device)
        if kind == "flat":
            hidden *= 1e-3
        elif kind == "peaked":  # most mass on the label, or on another token
            growing = torch.linspace(0, 4, T, device=device)[:, None]
            hidden = weight[self.labels] * growing + 0.1 * hidden
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

    def score(self, dtype: torch.dtype, impl: str, **options: Any) -> dict[str, Tensor]:
        """Log-probs, and the gradients of their weighted sum with random weights."""

        def logps(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return linear_logprobs(hidden, weight, self.labels, bias=bias, impl=impl, **options)

        return self._with_gradients(dtype, logps)

    def score_eagerly(
        self, dtype: torch.dtype, softcap: float | None = None, temperature: float = 1.0
    ) -> dict[str, Tensor]:
        """The same as `score`, written with PyTorch alone: the truth in float64, and the error
        that is allowed in a lower precision."""

        def logps(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            logits = F.linear(hidden, weight, bias).to(torch.promote_types(dtype, torch.float32))
            if softcap is not None:
                logits = softcap * (logits / softcap).tanh()
            every = F.log_softmax(logits / temperature, dim=-1)
            scored = self.labels != IGNORED
            rows = torch.arange(len(self.labels), device=hidden.device)
            return torch.where(scored, every[rows, self.labels.clamp(min=0)], 0.0)

        return self._with_gradients(dtype, logps)

    def _with_gradients(
        self, dtype: torch.dtype, score: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    ) -> dict[str, Tensor]:
        leaves = self.leaves(dtype)
        logps = score(leaves[0], leaves[1], leaves[2] if len(leaves) == 3 else None)
        grads = torch.autograd.grad((logps * self.upstream).sum(), leaves)
        return dict(zip(NAMES, (logps.detach(), *grads), strict=False))

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

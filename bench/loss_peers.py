"""What the benchmarks of the loss op measure: a problem, and the sigmoid loss of it by each peer.

A peer gets a `Problem` and returns the loss, from which gradients of `hidden` (and of the head,
where it is trained) can be taken. trl's op is asked for log-probs only, which flatters it: its
trainer asks for four statistics more.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cpo_fast.loss import cpo_loss

BETA = 0.1
SEGMENTS = 4  # of equal length, as Liger wants them: chosen, chosen, rejected, rejected
CASES = {
    "frozen head, reference on-line": (False, True, True),
    "frozen head, reference cached": (False, False, True),
    "frozen head, forward only": (False, True, False),
    "trained head, reference on-line": (True, True, True),
    "trained head, reference cached": (True, False, True),
}
"""Head trained, reference on-line, backward."""
PACKAGES = {
    "trl chunked": "trl",
    "Liger fused DPO": "liger-kernel",
    "cut-cross-entropy": "cut-cross-entropy",
    "quack": "quack-kernels",
}


QUACK_ROWS = 4096  # of a chunk, quack's default


class CannotCompute(Exception):
    """A peer has no way to compute this case."""


@dataclass(frozen=True)
class Problem:
    hidden: Tensor  # [T, D]
    ref_hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    labels: Tensor  # [T]
    segments: Tensor  # [T]
    pairs: Tensor  # [2, 2]
    ref_logps: Tensor  # [SEGMENTS] of the cached reference
    online: bool
    backward: bool


@functools.lru_cache(maxsize=1)
def tensors(T: int, D: int, V: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [T, D], ref_hidden [T, D], weight [V, D] in bfloat16, labels [T]."""
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(T, D, generator=g, device=device).bfloat16()
    noise = torch.randn(T, D, generator=g, device=device)
    ref_hidden = (hidden.float() + 0.05 * noise).bfloat16()
    weight = (0.05 * torch.randn(V, D, generator=g, device=device)).bfloat16()
    return hidden, ref_hidden, weight, torch.randint(0, V, (T,), generator=g, device=device)


def problem(shape: tuple[int, ...], case: str, device: str = "cpu") -> Problem:
    """`case` of CASES for (T, D, V), with leaves of its own to take gradients of."""
    trained, online, backward = CASES[case]
    hidden, ref_hidden, weight, labels = tensors(*shape, device)
    T = shape[0]
    return Problem(
        hidden.clone().requires_grad_(backward),
        ref_hidden,
        weight.detach().requires_grad_(trained),
        labels,
        torch.arange(T, device=device) * SEGMENTS // T,
        torch.tensor([[0, 2], [1, 3]], device=device),
        torch.full((SEGMENTS,), -12.0 * T / SEGMENTS, device=device),
        online,
        backward,
    )


def preference(p: Problem, score: Callable[[Tensor], Tensor]) -> Tensor:
    """The sigmoid loss of a provider of per-token log-probs."""
    logps = score(p.hidden).double().view(SEGMENTS, -1).sum(1)
    ref = p.ref_logps
    if p.online:
        with torch.no_grad():
            ref = score(p.ref_hidden).double().view(SEGMENTS, -1).sum(1)
    ratio = (logps - ref)[p.pairs]
    return -F.logsigmoid(BETA * (ratio[:, 0] - ratio[:, 1])).mean()


def ours(p: Problem, impl: str | None = None) -> Tensor:
    """What the peers are compared with."""
    source = {"ref_hidden": p.ref_hidden} if p.online else {"ref_logps": p.ref_logps}
    return cpo_loss(
        p.hidden,
        p.weight,
        p.labels,
        p.segments,
        p.pairs,
        beta=BETA,
        num_segments=SEGMENTS,
        impl=impl,
        **source,
    ).loss


def eager(p: Problem) -> Tensor:
    def score(hidden: Tensor) -> Tensor:
        logps = F.linear(hidden, p.weight).float().log_softmax(-1)
        return logps.gather(1, p.labels.unsqueeze(1)).squeeze(1)

    return preference(p, score)


def trl_chunked(p: Problem) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as size

    def score(hidden: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(
            hidden, p.weight, None, p.labels, 1.0, size, None, 1.0, ()
        )[0]

    return preference(p, score)


def cut_cross_entropy(p: Problem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if p.hidden.is_cuda else "torch_compile"

    def score(hidden: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, p.weight, p.labels, reduction="none", impl=impl)

    return preference(p, score)


@functools.cache
def _liger_module(online: bool, compiled: bool) -> torch.nn.Module:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    return LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=online, compiled=compiled)


def liger(p: Problem) -> Tensor:
    if not p.online:
        raise CannotCompute("Liger's fused DPO takes no cached reference")
    D = p.hidden.shape[1]
    # On a GPU Inductor may compile for longer than a measurement may take.
    loss, *_ = _liger_module(p.online, not p.hidden.is_cuda)(
        p.weight,
        p.hidden.view(SEGMENTS, -1, D),
        p.labels.view(SEGMENTS, -1),
        ref_input=p.ref_hidden.view(SEGMENTS, -1, D),
        ref_weight=p.weight.detach(),
    )
    return loss


class _QuackTokens(torch.autograd.Function):
    """Log-probs of tokens from quack's pipeline, whose own operator returns their sum only: its
    forward makes the gradient of every token's loss, which the backward scales by rows."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        from quack.linear_cross_entropy import scaled_exp_linear_cross_entropy_fwd

        losses, slopes, _ = scaled_exp_linear_cross_entropy_fwd(
            hidden, weight, labels, QUACK_ROWS, need_dx=True, need_dw=False
        )
        ctx.save_for_backward(slopes[: len(labels)])
        return -losses[: len(labels)]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (slopes,) = ctx.saved_tensors
        return slopes * -grad.to(slopes.dtype)[:, None], None, None


def quack(p: Problem) -> Tensor:
    from quack import linear_cross_entropy as module

    if p.weight.requires_grad:
        raise CannotCompute("quack forms the head's gradient before the loss is known")
    if not module.scaled_exp_lce_supported(p.hidden, p.weight, QUACK_ROWS, "sum"):
        raise CannotCompute("quack's pipeline takes bfloat16 on compute capability 9.0")

    def score(hidden: Tensor) -> Tensor:
        if hidden.requires_grad:
            return _QuackTokens.apply(hidden, p.weight, p.labels)
        # What its operator does without gradients: no logits are written.
        return -module._scaled_exp_lce_loss_only(hidden, p.weight, p.labels, -100)

    return preference(p, score)


PEERS: dict[str, Callable[[Problem], Tensor]] = {
    "eager": eager,
    "trl chunked": trl_chunked,
    "Liger fused DPO": liger,
    "cut-cross-entropy": cut_cross_entropy,
    "quack": quack,
}


def version(package: str) -> str | None:
    """Of an installed distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class Truth(NamedTuple):
    """What a provider is compared with, in float64."""

    loss: Tensor  # []
    hidden_grad: Tensor  # [T, D]
    weight_grad: Tensor | None  # [V, D], None for a frozen head


def truth(p: Problem, rows: int = 64) -> Truth:
    """Loss and gradients in float64, `rows` tokens at a time."""
    weight = p.weight.detach().double()

    def score(hidden: Tensor) -> tuple[Tensor, Tensor]:
        logps, slopes = [], []
        for h, y in zip(hidden.detach().double().split(rows), p.labels.split(rows), strict=True):
            logp = (h @ weight.t()).log_softmax(-1)
            logps.append(logp.gather(1, y.unsqueeze(1)).squeeze(1))
            slopes.append(weight[y] - logp.exp_() @ weight)
        return torch.cat(logps), torch.cat(slopes)

    values, slopes = score(p.hidden)
    values.requires_grad_()
    ref, _ = score(p.ref_hidden) if p.online else (values.detach(), None)
    with torch.enable_grad():
        loss = preference(p, lambda hidden: values if hidden is p.hidden else ref)
    (coef,) = torch.autograd.grad(loss, values)
    weight_grad = None
    if p.weight.requires_grad:
        weight_grad = torch.zeros_like(weight)
        for h, y, c in zip(
            p.hidden.detach().double().split(rows),
            p.labels.split(rows),
            coef.split(rows),
            strict=True,
        ):
            slope = (h @ weight.t()).softmax(-1).neg_()
            slope[torch.arange(len(y), device=y.device), y] += 1
            weight_grad.addmm_((c.unsqueeze(1) * slope).t(), h)
    return Truth(loss.detach(), coef.unsqueeze(1) * slopes, weight_grad)

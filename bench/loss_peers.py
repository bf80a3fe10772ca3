"""Loss benchmarks: inputs, the sigmoid loss by our op and by each peer, truth and floor.

A peer gets a `Problem` and returns the loss, differentiable in `hidden` and in a trained head.
trl's op computes log-probs only, which favours it: its trainer requests four more statistics.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cpo_fast.loss import cpo_loss

BETA = 0.1
SEGMENTS = 4  # of equal length, as Liger requires: chosen, chosen, rejected, rejected
CASES = {
    "frozen head, reference on-line": (False, True, True),
    "frozen head, reference cached": (False, False, True),
    "frozen head, forward only": (False, True, False),
    "trained head, reference on-line": (True, True, True),
    "trained head, reference cached": (True, False, True),
}
"""(head trained, reference on-line, backward)."""
PACKAGES = {
    "trl chunked": "trl",
    "Liger fused DPO": "liger-kernel",
    "cut-cross-entropy": "cut-cross-entropy",
    "quack": "quack-kernels",
}
QUACK_ROWS = 4096  # rows per chunk, quack's default
Shape = tuple[int, int, int]  # T, D, V


class CannotCompute(Exception):
    """A peer does not support this case."""


@dataclass(frozen=True)
class Problem:
    hidden: Tensor  # [T, D]
    ref_hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    labels: Tensor  # [T]
    segments: Tensor  # [T]
    pairs: Tensor  # [2, 2]
    ref_logps: Tensor  # [SEGMENTS], cached
    online: bool
    backward: bool


@functools.lru_cache(maxsize=1)
def make_tensors(
    T: int, D: int, V: int, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [T, D], ref_hidden [T, D], weight [V, D] in bfloat16, labels [T]."""
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(T, D, generator=g, device=device).bfloat16()
    noise = torch.randn(T, D, generator=g, device=device)
    ref_hidden = (hidden.float() + 0.05 * noise).bfloat16()
    weight = (0.05 * torch.randn(V, D, generator=g, device=device)).bfloat16()
    return hidden, ref_hidden, weight, torch.randint(0, V, (T,), generator=g, device=device)


def make_problem(shape: Shape, case: str, device: str = "cpu") -> Problem:
    """`case` of CASES, with new leaves for gradients."""
    trained, online, backward = CASES[case]
    hidden, ref_hidden, weight, labels = make_tensors(*shape, device)
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


def compute_sigmoid_loss(p: Problem, score: Callable[[Tensor], Tensor]) -> Tensor:
    """The sigmoid loss from per-token log-probs `score(hidden)` [T]."""
    logps = score(p.hidden).double().view(SEGMENTS, -1).sum(1)
    ref = p.ref_logps
    if p.online:
        with torch.no_grad():
            ref = score(p.ref_hidden).double().view(SEGMENTS, -1).sum(1)
    ratio = (logps - ref)[p.pairs]
    return -F.logsigmoid(BETA * (ratio[:, 0] - ratio[:, 1])).mean()


def compute_ours(p: Problem, impl: str | None = None) -> Tensor:
    """The loss by our op."""
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


def compute_eager(p: Problem) -> Tensor:
    def score(hidden: Tensor) -> Tensor:
        logps = F.linear(hidden, p.weight).float().log_softmax(-1)
        return logps.gather(1, p.labels.unsqueeze(1)).squeeze(1)

    return compute_sigmoid_loss(p, score)


def compute_trl(p: Problem) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as size

    def score(hidden: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(
            hidden, p.weight, None, p.labels, 1.0, size, None, 1.0, ()
        )[0]

    return compute_sigmoid_loss(p, score)


def compute_cce(p: Problem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if p.hidden.is_cuda else "torch_compile"

    def score(hidden: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, p.weight, p.labels, reduction="none", impl=impl)

    return compute_sigmoid_loss(p, score)


@functools.cache
def _build_liger(online: bool, compiled: bool) -> torch.nn.Module:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    return LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=online, compiled=compiled)


def compute_liger(p: Problem) -> Tensor:
    if not p.online:
        raise CannotCompute("Liger's fused DPO takes no cached reference")
    D = p.hidden.shape[1]
    # On a GPU Inductor's compilation can exceed a measurement's time limit.
    loss, *_ = _build_liger(p.online, not p.hidden.is_cuda)(
        p.weight,
        p.hidden.view(SEGMENTS, -1, D),
        p.labels.view(SEGMENTS, -1),
        ref_input=p.ref_hidden.view(SEGMENTS, -1, D),
        ref_weight=p.weight.detach(),
    )
    return loss


class _QuackTokens(torch.autograd.Function):
    """Per-token log-probs from quack's pipeline, whose public operator returns only their sum. The
    forward computes the gradient of each token's loss; the backward scales its rows."""

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


def compute_quack(p: Problem) -> Tensor:
    from quack import linear_cross_entropy as module

    if p.weight.requires_grad:
        raise CannotCompute("quack computes the head's gradient before the loss is known")
    if not module.scaled_exp_lce_supported(p.hidden, p.weight, QUACK_ROWS, "sum"):
        raise CannotCompute("quack's pipeline takes bfloat16 on compute capability 9.0")

    def score(hidden: Tensor) -> Tensor:
        if hidden.requires_grad:
            return _QuackTokens.apply(hidden, p.weight, p.labels)
        # Its path without gradients, which writes no logits.
        return -module._scaled_exp_lce_loss_only(hidden, p.weight, p.labels, -100)

    return compute_sigmoid_loss(p, score)


PEERS: dict[str, Callable[[Problem], Tensor]] = {
    "eager": compute_eager,
    "trl chunked": compute_trl,
    "Liger fused DPO": compute_liger,
    "cut-cross-entropy": compute_cce,
    "quack": compute_quack,
}


# --- truth and floor ------------------------------------------------------------------------------


class Truth(NamedTuple):
    """Loss and gradients in float64."""

    loss: Tensor  # []
    hidden_grad: Tensor  # [T, D]
    weight_grad: Tensor | None  # [V, D], None for a frozen head


def compute_truth(p: Problem, rows: int = 64) -> Truth:
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
        loss = compute_sigmoid_loss(p, lambda hidden: values if hidden is p.hidden else ref)
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


def compute_errors(
    truth: Truth, loss: Tensor, hidden_grad: Tensor | None = None, weight_grad: Tensor | None = None
) -> dict[str, float]:
    """{"loss", "gradient", "dW"}: relative errors in the Euclidean norm, of the gradients given."""
    errors = {"loss": abs(float(loss.double() / truth.loss) - 1)}
    for name, grad, want in (
        ("gradient", hidden_grad, truth.hidden_grad),
        ("dW", weight_grad, truth.weight_grad),
    ):
        if grad is not None and want is not None:
            errors[name] = float((grad.double() - want).norm() / want.norm())
    return errors


@functools.lru_cache(maxsize=1)
def allocate_outputs(
    shape: Shape, device: str, trained: bool, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of bare products: logits [rows, V], P W [T, D], P^T H [V, D] (empty unless
    `trained`)."""
    T, D, V = shape
    weight = make_tensors(*shape, device)[2]
    return (
        weight.new_empty(rows, V),
        weight.new_empty(T, D),
        weight.new_empty(V if trained else 0, D),
    )


def build_floor(shape: Shape, case: str, device: str, rows: int) -> Callable[[], None]:
    """A case's matrix products as bare `torch.mm` in chunks of `rows` tokens into preallocated
    outputs: H W^T of reference and policy, P W for the backward, P^T H for a trained head."""
    trained, _, backward = CASES[case]
    hidden, ref_hidden, weight, _ = make_tensors(*shape, device)
    logits, out, grad = allocate_outputs(shape, device, trained, rows)

    def run() -> None:
        for start in range(0, shape[0], rows):
            part = slice(start, start + rows)
            z = logits[: len(hidden[part])]
            torch.mm(ref_hidden[part], weight.t(), out=z)
            torch.mm(hidden[part], weight.t(), out=z)
            if backward:
                torch.mm(z, weight, out=out[part])
            if trained:
                torch.mm(z.t(), hidden[part], out=grad)

    return run

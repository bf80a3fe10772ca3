"""The native loss op in tests: scores with gradients, matrix products, operator checks."""

from __future__ import annotations

from dataclasses import astuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cpo_fast.loss import cpo_loss, linear_logprobs
from cpo_fast.loss.operators import Plan


def score(
    leaves: tuple[Tensor, ...],  # hidden, weight, perhaps bias
    labels: Tensor,
    coef: Tensor,
    dtype: torch.dtype,
    impl: str,
    **options: float,
) -> list[Tensor]:
    """Log-probs and the gradients of all leaves, as float64."""
    inputs = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    bias = inputs[2] if len(inputs) > 2 else None
    logps = linear_logprobs(*inputs[:2], labels, bias=bias, impl=impl, **options)
    grads = torch.autograd.grad((logps * coef).sum(), inputs)
    return [x.detach().double() for x in (logps, *grads)]


def count_vendor_flops(
    tensors: tuple[Tensor, ...],  # hidden, weight, labels, segment_ids, pairs of 4 segments
    ref_hidden: Tensor | None,
    *,
    head: bool,
    grad: bool,
) -> float:
    """FLOPs of the vendor's matrix products in forward and backward of `cpo_loss`."""
    hidden, weight, *rest = tensors
    source = {"ref_logps": torch.zeros(4)} if ref_hidden is None else {"ref_hidden": ref_hidden}
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        hidden, weight = hidden.requires_grad_(grad), weight.requires_grad_(head)
        out = cpo_loss(hidden, weight, *rest, impl="cpu", **source)
        if grad or head:
            out.loss.backward()
    products = (event for event in profiler.key_averages() if event.key == "aten::mm")
    return sum(event.flops for event in products)


def check_operators(
    args: tuple[Tensor, ...],  # hidden, weight, labels, bias, ref_hidden
    coef: Tensor,
    *,
    head: bool,
    engine: str,
    slots: int,
) -> None:
    """torch.library.opcheck of both operators."""
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    plan = astuple(Plan(5.0, 1.0, -100, True, head, head, 2**20, engine, slots))
    op = torch.ops.cpo_fast.cpu_logps.default
    torch.library.opcheck(op, args + plan, test_utils=tests)
    stats, residual = op(*(x.detach() for x in args), *plan)[3:]
    leaves = tuple(x.detach() for x in args[:4])
    torch.library.opcheck(
        torch.ops.cpo_fast.cpu_head_grads.default,
        (coef, *leaves, stats, residual, True, head, *plan),
        test_utils=tests,
    )

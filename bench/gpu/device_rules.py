"""GPU rules: synchronisation, memory, streams, CUDA graphs, other devices, 64-bit offsets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu.timing import capture_graph
from bench.gpu.units import NotHere
from bench.gpu.variants import force_variant
from bench.gpu.workspace import limit_workspace
from cpo_fast.loss import linear_logprobs
from cpo_fast.testing.loss_problems import LossProblem

DTYPE = torch.bfloat16


def build_step(data: LossProblem, impl: str, ref: Tensor) -> Callable[[], list[Tensor]]:
    leaves = data.leaves(head=False)

    def step() -> list[Tensor]:
        out = data.loss(*leaves, ref, impl)
        return [out.loss.detach(), out.logps.detach(), *torch.autograd.grad(out.loss, leaves[:1])]

    return step


def check_synchronisation_and_memory(variant: str, device: str) -> dict[str, Any]:
    """Forward and backward do not synchronise, and use at most the workspace limit plus 4 T x D
    float32 numbers."""
    T, V, D, mib = 4096, 50257, 1024, 128
    data = LossProblem("random", T, V, D, DTYPE, device)
    with force_variant(variant) as impl, limit_workspace(mib):
        step = build_step(data, impl, data.tensors[0].roll(1, 0))
        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    extra = torch.cuda.max_memory_allocated() - before
    partials = 8 * T * -(-V // 128)  # partial sums of kernels that write no logits
    allowed = (mib << 20) + partials + 4 * T * D * 4
    assert extra <= allowed, f"{extra / 2**20:.0f} MiB, allowed {allowed / 2**20:.0f}"
    return {"extra_mib": extra / 2**20}


def check_stream(variant: str, device: str) -> dict[str, Any]:
    """The kernels run on the current stream, after earlier work on it."""
    data = LossProblem("random", 500, 32000, 512, DTYPE, device)
    with force_variant(variant) as impl:
        leaves = data.leaves()
        want = linear_logprobs(*leaves, data.labels, impl=impl).detach()
        side = torch.cuda.Stream()
        late = torch.zeros_like(data.tensors[0])
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            late.copy_(data.tensors[0])
            got = linear_logprobs(late, data.tensors[1], data.labels, impl=impl)
        side.synchronize()
    assert torch.equal(got, want), "results differ on another stream"
    return {}


def check_graph(variant: str, device: str) -> dict[str, Any]:
    """A captured CUDA graph, replayed on new inputs at the same addresses, equals a fresh call."""
    data = LossProblem("random", 300, 32000, 512, DTYPE, device)
    ref = data.tensors[0].roll(1, 0)
    with force_variant(variant) as impl:
        step = build_step(data, impl, ref)
        graph, captured = capture_graph(step)
        ref.copy_(data.tensors[0].roll(7, 0))
        graph.replay()
        torch.cuda.synchronize()
        want = step()
    assert all(map(torch.equal, captured, want)), "a replayed graph gives different results"
    return {}


def check_other_device(variant: str, device: str) -> dict[str, Any]:
    """Inputs on a device that is not the current one; the current device does not change."""
    if torch.cuda.device_count() < 2:
        raise NotHere("the machine has one device")
    data, there = (
        LossProblem("random", 64, 1013, 24, DTYPE, "cuda:0"),
        LossProblem("random", 64, 1013, 24, DTYPE, "cuda:1"),
    )
    there.tensors = [x.to("cuda:1") for x in data.tensors]
    there.labels = data.labels.to("cuda:1")
    with force_variant(variant) as impl, torch.cuda.device(0):
        want = linear_logprobs(*data.leaves(), data.labels, impl=impl)
        got = linear_logprobs(*there.leaves(), there.labels, impl=impl)
        assert torch.cuda.current_device() == 0, "the current device changed"
    assert torch.equal(got.cpu(), want.cpu())
    return {}


def check_large_offsets(variant: str, device: str) -> dict[str, Any]:
    """T x V above 2^31 in one chunk: first, middle and last rows are correct."""
    T, V, D = 16384, 152064, 256  # 2.5e9 logits, 4.6 GiB
    data = LossProblem("random", T, V, D, DTYPE, device)
    sample = torch.tensor([0, 1, T // 2, T - 2, T - 1], device=device)
    data.labels[sample] = sample * 7
    with force_variant(variant) as impl, limit_workspace(8192):
        leaves = data.leaves(head=False)
        logps = linear_logprobs(*leaves, data.labels, impl=impl)
        (grad,) = torch.autograd.grad(logps.sum(), leaves[:1])
        hidden = leaves[0].detach()[sample].requires_grad_()
        alone = linear_logprobs(hidden.double(), leaves[1].double(), data.labels[sample])
        (want,) = torch.autograd.grad(alone.sum(), hidden)
    error = float((logps[sample].double() - alone).abs().max())
    assert error <= 0.1, f"log-prob error {error:.2e}"
    error = float((grad[sample].double() - want.double()).abs().max())
    assert error <= 0.02 * float(want.abs().max()), f"gradient error {error:.2e}"
    return {}


DEVICE_RULES: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "no waiting, little memory": check_synchronisation_and_memory,
    "a stream of its own": check_stream,
    "a captured graph": check_graph,
    "another device": check_other_device,
    "T x V past 2^31": check_large_offsets,
}

"""Rules for a GPU: synchronisation, memory, streams, graphs, other devices, 64-bit offsets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu.inputs import workspace
from bench.gpu.units import NotHere
from bench.gpu.variants import using
from cpo_fast.loss import linear_logprobs
from cpo_fast.testing.loss_problems import LossProblem

DTYPE = torch.bfloat16


def step_of(data: LossProblem, impl: str, ref: Tensor) -> Callable[[], list[Tensor]]:
    leaves = data.leaves(head=False)

    def step() -> list[Tensor]:
        out = data.loss(*leaves, ref, impl)
        return [out.loss.detach(), out.logps.detach(), *torch.autograd.grad(out.loss, leaves[:1])]

    return step


def no_waiting_little_memory(variant: str, device: str) -> dict[str, Any]:
    """Forward and backward without synchronisation, within the workspace limit plus 4 T x D
    float32 numbers."""
    T, V, D, mib = 4096, 50257, 1024, 128
    data = LossProblem("random", T, V, D, DTYPE, device)
    with using(variant) as impl, workspace(mib):
        step = step_of(data, impl, data.tensors[0].roll(1, 0))
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
    partials = 8 * T * -(-V // 128)  # of kernels that write no logits
    allowed = (mib << 20) + partials + 4 * T * D * 4
    assert extra <= allowed, f"{extra / 2**20:.0f} MiB, allowed {allowed / 2**20:.0f}"
    return {"extra_mib": extra / 2**20}


def streams(variant: str, device: str) -> dict[str, Any]:
    """On another stream, with earlier work that the kernels must wait for."""
    data = LossProblem("random", 500, 32000, 512, DTYPE, device)
    with using(variant) as impl:
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


def graphs(variant: str, device: str) -> dict[str, Any]:
    """Captured in a CUDA graph and replayed on new inputs at the same addresses."""
    data = LossProblem("random", 300, 32000, 512, DTYPE, device)
    ref = data.tensors[0].roll(1, 0)
    with using(variant) as impl:
        step = step_of(data, impl, ref)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        ref.copy_(data.tensors[0].roll(7, 0))
        graph.replay()
        torch.cuda.synchronize()
        want = step()
    assert all(map(torch.equal, captured, want)), "a replayed graph gives different results"
    return {}


def other_device(variant: str, device: str) -> dict[str, Any]:
    """On another device than the current one, which stays current."""
    if torch.cuda.device_count() < 2:
        raise NotHere("there is only one device")
    data, there = (
        LossProblem("random", 64, 1013, 24, DTYPE, "cuda:0"),
        LossProblem("random", 64, 1013, 24, DTYPE, "cuda:1"),
    )
    there.tensors = [x.to("cuda:1") for x in data.tensors]
    there.labels = data.labels.to("cuda:1")
    with using(variant) as impl, torch.cuda.device(0):
        want = linear_logprobs(*data.leaves(), data.labels, impl=impl)
        got = linear_logprobs(*there.leaves(), there.labels, impl=impl)
        assert torch.cuda.current_device() == 0, "the current device was changed"
    assert torch.equal(got.cpu(), want.cpu())
    return {}


def past_32_bits(variant: str, device: str) -> dict[str, Any]:
    """T x V beyond 2^31 in one chunk: first, middle and last rows are right."""
    T, V, D = 16384, 152064, 256  # 2.5e9 logits, 4.6 GiB
    data = LossProblem("random", T, V, D, DTYPE, device)
    sample = torch.tensor([0, 1, T // 2, T - 2, T - 1], device=device)
    data.labels[sample] = sample * 7
    with using(variant) as impl, workspace(8192):
        leaves = data.leaves(head=False)
        logps = linear_logprobs(*leaves, data.labels, impl=impl)
        (grad,) = torch.autograd.grad(logps.sum(), leaves[:1])
        hidden = leaves[0].detach()[sample].requires_grad_()
        alone = linear_logprobs(hidden.double(), leaves[1].double(), data.labels[sample])
        (want,) = torch.autograd.grad(alone.sum(), hidden)
    error = float((logps[sample].double() - alone).abs().max())
    assert error <= 0.1, f"log-probs err by {error:.2e}"
    error = float((grad[sample].double() - want.double()).abs().max())
    assert error <= 0.02 * float(want.abs().max()), f"gradients err by {error:.2e}"
    return {}


DEVICE_RULES: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "no waiting, little memory": no_waiting_little_memory,
    "a stream of its own": streams,
    "a captured graph": graphs,
    "another device": other_device,
    "T x V past 2^31": past_32_bits,
}

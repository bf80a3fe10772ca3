"""GPU tests of the Triton implementation: real sizes, memory, no synchronisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cpo_fast.loss import cpo_loss, linear_logprobs
from cpo_fast.testing.error_rule import assert_as_good
from tests.kernels.triton_cases import DEVICE, IGNORED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device"),
]


def head_of(T: int, V: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a standard deviation of about 5, as of a trained head."""
    torch.manual_seed(0)
    hidden = torch.randn(T, D, device=DEVICE).to(dtype)
    weight = (torch.randn(V, D, device=DEVICE) * 5 / D**0.5).to(dtype)
    labels = torch.randint(0, V, (T,), device=DEVICE)
    labels[::9] = IGNORED
    return hidden, weight, labels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [151_936, 50_257])
@pytest.mark.parametrize("mib", [1024, 64])
def test_real_sizes(dtype: torch.dtype, V: int, mib: int, monkeypatch: Any) -> None:
    monkeypatch.setenv("CPO_FAST_WORKSPACE_MIB", str(mib))
    inputs = head_of(512, V, 896, dtype)
    upstream = torch.randn(512, device=DEVICE)

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        hidden, weight = (x.to(dtype).requires_grad_() for x in inputs[:2])
        logps = linear_logprobs(hidden, weight, inputs[2], impl=impl)
        logps.backward(upstream.to(logps.dtype))
        assert hidden.grad is not None and weight.grad is not None
        return [logps.detach(), hidden.grad, weight.grad]

    ours, eager = run("triton", dtype), run("reference", dtype)
    for value, other, exact in zip(ours, eager, run("reference", torch.float64), strict=True):
        band = 2 * torch.finfo(dtype).eps * float(exact.abs().max())
        assert_as_good(value, other, exact, band)


@pytest.mark.parametrize("frozen", [True, False])
def test_memory_and_waiting(frozen: bool, monkeypatch: Any) -> None:
    monkeypatch.setenv("CPO_FAST_WORKSPACE_MIB", "128")
    T, V, D = 4096, 50_257, 1024
    hidden, weight, labels = head_of(T, V, D, torch.bfloat16)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    segments = torch.arange(T, device=DEVICE) % 8
    pairs = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]], device=DEVICE)
    reference = hidden.detach().clone()

    def step() -> Tensor:
        hidden.grad = weight.grad = None
        out = cpo_loss(
            hidden,
            weight,
            labels,
            segments,
            pairs,
            ref_hidden=reference,
            num_segments=8,
            impl="triton",
        )
        out.loss.backward()
        return out.loss.detach()

    step()  # compiles
    hidden.grad = weight.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(loss) == pytest.approx(0.6931471805599453, abs=1e-7)
    allowed = (128 << 20) + 4 * T * D * 4
    if not frozen:
        allowed += V * D * (4 + 2)  # dW, and the float32 sum that it is rounded from
    assert torch.cuda.max_memory_allocated() - before <= allowed


def test_same_bits_every_time() -> None:
    hidden, weight, labels = head_of(700, 32_000, 512, torch.bfloat16)
    hidden.requires_grad_()
    runs = []
    for _ in range(3):
        logps = linear_logprobs(hidden, weight, labels, impl="triton")
        runs.append((logps, *torch.autograd.grad(logps.sum(), [hidden])))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))

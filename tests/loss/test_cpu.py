"""The native CPU implementation: matrix products, memory, autograd, torch.compile, threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cpo_fast.loss import available_impls, cpo_loss, linear_logprobs
from cpo_fast.testing.error_rule import assert_as_good, norm_of_error

if "cpu" not in available_impls("cpu"):
    pytest.skip("cpo_fast._cpu is not built", allow_module_level=True)

from cpo_fast import _cpu
from cpo_fast.loss import cpu, cpu_rows
from tests.loss.native import check_operators, count_vendor_flops, score

T, D, V = 48, 16, 500


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(T, D, generator=g).to(dtype),
        torch.randn(V, D, generator=g).to(dtype),
        torch.randint(0, V, (T,), generator=g),
        torch.arange(T) // (T // 4),
        torch.tensor([[0, 1], [2, 3]]),
    )


def count_products(head: bool, grad: bool, reference: bool) -> float:
    """The number of T x V x D matrix products in forward and backward."""
    given = tensors()
    other = given[0] + 0.1 if reference else None
    return count_vendor_flops(given, other, head=head, grad=grad) / (2 * T * V * D)


@pytest.mark.parametrize(
    ("head", "grad", "reference", "count"),
    [
        (False, False, False, 1),
        (False, False, True, 2),
        (False, True, False, 2),
        (False, True, True, 3),
        (True, True, False, 3),
        (True, True, True, 4),
        (True, False, False, 2),
    ],
)
def test_matrix_products(head: bool, grad: bool, reference: bool, count: int) -> None:
    assert count_products(head, grad, reference) == pytest.approx(count)


def test_matrix_products_of_a_trained_head_beyond_the_workspace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "limit", lambda device: 40 * V * 4)
    assert count_products(True, True, False) == pytest.approx(4)


def test_workspace_bounds_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small workspaces give the same numbers by more and smaller matrix products."""
    hidden, weight, labels, *_ = tensors()
    coef = torch.randn(T)

    def run() -> list[Tensor]:
        return score((hidden, weight), labels, coef, torch.float32, "cpu")

    sizes: list[int] = []
    take = cpu_rows._Workspace.take

    def spy(self: cpu_rows._Workspace, *parts: int, dtype: torch.dtype) -> list[Tensor]:
        sizes.append(sum(parts) * dtype.itemsize)
        return take(self, *parts, dtype=dtype)

    whole = run()
    monkeypatch.setattr(cpu_rows._Workspace, "take", spy)
    for room in (4 * T * V, 4 * T * V - 1, 30000, 9000):
        monkeypatch.setattr(cpu, "limit", lambda device, room=room: room)
        sizes.clear()
        for a, b in zip(whole, run(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
        assert max(sizes) <= max(room, 64 * (64 + D) * 4)


@pytest.mark.parametrize("room", [1 << 28, 40 * V * 4], ids=["kept", "recomputed"])
@pytest.mark.parametrize("blocks_of_bfloat16", [True, False])
def test_blocks_of_either_dtype_follow_the_error_rule(
    blocks_of_bfloat16: bool, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are float32 where vendor GEMMs are slow in bfloat16, and at least as exact."""
    hidden, weight, labels, *_ = tensors(torch.bfloat16)
    bias, coef = torch.randn(V).bfloat16(), torch.randn(T)

    leaves = (hidden, weight, bias)
    exact = score(leaves, labels, coef, torch.float64, "reference")
    eager = score(leaves, labels, coef, torch.bfloat16, "reference")
    monkeypatch.setattr(cpu, "_BLOCKS_OF_BFLOAT16", blocks_of_bfloat16)
    monkeypatch.setattr(cpu, "limit", lambda device: room)
    with cpu_rows.forced_isa("portable"):
        ours = score(leaves, labels, coef, torch.bfloat16, "cpu")
    assert (ours[0] <= 0).all()
    if not blocks_of_bfloat16:
        assert (ours[0] - exact[0]).abs().max() < 1e-4
    for got, theirs, want in zip(ours, eager, exact, strict=True):
        band = 2**-8 * float(want.norm())
        assert_as_good(got, theirs, want, band, measure=norm_of_error)


@given(
    n=st.integers(1, 10_000),
    V=st.integers(1, 300_000),
    D=st.integers(1, 8192),
    converts=st.booleans(),
    room=st.integers(1 << 20, 1 << 30),
)
def test_blocks_fit_the_workspace(n: int, V: int, D: int, converts: bool, room: int) -> None:
    chunk, width = cpu._block_sizes(n, V, D, torch.float32, converts, room)
    size = 4 * (chunk * (width + D) + converts * width * D)
    assert 1 <= chunk <= n
    assert 1 <= width <= V
    assert size <= room or max(chunk, width) <= 64


@pytest.mark.parametrize(
    ("dtype", "trained"),
    [
        ("float32", False),
        ("bfloat16", True),
        pytest.param("float32", True, marks=pytest.mark.complete),
        pytest.param("bfloat16", False, marks=pytest.mark.complete),
    ],
)
def test_memory_does_not_grow_with_the_logits(dtype: str, trained: bool) -> None:
    """2048 x 40000 logits are 164 or 328 MB; the workspace here is 8 MiB."""
    code = f"""
import torch
from pathlib import Path
from cpo_fast.loss import linear_logprobs

def kib(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

T, V, D, trained = 2048, 40000, 32, {trained}
hidden = torch.randn(T, D).to(torch.{dtype}).requires_grad_()
weight = torch.randn(V, D).to(torch.{dtype}).requires_grad_(trained)
labels = torch.randint(0, V, (T,))
linear_logprobs(hidden[:8], weight[:512].detach(), labels[:8] % 512, impl="cpu").sum().backward()
Path("/proc/self/clear_refs").write_text("5")
before = kib("VmRSS")
linear_logprobs(hidden, weight, labels, impl="cpu").sum().backward()
allowed = 8 * 2**20 + 4 * T * D * 4 + trained * V * D * 4 + 24 * 2**20  # and vendor buffers
grown = (kib("VmHWM") - before) * 1024
assert grown < allowed, (grown, allowed)
"""
    env = os.environ | {"CPO_FAST_WORKSPACE_MIB": "8", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


@pytest.mark.parametrize("text", ["0", "-3", "lots"])
def test_workspace_setting_is_checked(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CPO_FAST_WORKSPACE_MIB", text)
    hidden, weight, labels, *_ = tensors()
    with pytest.raises(ValueError, match="CPO_FAST_WORKSPACE_MIB"):
        linear_logprobs(hidden, weight, labels, impl="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_backward_is_equal(dtype: torch.dtype) -> None:
    hidden, weight, labels, *_ = tensors(dtype)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    total = linear_logprobs(*leaves, labels, impl="cpu").sum()
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    second = torch.autograd.grad(total, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives_are_refused() -> None:
    hidden, weight, labels, *_ = tensors()
    logps = linear_logprobs(hidden.requires_grad_(), weight, labels, impl="cpu")
    (grad,) = torch.autograd.grad(logps.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives"):
        grad.sum().backward()


def test_second_derivatives_of_the_head_are_refused() -> None:
    hidden, weight, labels, *_ = tensors()
    logps = linear_logprobs(hidden, weight.requires_grad_(), labels, impl="cpu")
    (grad,) = torch.autograd.grad(logps.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives"):
        grad.sum().backward()


def test_checkpointing_is_exact() -> None:
    hidden, weight, labels, *_ = tensors()
    hidden.requires_grad_()

    def run(h: Tensor) -> Tensor:
        return linear_logprobs(h.tanh(), weight, labels, impl="cpu").sum()

    (plain,) = torch.autograd.grad(run(hidden), hidden)
    (again,) = torch.autograd.grad(checkpoint(run, hidden, use_reentrant=False), hidden)
    assert torch.equal(plain, again)


def test_autocast_is_respected() -> None:
    hidden, weight, labels, *_ = tensors()
    hidden.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_logprobs(hidden, weight, labels, impl="cpu")
    want = linear_logprobs(hidden.bfloat16(), weight.bfloat16(), labels, impl="cpu")
    assert torch.equal(got, want)
    (grad,) = torch.autograd.grad(got.sum(), hidden)
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, head: bool) -> None:
    hidden, weight, labels, *_ = tensors(dtype)
    bias = torch.randn(V).to(dtype).requires_grad_(head)
    args = (hidden.requires_grad_(), weight.requires_grad_(head), labels, bias, hidden.detach())
    check_operators(args, torch.randn(T), head=head, engine="", slots=1)


def test_compiled_step_equals_eager() -> None:
    hidden, weight, labels, segments, pairs = tensors()
    projection = torch.randn(D, D, requires_grad=True)

    def step(x: Tensor) -> Tensor:
        h = (x @ projection).tanh()
        return cpo_loss(
            h, weight, labels, segments, pairs, ref_hidden=x, num_segments=4, impl="cpu"
        ).loss

    (want,) = torch.autograd.grad(step(hidden), projection)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    loss = compiled(hidden)
    (got,) = torch.autograd.grad(loss, projection)
    torch.testing.assert_close(loss, step(hidden))
    torch.testing.assert_close(got, want)


def test_compiled_step_of_any_size() -> None:
    """Sizes and options that vary between calls are traced as symbols."""
    hidden, weight, labels, segments, pairs = tensors()

    def step(x: Tensor, y: Tensor, ids: Tensor, beta: float) -> Tensor:
        return cpo_loss(
            x, weight, y, ids, pairs, ref_hidden=x * 0.9, num_segments=4, beta=beta, impl="cpu"
        ).loss

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for n, beta in ((T, 0.1), (T - 5, 0.3)):
        x = hidden[:n].clone().requires_grad_()
        got, want = (run(x, labels[:n], segments[:n], beta) for run in (compiled, step))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (got, want)))


def test_threads_change_no_bits_and_denormals_stay_enabled() -> None:
    """Results do not depend on the thread count; the denormal mode is restored."""
    hidden, weight, labels, *_ = tensors(torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(linear_logprobs(hidden, weight, labels, impl="cpu"))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    tiny = torch.tensor([1e-40])
    assert (tiny * 0.5).item() > 0


def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="sse9"):
        _cpu.isa("sse9")


def test_noncontiguous_hidden_and_strided_labels() -> None:
    hidden, weight, labels, *_ = tensors()
    wide = torch.stack([hidden, hidden], 1)[:, 0]
    pairs = torch.stack([labels, labels], 1)[:, 1]
    got = linear_logprobs(wide, weight, pairs, impl="cpu")
    assert torch.equal(got, linear_logprobs(hidden, weight, labels, impl="cpu"))


def test_pair_over_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_TOKENS", 16)
    monkeypatch.setattr(cpu, "_ENTRIES", 128)
    hidden, weight, labels, segments, _ = tensors()
    pairs = torch.tensor([[0, 3]])
    segments = torch.where(segments == 1, 0, segments)
    got = cpo_loss(hidden, weight, labels, segments, pairs, ref_hidden=hidden * 0.9, impl="cpu")
    want = cpo_loss(
        hidden.double(),
        weight.double(),
        labels,
        segments,
        pairs,
        ref_hidden=(hidden * 0.9).double(),
    )
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.complete
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_more_than_2_31_logits(dtype: torch.dtype) -> None:
    """The logits of the last tokens have offsets beyond 32 bits."""
    tokens, vocabulary = 20_000, 107_400
    g = torch.Generator().manual_seed(8)
    hidden = torch.randn(tokens, 2, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 2, generator=g).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,), generator=g)
    logps = linear_logprobs(hidden, weight, labels, impl="cpu")
    (grad,) = torch.autograd.grad(logps[-64:].sum(), hidden)
    assert tokens * vocabulary > 2**31 and (grad[:-64] == 0).all()
    last = hidden.detach()[-64:].double().requires_grad_()
    want = linear_logprobs(last, weight.double(), labels[-64:])
    (want_grad,) = torch.autograd.grad(want.sum(), last)
    torch.testing.assert_close(logps[-64:].double(), want, rtol=3e-3, atol=1e-3)
    torch.testing.assert_close(grad[-64:].double(), want_grad, rtol=2e-2, atol=2e-2)


def test_inputs_are_not_modified() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        inputs = tensors(dtype)
        before = [x.clone() for x in inputs]
        leaves = [x.requires_grad_() for x in inputs[:2]]
        out = cpo_loss(*leaves, *inputs[2:], ref_hidden=inputs[0].detach(), impl="cpu")
        out.loss.backward()
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))

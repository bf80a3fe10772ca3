"""The Triton implementation as a whole: on a GPU where there is one, else in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpo_fast.testing.error_rule import assert_as_good
from tests.kernels.triton_cases import (
    DEVICE,
    FLOATS,
    IGNORED,
    OPTIONS,
    head_of,
    skip_unless_runnable,
    standing_in_for_a_gpu,
)

skip_unless_runnable()

from cpo_fast.loss import cpo_loss, linear_logprobs  # noqa: E402
from cpo_fast.loss import triton as implementation  # noqa: E402
from cpo_fast.loss.operators import Plan  # noqa: E402
from cpo_fast.loss.options import LossOptions  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning",  # numpy on log(0)
    "ignore:Conversion of an array",  # Triton 3.6 on numpy
)


@pytest.fixture(autouse=True)
def on_the_device() -> Iterator[None]:
    with torch.device(DEVICE), standing_in_for_a_gpu():
        yield


def run(
    impl: str,
    dtype: torch.dtype,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    upstream: Tensor,
    **options: Any,
) -> list[Tensor]:
    """Log-probs and the gradients of hidden, weight (and bias) for the same upstream."""
    hidden, weight, labels, bias = inputs
    leaves = [x.to(dtype).clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logps = linear_logprobs(
        leaves[0],
        leaves[1],
        labels,
        bias=leaves[2] if bias is not None else None,
        impl=impl,
        **options,
    )
    logps.backward(upstream.to(logps.dtype))
    grads = [leaf.grad for leaf in leaves]
    assert all(grad is not None for grad in grads)
    return [logps.detach(), *grads]  # type: ignore[list-item]


def assert_errors_are_those_of_eager(
    dtype: torch.dtype, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], **options: Any
) -> None:
    upstream = torch.randn(inputs[0].shape[0])
    truth = run("reference", torch.float64, inputs, upstream, **options)
    eager = run("reference", dtype, inputs, upstream, **options)
    ours = run("triton", dtype, inputs, upstream, **options)
    for value, other, exact in zip(ours, eager, truth, strict=True):
        band = 4 * torch.finfo(dtype).eps * float(exact.abs().max())
        assert value.dtype == other.dtype
        assert_as_good(value, other, exact, band)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((1, 7, 8), "plain"),
        ((9, 301, 40), "all"),
        pytest.param((40, 5003, 24), "temperature", marks=pytest.mark.complete),
    ],
)
def test_implementation(
    dtype: torch.dtype, shape: tuple[int, int, int], name: str, monkeypatch: Any
) -> None:
    monkeypatch.setenv("CPO_FAST_WORKSPACE_MIB", "1")
    h, w, labels = head_of(*shape, dtype)
    options = dict(OPTIONS[name])
    bias = torch.randn(2 * shape[1]).to(dtype)[::2] if options.pop("bias", False) else None
    assert_errors_are_those_of_eager(dtype, (h, w, labels, bias), **options)


@pytest.mark.complete
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 200), st.integers(1, 40)),
    dtype=st.sampled_from(FLOATS),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 3.0, 30.0]),
    temperature=st.sampled_from([1.0, 0.5, 2.0]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_shape_and_option(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    bias: bool,
    softcap: float | None,
    temperature: float,
    seed: int,
) -> None:
    with torch.random.fork_rng(), torch.device(DEVICE):
        torch.manual_seed(seed)
        shift = torch.randn(shape[1]).to(dtype) if bias else None
        assert_errors_are_those_of_eager(
            dtype, (*head_of(*shape, dtype), shift), softcap=softcap, temperature=temperature
        )


VOCABULARY = 2_003
ROOM = 13 * 4 * 2_016  # bytes: 13 rows of float32 logits, padded


@pytest.mark.parametrize("T", [14, 40])
def test_chunks_give_the_gradients_of_one_chunk(T: int, monkeypatch: Any) -> None:
    # The slopes of 2 chunks are kept for dW, in the room that its float32 sum would take; those of
    # 4 chunks are computed again in the backward.
    h, w, labels = head_of(T, VOCABULARY, 16, torch.float32)
    bias, upstream = torch.randn(VOCABULARY), torch.randn(T)
    whole = run("triton", torch.float32, (h, w, labels, bias), upstream)
    monkeypatch.setattr(implementation, "limit", lambda device: ROOM)
    parts = run("triton", torch.float32, (h, w, labels, bias), upstream)
    for value, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def batch(T: int, V: int, D: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    h, w, labels = head_of(T, V, D, dtype)
    return h, w, labels, torch.arange(T) % 4, torch.tensor([[0, 1], [2, 3], [0, 3]])


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_equal_policy_and_reference_give_exactly_log_2(frozen: bool, grad: bool) -> None:
    h, w, labels, segments, pairs = batch(23, 151, 48, torch.float16)
    h.requires_grad_(grad)
    w.requires_grad_(grad and not frozen)
    out = cpo_loss(h, w, labels, segments, pairs, ref_hidden=h, impl="triton")
    assert float(out.loss.detach()) == pytest.approx(0.6931471805599453, abs=1e-7)
    assert torch.equal(out.chosen_rewards, torch.zeros(3))
    assert torch.equal(out.rejected_rewards, torch.zeros(3))
    assert torch.equal(out.logps.detach(), out.ref_logps)
    assert out.loss.requires_grad is grad


def test_no_scored_token() -> None:
    h, w, labels, segments, pairs = batch(6, 20, 8, torch.float32)
    labels[:] = IGNORED
    h.requires_grad_()
    w.requires_grad_()
    out = cpo_loss(h, w, labels, segments, pairs, ref_hidden=h.detach() * 2, impl="triton")
    out.loss.backward()
    assert out.loss == 0 and h.grad is not None and w.grad is not None
    assert (h.grad == 0).all() and (w.grad == 0).all()


def test_no_row_at_all() -> None:
    h = torch.randn(0, 8, requires_grad=True)
    w = torch.randn(20, 8, requires_grad=True)
    linear_logprobs(h, w, torch.empty(0, dtype=torch.long), impl="triton").sum().backward()
    assert h.grad is not None and h.grad.shape == (0, 8)
    assert w.grad is not None and (w.grad == 0).all()


@pytest.mark.parametrize("frozen", [True, False])
def test_backward_twice_gives_the_same(frozen: bool) -> None:
    h, w, labels = head_of(9, 40, 16, torch.float32)
    h.requires_grad_()
    w.requires_grad_(not frozen)
    total = linear_logprobs(h, w, labels, impl="triton").sum()  # an expanded upstream gradient
    leaves = [h] if frozen else [h, w]
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    second = torch.autograd.grad(total, leaves)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("T", "hidden_grad", "weight_grad", "bias_grad", "room", "forward", "backward"),
    [
        (14, False, False, False, 2**30, 3, 0),  # no gradients: a GEMM for each model
        (14, True, False, False, 2**30, 3, 0),  # frozen head: 2, and 1 for the reference
        (14, True, True, False, 2**30, 3, 1),  # all rows in one chunk: 3 + 1
        (14, True, True, False, ROOM, 6, 1),  # two chunks, kept: their room is that of dW's sum
        (40, True, True, False, ROOM, 12, 8),  # four chunks, recomputed: 4 + 1
        (14, True, False, True, 2**30, 3, 1),  # a bias alone: no dW, one narrow product
    ],
)
def test_gemms_are_counted(
    T: int,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    room: int,
    forward: int,
    backward: int,
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr(implementation, "limit", lambda device: room)
    calls: list[str] = []

    def counting(name: str) -> None:
        original = getattr(torch, name)

        def call(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(torch, name, call)

    counting("mm")
    counting("addmm")
    V = VOCABULARY if hidden_grad else 300
    h, w, labels = head_of(T, V, 8, torch.float32)
    bias = torch.randn(V, requires_grad=True) if bias_grad else None
    h.requires_grad_(hidden_grad)
    w.requires_grad_(weight_grad)
    if hidden_grad:
        logps, _ = implementation.token_logps(h, w, labels, bias, h.detach(), LossOptions())
    else:  # alone, as when a reference is cached; then policy and reference together
        for ref in (None, h):
            logps, _ = implementation.token_logps(h, w, labels, bias, ref, LossOptions())
    assert len(calls) == forward
    if hidden_grad:
        calls.clear()
        logps.sum().backward()
        assert len(calls) == backward


@pytest.mark.parametrize("grad", [True, False])
def test_a_misaligned_reference_takes_the_policys_gemm(grad: bool, monkeypatch: Any) -> None:
    h, w, labels = head_of(6, 50, 8, torch.float16)
    shifted = torch.empty(h.numel() + 1, dtype=h.dtype)[1:].view(h.shape).copy_(h)
    assert shifted.data_ptr() % 16 != 0
    multiply, places = torch.mm, []

    def watched(left: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        places.append(left.data_ptr() % 16)
        return multiply(left, *args, **kwargs)

    monkeypatch.setattr(torch, "mm", watched)
    for policy, ref in ((h, shifted), (shifted, h)):
        policy = policy.detach().requires_grad_(grad)
        logps, ref_logps = implementation.token_logps(policy, w, labels, None, ref, LossOptions())
        assert torch.equal(logps.detach(), ref_logps)
    assert places and not any(places)


def test_opcheck() -> None:
    h, w, labels = head_of(5, 20, 8, torch.float32)
    bias = torch.randn(20)
    for ref, hidden_grad, head_grad in (
        (None, True, False),
        (h, True, True),
        (h, False, False),
    ):
        plan = Plan(None, 1.0, IGNORED, hidden_grad, head_grad, head_grad, 1 << 20, "", 1)
        args = (
            h.clone().requires_grad_(hidden_grad),
            w.clone().requires_grad_(head_grad),
            labels,
            bias.clone().requires_grad_(head_grad),
            ref,
            *astuple(plan),
        )
        torch.library.opcheck(torch.ops.cpo_fast.triton_logps.default, args)
    torch.library.opcheck(torch.ops.cpo_fast.triton_row_scale.default, (h, torch.randn(5)))
    torch.library.opcheck(
        torch.ops.cpo_fast.triton_head_grads.default,
        (torch.randn(5), h, w, labels, bias, h.new_empty(0, 64), True, True, *astuple(plan)),
    )


@pytest.mark.complete
def test_compiled_step_and_checkpointing_give_the_same_numbers() -> None:
    h, w, labels, segments, pairs = batch(13, 60, 16, torch.float32)
    ref = torch.randn_like(h)

    def step(h: Tensor, w: Tensor) -> Tensor:
        return cpo_loss(
            h.tanh(), w, labels, segments, pairs, ref_hidden=ref, num_segments=4, impl="triton"
        ).loss

    def gradients(function: Any) -> list[Tensor]:
        leaves = [h.clone().requires_grad_(), w.clone().requires_grad_()]
        loss = function(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def same(values: list[Tensor], expected: list[Tensor]) -> None:
        for value, exact in zip(values, expected, strict=True):
            torch.testing.assert_close(value, exact, rtol=1e-6, atol=1e-7)

    expected = gradients(step)
    same(gradients(torch.compile(step, backend="aot_eager", fullgraph=True)), expected)
    same(
        gradients(lambda *x: torch.utils.checkpoint.checkpoint(step, *x, use_reentrant=False)),
        expected,
    )


def test_autocast_decides_the_precision() -> None:
    h, w, labels = head_of(5, 40, 16, torch.float32)
    h.requires_grad_()
    w.requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.float16):
        logps = linear_logprobs(h, w, labels, impl="triton")
        logps.sum().backward()
    assert h.grad is not None and h.grad.dtype == torch.float32
    expected = linear_logprobs(h.half(), w.half(), labels, impl="triton")
    assert torch.equal(logps, expected)


def test_global_settings_are_left_as_they_were() -> None:
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    h, w, labels = head_of(3, 20, 8, torch.float32)
    linear_logprobs(h.requires_grad_(), w, labels, impl="triton")
    assert settings.allow_bf16_reduced_precision_reduction is before

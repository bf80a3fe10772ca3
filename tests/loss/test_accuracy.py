"""The error rule for every available implementation. The truth is `LossProblem.score_eagerly` in
float64; the rule allows twice its error in the tested precision, plus rounding."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpo_fast.loss import available_impls, cpo_loss, linear_logprobs
from cpo_fast.loss.options import LOSS_TYPES
from cpo_fast.testing.error_rule import assert_all_as_good, norm_of_error
from cpo_fast.testing.loss_problems import LossProblem

IMPLS = [impl for impl in available_impls("cpu") if impl != "triton"]
if "cpu" in IMPLS:
    from cpo_fast import _cpu
    from cpo_fast.loss import cpu_rows

    for isa in ("portable", "avx2", "avx512"):
        with contextlib.suppress(ValueError):
            IMPLS.append(f"cpu:{_cpu.isa(isa)}")
    # "cpu" itself uses the first, fastest engine of the fused kernel.
    IMPLS += [f"cpu:{engine}" for engine in cpu_rows.ENGINES if _cpu.fused_available(engine)][1:]


@contextlib.contextmanager
def use_variant(variant: str) -> Iterator[str]:
    """The `impl=` name of a variant. "cpu:<isa>" forces an instruction set around vendor GEMMs, or
    an engine of the fused kernel."""
    impl, _, isa = variant.partition(":")
    if not isa:
        yield impl
        return
    with cpu_rows.forced_isa(isa):
        yield impl


def make_problem(
    kind: str, T: int, D: int, V: int, dtype: torch.dtype, *, bias: bool = False, seed: int = 0
) -> LossProblem:
    return LossProblem(kind, T, V, D, dtype, "cpu", bias=bias, seed=seed, scale=D**0.5)


def assert_as_good_as_eager(data: LossProblem, variant: str, **options: Any) -> None:
    dtype = data.tensors[0].dtype
    with use_variant(variant) as impl:
        ours = data.score(dtype, impl, **options)
    assert (ours["logps"] <= 0).all()
    exact, eager = (data.score_eagerly(one, **options) for one in (torch.float64, dtype))
    assert_all_as_good(ours, eager, exact, torch.finfo(dtype).eps)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("variant", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "flat", "peaked", "negative"])
def test_errors_follow_the_rule(variant: str, dtype: torch.dtype, kind: str) -> None:
    assert_as_good_as_eager(make_problem(kind, 37, 24, 1013, dtype), variant)


@pytest.mark.parametrize("variant", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{"softcap": 6.0}, {"temperature": 0.6}, {"softcap": 9.0, "temperature": 1.7}],
    ids=str,
)
def test_bias_softcap_temperature_follow_the_rule(
    variant: str, dtype: torch.dtype, options: dict[str, float]
) -> None:
    assert_as_good_as_eager(
        make_problem("random", 19, 16, 517, dtype, bias=True), variant, **options
    )


@pytest.mark.parametrize("variant", IMPLS)
@pytest.mark.parametrize(
    ("T", "V", "D"), [(1, 1, 1), (1, 77, 8), (5, 1, 3), (33, 129, 7), (3, 2, 64)]
)
def test_odd_sizes_follow_the_rule(variant: str, T: int, V: int, D: int) -> None:
    for dtype in DTYPES:
        assert_as_good_as_eager(make_problem("random", T, D, V, dtype, seed=T), variant)


@pytest.mark.parametrize("variant", IMPLS)
@given(
    T=st.integers(1, 70),
    D=st.integers(1, 40),
    V=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["random", "flat", "peaked", "negative"]),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 3.0, 30.0]),
    temperature=st.sampled_from([1.0, 0.5, 2.0]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_shape_and_option_follow_the_rule(
    variant: str,
    T: int,
    D: int,
    V: int,
    dtype: torch.dtype,
    kind: str,
    bias: bool,
    softcap: float | None,
    temperature: float,
    seed: int,
) -> None:
    data = make_problem(kind, T, D, V, dtype, bias=bias, seed=seed)
    assert_as_good_as_eager(data, variant, softcap=softcap, temperature=temperature)


@pytest.mark.parametrize("variant", IMPLS[1:])
@pytest.mark.parametrize("kind", ["random", "peaked", "negative"])
def test_average_error_of_a_soft_cap_is_that_of_eager(variant: str, kind: str) -> None:
    """Errors of one small problem vary, so the errors of 40 are compared."""
    ours, theirs = 0.0, 0.0
    for seed in range(40):
        data = make_problem(kind, 12, 4, 40, torch.float32, seed=seed)
        exact = data.score_eagerly(torch.float64, softcap=30.0)
        eager = data.score_eagerly(torch.float32, softcap=30.0)
        with use_variant(variant) as impl:
            got = data.score(torch.float32, impl, softcap=30.0)
        for name, truth in exact.items():
            ours += norm_of_error(got[name], truth) / float(truth.norm())
            theirs += norm_of_error(eager[name], truth) / float(truth.norm())
    assert ours <= 1.3 * theirs, (ours, theirs)


@pytest.mark.parametrize("variant", IMPLS[1:])
def test_gradient_of_a_saturated_soft_cap_is_exact(variant: str) -> None:
    """1 - tanh^2 cancels for tanh near 1: the gradient of eager has an error of 5e-4."""
    data = make_problem("negative", 9, 3, 21, torch.float32)
    data.tensors[0] *= 20
    exact = data.score_eagerly(torch.float64, softcap=10.0)
    with use_variant(variant) as impl:
        ours = data.score(torch.float32, impl, softcap=10.0)
    for name in ("hidden", "weight"):
        assert exact[name].norm() > 0
        assert norm_of_error(ours[name], exact[name]) < 1e-6 * float(exact[name].norm())


@pytest.mark.parametrize("variant", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("trained_head", [False, True])
def test_log_two_when_policy_is_reference(
    variant: str, dtype: torch.dtype, own_head: bool, trained_head: bool
) -> None:
    data = make_problem("random", 70, 48, 1500, dtype)
    (hidden, weight), labels = data.tensors, data.labels
    segments = torch.arange(70) % 4
    pairs = torch.tensor([[0, 1], [2, 3], [0, 3]])
    with use_variant(variant) as impl:
        out = cpo_loss(
            hidden.clone().requires_grad_(),
            weight.clone().requires_grad_(trained_head),
            labels,
            segments,
            pairs,
            ref_hidden=hidden,
            ref_weight=weight.clone() if own_head else None,
            impl=impl,
        )
    assert out.loss.item() == torch.tensor(math.log(2)).item()
    assert (out.chosen_rewards == 0).all() and (out.rejected_rewards == 0).all()
    assert torch.equal(out.logps, out.ref_logps)


@pytest.mark.parametrize("variant", IMPLS[1:])
@pytest.mark.parametrize("rejected", [1, 2, 7])
@pytest.mark.parametrize("loss_type", list(LOSS_TYPES))
def test_losses_equal_the_reference_in_float64(variant: str, rejected: int, loss_type: str) -> None:
    """float32 against float64: loss, losses, log-probs and the gradient through all of them."""
    data = make_problem("random", 90, 20, 333, torch.float32, seed=rejected)
    (hidden, weight), labels = data.tensors, data.labels
    segments = torch.randint(-1, rejected + 1, (90,), generator=torch.Generator().manual_seed(2))
    pairs = torch.tensor([[0, k + 1] for k in range(rejected)])
    smoothing = {"robust": 0.1, "exo_pair": 0.05}.get(loss_type, 0.0)

    def run(dtype: torch.dtype, impl: str) -> list[Tensor]:
        leaf = hidden.to(dtype).requires_grad_()
        options = {"label_smoothing": smoothing, "loss_type": loss_type, "impl": impl}
        if LOSS_TYPES[loss_type].reference:
            options["ref_hidden"] = (hidden.roll(1, 0) * 0.3 + hidden).to(dtype)
        out = cpo_loss(leaf, weight.to(dtype), labels, segments, pairs, beta=0.05, **options)
        total = out.loss + out.losses.square().sum() + out.logps.mean()
        return [*out[:6], torch.autograd.grad(total, leaf)[0]]

    with use_variant(variant) as impl:
        for got, want in zip(
            run(torch.float32, impl), run(torch.float64, "reference"), strict=True
        ):
            scale = want.abs().max().item()
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5 * scale + 1e-6)


@pytest.mark.parametrize("variant", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_labels_have_no_score_and_no_gradient(variant: str, dtype: torch.dtype) -> None:
    data = make_problem("random", 6, 8, 50, dtype)
    (leaf, head), labels = data.leaves(), data.labels
    with use_variant(variant) as impl:
        logps = linear_logprobs(leaf, head, torch.full_like(labels, -100), impl=impl)
        assert (logps == 0).all()
        grads = torch.autograd.grad(logps.sum(), (leaf, head))
        assert all((grad == 0).all() for grad in grads)
        empty = linear_logprobs(leaf[:0], head, labels[:0], impl=impl)
        assert empty.shape == (0,)


@pytest.mark.parametrize("variant", IMPLS)
def test_saturated_logps_are_negative_with_a_gradient(variant: str) -> None:
    """bf16 logits of near-certain tokens: a tiny negative log-prob with a nonzero gradient."""
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(1000, 64, generator=g).bfloat16()
    labels = torch.arange(64)
    hidden = (weight[:64].float() * torch.linspace(0.1, 0.6, 64).unsqueeze(1)).bfloat16()
    leaf = hidden.requires_grad_()
    with use_variant(variant) as impl:
        logps = linear_logprobs(leaf, weight, labels, impl=impl)
    assert (logps <= 0).all()
    if variant != "reference":  # its log_softmax rounds 1 - p to 0
        assert (logps < 0).all()
        (grad,) = torch.autograd.grad(logps.sum(), leaf)
        assert (grad.abs().amax(1) > 0).all()
    data = make_problem("random", 64, 64, 1000, torch.bfloat16)
    data.tensors, data.labels = [hidden.detach(), weight], labels
    assert_as_good_as_eager(data, variant)


@pytest.mark.parametrize("variant", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_logits_are_ignored_and_nan_propagates(variant: str, dtype: torch.dtype) -> None:
    data = make_problem("random", 5, 8, 40, dtype, bias=True)
    (hidden, weight, bias), labels = data.tensors, data.labels
    labels[:] = torch.arange(5)
    masked = bias.clone()
    masked[20:] = -torch.inf  # impossible tokens
    with use_variant(variant) as impl:
        got = linear_logprobs(hidden, weight, labels, bias=masked, impl=impl)
        want = linear_logprobs(hidden, weight[:20], labels, bias=bias[:20], impl="reference")
        torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
        hidden[2, 3] = torch.nan
        got = linear_logprobs(hidden, weight, labels, impl=impl)
        assert got[2].isnan() and got[[0, 1, 3, 4]].isfinite().all()

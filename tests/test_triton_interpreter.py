"""The Triton kernels and the implementation on top of them, run in Triton's interpreter.

The interpreter must be chosen before triton is imported, so that in an ordinary run this module
holds one test, which runs the module again in a process with TRITON_INTERPRET=1. There, `tl.dot`
is wrong for bf16 operands, so that kernels with a product are tried in fp32 and fp16 only.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
IGNORED = -100
DTYPES = [torch.float32, torch.float16]


def error(value: Tensor, truth: Tensor) -> float:
    assert not value.isnan().any(), "NaN never passes"
    finite = truth.isfinite()
    assert torch.equal(value[~finite].double(), truth[~finite])
    return float((value.double() - truth)[finite].abs().max()) if finite.any() else 0.0


def assert_as_good(value: Tensor, eager: Tensor, truth: Tensor, band: float) -> None:
    """The rule: an error of at most twice that of eager PyTorch in the same precision, + a band."""
    ours, theirs = error(value, truth), error(eager, truth)
    assert ours <= 2 * theirs + band, f"error {ours:.2e}, eager {theirs:.2e}, band {band:.2e}"


if os.environ.get("TRITON_INTERPRET") != "1":

    def test_kernels_in_the_interpreter() -> None:
        versions = [tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, numpy)]
        if versions[0] < (3, 9) and versions[1] >= (2, 4):
            pytest.skip("older interpreters of Triton (3.6 at least) fail with numpy >= 2.4")
        environment = os.environ | {
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        run = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
        assert " passed" in run.stdout, run.stdout

else:
    from cpo_fast.kernels.linear_lse import linear_lse_logps
    from cpo_fast.kernels.pair_reduction import (
        row_scale,
        segment_coefficients,
        segment_sums,
        sigmoid_pairs,
    )
    from cpo_fast.kernels.row_kernel import row_logps_
    from cpo_fast.loss import cpo_loss, linear_logprobs
    from cpo_fast.loss import triton as implementation

    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on log(0), exp(-inf)
    OPTIONS: dict[str, dict[str, Any]] = {
        "plain": {},
        "softcap": {"softcap": 20.0},
        "temperature": {"temperature": 0.7},
        "all": {"softcap": 20.0, "temperature": 1.3, "bias": True},
    }

    # --- the row kernel ---------------------------------------------------------------------------

    def padded(raw: Tensor) -> Tensor:
        """The logits in a buffer whose padding is poisoned."""
        C, V = raw.shape
        buffer = torch.full((C, -(-V // 16) * 16), float("nan"), dtype=raw.dtype)
        buffer[:, :V] = raw
        return buffer

    def eager_rows(
        raw: Tensor, labels: Tensor, dtype: torch.dtype, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and d sum(logps) / d raw, computed in `dtype`."""
        raw = raw.to(dtype).requires_grad_()
        z = raw + options["bias"].to(dtype) if options.get("bias") is not None else raw
        if dtype != torch.float64:
            z = z.float()
        if cap := options.get("softcap"):
            z = cap * torch.tanh(z / cap)
        z = z / options.get("temperature", 1.0)
        scored = labels != IGNORED
        picked = z.log_softmax(-1).gather(1, labels.where(scored, 0)[:, None]).squeeze(1)
        picked.where(scored, 0).sum().backward()
        assert raw.grad is not None
        return picked.where(scored, 0).detach(), raw.grad

    def logits_of(kind: str, V: int) -> Tensor:
        raw = torch.randn(4, V) * 3
        if kind == "peaked":
            raw[:, V // 2] += 30
        if kind == "flat":
            raw = raw * 1e-3
        if kind == "huge-negative":
            raw = raw - 3e4
        if kind == "masked-vocabulary":
            raw[:, ::2] = float("-inf")
            raw[:, V // 2] = 1.0
        return raw

    @pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
    @pytest.mark.parametrize("V", [1, 7, 1000, 5003])
    @pytest.mark.parametrize(
        "kind", ["random", "peaked", "flat", "huge-negative", "masked-vocabulary"]
    )
    def test_row_kernel(dtype: torch.dtype, V: int, kind: str) -> None:
        torch.manual_seed(V)
        raw = logits_of(kind, V).to(dtype)
        labels = torch.tensor([V // 2, V // 2, IGNORED, V - 1])
        buffer = padded(raw)
        logps = row_logps_(buffer, labels, V, grad_rows=3)
        truth, truth_grad = eager_rows(raw, labels, torch.float64, {})
        eager, eager_grad = eager_rows(raw, labels, dtype, {})
        assert_as_good(logps, eager, truth, band=1e-6)
        assert (logps <= 0).all()
        eps = torch.finfo(dtype).eps
        assert_as_good(buffer[:3, :V], eager_grad[:3], truth_grad[:3], band=eps)
        assert (buffer[2] == 0).all()  # an ignored row: a zero gradient, padding included
        assert (buffer[:3, V:] == 0).all()
        assert torch.equal(buffer[3, :V], raw[3])  # beyond grad_rows: not written

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", list(OPTIONS))
    def test_row_kernel_options(dtype: torch.dtype, name: str) -> None:
        torch.manual_seed(1)
        V = 301
        raw = (torch.randn(3, V) * 8).to(dtype)
        raw[0, :5] = torch.tensor([0.0, 1e-3, -0.4, 2.0, 40.0]).to(dtype)  # both roads of tanh
        options = dict(OPTIONS[name])
        if options.pop("bias", False):
            options["bias"] = torch.randn(V).to(dtype)
        labels = torch.tensor([4, 0, 300])
        buffer = padded(raw)
        logps = row_logps_(buffer, labels, V, grad_rows=3, **options)
        truth, truth_grad = eager_rows(raw, labels, torch.float64, options)
        eager, eager_grad = eager_rows(raw, labels, dtype, options)
        assert_as_good(logps, eager, truth, band=3e-6)
        assert_as_good(buffer[:, :V], eager_grad, truth_grad, band=2 * torch.finfo(dtype).eps)

    def test_saturated_tokens_keep_their_digits() -> None:
        # p_y = 1 - 1e-12: log(p_y) rounds to 0 in float32, -log1p(S / e_y) does not.
        raw = torch.zeros(1, 1000)
        raw[0, 3] = 34.5
        buffer = padded(raw)
        logps = row_logps_(buffer, torch.tensor([3]), 1000, grad_rows=1)
        odds = 999 * math.exp(-34.5)  # in closed form: float64's log-softmax keeps 3 digits of it
        assert float(logps) == pytest.approx(-math.log1p(odds), rel=1e-5)
        assert float(buffer[0, 3]) == pytest.approx(odds / (1 + odds), rel=1e-5)
        assert float(buffer[0, 4]) == pytest.approx(-odds / 999 / (1 + odds), rel=1e-5)

    @pytest.mark.parametrize("poison", [float("nan"), float("inf")])
    @pytest.mark.parametrize("place", [0, 5])
    def test_broken_logits_are_seen(poison: float, place: int) -> None:
        raw = torch.randn(2, 40)
        raw[0, place] = poison
        buffer = padded(raw)
        logps = row_logps_(buffer, torch.tensor([5, 5]), 40, grad_rows=2)
        assert logps[0].isnan() and buffer[0, :40].isnan().any()
        assert logps[1].isfinite() and buffer[1].isfinite().all()

    def test_label_outside_the_vocabulary_reads_nothing() -> None:
        logps = row_logps_(padded(torch.randn(2, 40)), torch.tensor([40, -7]), 40, grad_rows=2)
        assert logps.isnan().all()

    def test_row_offsets_need_64_bits() -> None:
        # Two rows 2^31 + 32 elements apart, in 4 GiB of address space of which 2 pages are touched.
        stride = 2**31 + 32
        memory = torch.empty(stride + 16, dtype=torch.float16)
        buffer = memory.as_strided((2, 16), (stride, 1))
        buffer.copy_(torch.randn(2, 16))
        raw, labels = buffer.clone(), torch.tensor([3, 9])
        logps = row_logps_(buffer, labels, 16, grad_rows=2)
        truth, truth_grad = eager_rows(raw, labels, torch.float64, {})
        torch.testing.assert_close(logps.double(), truth, rtol=0, atol=1e-6)
        torch.testing.assert_close(buffer.double(), truth_grad, rtol=0, atol=1e-3)

    def test_unaligned_rows_are_refused() -> None:
        with pytest.raises(ValueError, match="multiples of 16"):
            row_logps_(torch.randn(2, 17), torch.tensor([0, 1]), 17, grad_rows=0)

    # --- the fused linear log-sum-exp -------------------------------------------------------------

    def head_of(T: int, V: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(T + V + D)
        labels = torch.randint(0, V, (T,))
        labels[T // 2 + 1 :: 3] = IGNORED
        return torch.randn(T, D).to(dtype), torch.randn(V, D).to(dtype), labels

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(1, 1, 8), (5, 7, 33), (130, 515, 64), (3, 2311, 70)])
    @pytest.mark.parametrize("name", ["plain", "all"])
    def test_linear_lse(dtype: torch.dtype, shape: tuple[int, int, int], name: str) -> None:
        h, w, labels = head_of(*shape, dtype)
        options = dict(OPTIONS[name])
        bias = torch.randn(shape[1]).to(dtype) if options.pop("bias", False) else None
        logps = linear_lse_logps(h, w, labels, bias=bias, **options)
        truth = linear_logprobs(
            h.double(),
            w.double(),
            labels,
            bias=None if bias is None else bias.double(),
            impl="reference",
            **options,
        )
        # The logits are never rounded to 16 bits: as exact as float32 accumulation of D terms is.
        assert error(logps, truth) <= 2e-5
        assert (logps <= 0).all() and (logps[labels == IGNORED] == 0).all()

    @pytest.mark.parametrize("offset", [-3e4, 3e4])
    def test_linear_lse_far_from_zero(offset: float) -> None:
        h, w, labels = head_of(4, 300, 32, torch.float32)
        bias = torch.full((300,), offset)
        logps = linear_lse_logps(h, w, labels, bias=bias)
        plain = linear_logprobs(h.double(), w.double(), labels, impl="reference")
        assert error(logps, plain) <= 4 * 3e4 * torch.finfo(torch.float32).eps

    def test_linear_lse_does_not_depend_on_the_batch() -> None:
        h, w, labels = head_of(150, 300, 64, torch.float16)
        whole = linear_lse_logps(h, w, labels)
        for rows in (slice(0, 1), slice(3, 40), slice(140, 150)):
            assert torch.equal(linear_lse_logps(h[rows], w, labels[rows]), whole[rows])

    # --- the pair reduction -----------------------------------------------------------------------

    def test_pair_reduction() -> None:
        torch.manual_seed(0)
        T, S, P = 2500, 5, 7
        logps, labels = -torch.rand(T) * 9, torch.randint(0, 9, (T,))
        labels[::7] = IGNORED
        logps[::7] = float("nan")  # unscored tokens are not read
        segment_ids = torch.randint(-1, S, (T,))
        sums, counts = segment_sums(logps, labels, segment_ids, S)
        scored = (segment_ids >= 0) & (labels != IGNORED)
        truth = torch.zeros(S, dtype=torch.float64)
        truth.index_add_(0, segment_ids[scored], logps[scored].double())
        torch.testing.assert_close(sums, truth, rtol=1e-14, atol=0)
        assert torch.equal(counts.long(), torch.bincount(segment_ids[scored], minlength=S))

        pairs, ref = torch.randint(0, S, (P, 2)), truth + torch.randn(S) * 30
        pairs[0] = pairs[1]  # a pair twice
        out = sigmoid_pairs(sums, ref, pairs, beta=0.3, label_smoothing=0.1)
        leaf = truth.clone().requires_grad_()
        delta = 0.3 * (leaf - ref)[pairs]
        x = delta[:, 0] - delta[:, 1]
        losses = -0.9 * torch.nn.functional.logsigmoid(x) - 0.1 * torch.nn.functional.logsigmoid(-x)
        losses.sum().backward()
        assert leaf.grad is not None
        torch.testing.assert_close(out.losses.double(), losses.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(out.rewards.double(), delta.detach(), rtol=1e-6, atol=1e-7)
        coefficients = segment_coefficients(out.slopes, pairs, S)
        torch.testing.assert_close(coefficients.double(), leaf.grad, rtol=1e-5, atol=1e-7)

    def test_a_saturated_pair_keeps_a_gradient() -> None:
        sums, ref = torch.tensor([60.0, 0.0], dtype=torch.float64), torch.zeros(2).double()
        out = sigmoid_pairs(sums, ref, torch.tensor([[0, 1]]), beta=1.0)
        expected = torch.tensor([-8.7565107627e-27])
        torch.testing.assert_close(out.slopes, expected, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_row_scale(dtype: torch.dtype) -> None:
        rows, coefficients = torch.randn(5, 1100).to(dtype), torch.randn(5)
        expected = (rows.float() * coefficients[:, None]).to(dtype)
        assert torch.equal(row_scale(rows, coefficients), expected)

    # --- the implementation -----------------------------------------------------------------------

    def run(
        impl: str,
        dtype: torch.dtype,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
        upstream: Tensor,
        **options: Any,
    ) -> list[Tensor]:
        """Log-probs and the gradients of hidden, weight (and bias) for the same upstream."""
        hidden, weight, labels, bias = inputs
        leaves = [
            x.to(dtype).clone().requires_grad_() for x in (hidden, weight, bias) if x is not None
        ]
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

    @pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
    @pytest.mark.parametrize(
        ("shape", "name"),
        [((1, 7, 8), "plain"), ((9, 301, 40), "all"), ((40, 5003, 24), "temperature")],
    )
    def test_implementation(
        dtype: torch.dtype, shape: tuple[int, int, int], name: str, monkeypatch: Any
    ) -> None:
        monkeypatch.setenv("CPO_FAST_WORKSPACE_MIB", "1")
        h, w, labels = head_of(*shape, dtype)
        options = dict(OPTIONS[name])
        bias = torch.randn(2 * shape[1]).to(dtype)[::2] if options.pop("bias", False) else None
        upstream = torch.randn(shape[0])
        inputs = (h, w, labels, bias)
        truth = run("reference", torch.float64, inputs, upstream, **options)
        eager = run("reference", dtype, inputs, upstream, **options)
        ours = run("triton", dtype, inputs, upstream, **options)
        for value, other, exact in zip(ours, eager, truth, strict=True):
            band = 4 * torch.finfo(dtype).eps * float(exact.abs().max())
            assert value.dtype == other.dtype
            assert_as_good(value, other, exact, band)

    def test_recomputed_chunks_give_the_gradients_of_one_chunk(monkeypatch: Any) -> None:
        # 1 MiB holds 13 rows of 20,032 float32 logits: 2 chunks, recomputed for dW in the backward.
        h, w, labels = head_of(20, 20_011, 16, torch.float32)
        bias, upstream = torch.randn(20_011), torch.randn(20)
        whole = run("triton", torch.float32, (h, w, labels, bias), upstream)
        monkeypatch.setenv("CPO_FAST_WORKSPACE_MIB", "1")
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
        ("hidden_grad", "weight_grad", "bias_grad", "mib", "forward", "backward"),
        [
            (False, False, False, 1024, 2, 0),  # a lone call without gradients: 1 GEMM each
            (True, False, False, 1024, 3, 0),  # frozen head: 2, and 1 for the reference
            (True, True, False, 1024, 3, 1),  # all rows in one chunk: 3 + 1
            (True, True, False, 1, 6, 4),  # two chunks, recomputed: 4 + 1
            (True, False, True, 1024, 3, 1),  # a bias alone: no dW, one narrow product
        ],
    )
    def test_gemms_are_counted(
        hidden_grad: bool,
        weight_grad: bool,
        bias_grad: bool,
        mib: int,
        forward: int,
        backward: int,
        monkeypatch: Any,
    ) -> None:
        monkeypatch.setenv("CPO_FAST_WORKSPACE_MIB", str(mib))
        calls: list[str] = []

        def counting(name: str) -> None:
            original = getattr(torch, name)

            def call(*args: Any, **kwargs: Any) -> Tensor:
                calls.append(name)
                return original(*args, **kwargs)

            monkeypatch.setattr(torch, name, call)

        counting("mm")
        counting("addmm")
        V = 20_011 if hidden_grad else 300
        h, w, labels = head_of(20, V, 8, torch.float32)
        bias = torch.randn(V, requires_grad=True) if bias_grad else None
        h.requires_grad_(hidden_grad)
        w.requires_grad_(weight_grad)
        if hidden_grad:
            logps, _ = implementation.token_logps(
                h, w, labels, bias, h.detach(), softcap=None, temperature=1.0, ignore_index=IGNORED
            )
        else:  # alone, as when a reference is cached; then policy and reference at once
            for ref in (None, h):
                logps, _ = implementation.token_logps(
                    h, w, labels, bias, ref, softcap=None, temperature=1.0, ignore_index=IGNORED
                )
            forward = 1  # the second call is the fused kernel: no vendor GEMM
        assert len(calls) == forward
        if hidden_grad:
            calls.clear()
            logps.sum().backward()
            assert len(calls) == backward

    def test_opcheck() -> None:
        h, w, labels = head_of(5, 20, 8, torch.float32)
        bias = torch.randn(20)
        options = (None, 1.0, IGNORED)
        for ref, hidden_grad, head_grad in (
            (None, True, False),
            (h, True, True),
            (h, False, False),
        ):
            args = (
                h.clone().requires_grad_(hidden_grad),
                w.clone().requires_grad_(head_grad),
                labels,
                bias.clone().requires_grad_(head_grad),
                ref,
                *options,
                hidden_grad,
                head_grad,
                head_grad,
                1 << 20,
            )
            torch.library.opcheck(torch.ops.cpo_fast.triton_logps.default, args)
        torch.library.opcheck(torch.ops.cpo_fast.triton_row_scale.default, (h, torch.randn(5)))
        torch.library.opcheck(
            torch.ops.cpo_fast.triton_head_grad.default,
            (h, w, labels, bias, h.new_empty(0, 64), torch.randn(5), *options, 1 << 20, True),
        )

    def test_compiled_step_and_checkpointing_give_the_same_numbers() -> None:
        h, w, labels, segments, pairs = batch(13, 60, 16, torch.float32)
        ref = torch.randn_like(h)

        def step(h: Tensor, w: Tensor) -> Tensor:
            return cpo_loss(
                h.tanh(), w, labels, segments, pairs, ref_hidden=ref, num_segments=4, impl="triton"
            ).loss

        def logps(h: Tensor, w: Tensor) -> Tensor:
            options = {"softcap": None, "temperature": 1.0, "ignore_index": IGNORED}
            return (
                implementation.token_logps(h.tanh(), w, labels, None, ref, **options)[0]
                .square()
                .sum()
            )

        def gradients(function: Any) -> list[Tensor]:
            leaves = [h.clone().requires_grad_(), w.clone().requires_grad_()]
            loss = function(*leaves)
            return [loss.detach(), *torch.autograd.grad(loss, leaves)]

        def same(values: list[Tensor], expected: list[Tensor]) -> None:
            for value, exact in zip(values, expected, strict=True):
                torch.testing.assert_close(value, exact, rtol=1e-6, atol=1e-7)

        expected = gradients(step)
        same(gradients(torch.compile(step, backend="aot_eager")), expected)
        same(
            gradients(lambda *x: torch.utils.checkpoint.checkpoint(step, *x, use_reentrant=False)),
            expected,
        )
        whole = torch.compile(logps, backend="aot_eager", fullgraph=True)  # without a graph break
        same(gradients(whole), gradients(logps))

    def test_autocast_decides_the_precision() -> None:
        h, w, labels = head_of(5, 40, 16, torch.float32)
        h.requires_grad_()
        w.requires_grad_()
        with torch.autocast("cpu", dtype=torch.float16):
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

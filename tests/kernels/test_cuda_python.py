"""The Python code around the CUDA kernels, on the CPU with stand-ins for the kernels.

What is tested is chunking, strides, saved factors, gradients and operators; the kernels themselves
are checked by test_cuda_compile.py, test_cuda_index.py and test_cuda_kernels.py.
"""

from __future__ import annotations

import ctypes
import math
from contextlib import nullcontext
from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu.correctness import RULES
from cpo_fast.loss import chunked, cpo_loss, cuda, cuda_launch, linear_logprobs, reference
from cpo_fast.loss.operators import Plan
from cpo_fast.loss.options import LossOptions
from cpo_fast.loss.segments import sums_and_counts
from cpo_fast.testing.error_rule import assert_as_good
from tests.kernels.triton_cases import add_product_on_cpu


def at(address: int, shape: tuple[int, ...], stride: int, dtype: torch.dtype) -> Tensor:
    """The memory at `address` as a tensor whose rows are `stride` values apart."""
    rows = shape[0] if len(shape) == 2 else 1
    size = ((rows - 1) * stride + shape[-1]) * dtype.itemsize
    flat = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)
    return flat.as_strided(shape, (stride, 1) if len(shape) == 2 else (1,))


class StandIn:
    """cpo_fast._cuda by its documented contract (csrc/cuda/*.h), in float64 torch."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    @staticmethod
    def finish(z: Tensor, a: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Writes logps and lse of scaled logits z [rows, V]; returns (onehot - p, labels)."""
        rows, V = z.shape
        labels = at(a["labels"], (rows,), 1, torch.int64)
        scored = (labels >= 0) & (labels < V)
        onehot = torch.zeros_like(z)
        onehot[scored, labels[scored]] = 1
        lse = z.logsumexp(1)
        at(a["logps"], (rows,), 1, torch.float32)[:] = torch.where(
            scored, (z * onehot).sum(1) - lse, 0
        )
        at(a["lse"], (rows,), 1, torch.float32)[:] = lse
        return (onehot - (z - lse[:, None]).exp()) * scored[:, None], labels

    def row_kernel(self, **a: Any) -> None:
        self.calls.append("row_kernel")
        assert a["stride"] % 8 == 0 and a["logits"] % 16 == 0
        logits = at(a["logits"], (a["rows"], a["vocab"]), a["stride"], getattr(torch, a["dtype"]))
        z = logits.double()
        if a["bias"]:
            z = z + at(a["bias"], (a["vocab"],), 1, torch.float32)
        slope = torch.ones_like(z)
        if a["softcap"]:
            slope = 1 - torch.tanh(z / a["softcap"]) ** 2
            z = a["softcap"] * torch.tanh(z / a["softcap"])
        gradient, _ = self.finish(z / a["temperature"], a)
        gradient = gradient * slope / a["temperature"]
        logits[: a["grad_rows"]] = gradient[: a["grad_rows"]].to(logits.dtype)

    def linear_workspace_bytes(self, *, rows: int, vocab: int) -> int:
        return 16

    def linear_lse(self, **a: Any) -> None:
        self.calls.append("linear_exp" if a["exp"] else "linear_lse")
        dtype, rows, V = getattr(torch, a["dtype"]), a["rows"], a["vocab"]
        hidden = at(a["hidden"], (rows, a["width"]), a["hidden_stride"], dtype)
        weight = at(a["weight"], (V, a["width"]), a["weight_stride"], dtype)
        z = hidden.double() @ weight.double().t() / a["temperature"]
        gradient, labels = self.finish(z, a)
        if a["exp"]:
            offsets = at(a["offsets"], (rows,), 1, torch.float32).double()
            lse = z.logsumexp(1)
            offsets = torch.where((offsets - lse).abs() <= 60, offsets, lse)
            scored = labels >= 0
            factors = -(offsets - lse).exp() / a["temperature"]
            at(a["factors"], (rows,), 1, torch.float32)[:] = torch.where(scored, factors, 0)
            exp = (z - offsets[:, None]).exp() * scored[:, None]
            gradient = gradient / a["temperature"] / factors[:, None]
            picked = labels.clamp(min=0)[:, None]
            exp.scatter_(1, picked, gradient.gather(1, picked))
            at(a["exp"], (rows, V), a["exp_stride"], torch.bfloat16)[:] = exp.bfloat16()

    def segment_sums(self, **a: Any) -> None:
        self.calls.append("segment_sums")
        T, S = a["tokens"], a["segments"]
        if T * S == 0:
            return
        logps = at(a["logps"], (T,), 1, torch.float32)
        segments = at(a["segment_ids"], (T,), 1, torch.int64)
        scored = at(a["labels"], (T,), 1, torch.int64) != a["ignore_index"]
        for s in range(S):
            mine = segments == s
            at(a["sums"], (S,), 1, torch.float64)[s] = logps[mine].double().sum()
            at(a["counts"], (S,), 1, torch.int64)[s] = (mine & scored).sum()

    def row_scale(self, **a: Any) -> None:
        dtype, shape = getattr(torch, a["dtype"]), (a["tokens"], a["width"])
        if a["tokens"]:
            rows = at(a["rows"], shape, a["width"], dtype).double()
            coefficients = at(a["coefficients"], (a["tokens"],), 1, torch.float32)
            out = at(a["out"], shape, a["width"], dtype)
            out[:] = (rows * coefficients[:, None]).to(dtype)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    standin = StandIn()
    monkeypatch.setattr(cuda_launch, "kernels", lambda: standin)
    monkeypatch.setattr(cuda_launch, "site", lambda tensor: {"device": 0, "stream": 0})
    monkeypatch.setattr(chunked, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(cuda, "add_product", add_product_on_cpu)
    monkeypatch.setattr(cuda, "_has_wgmma", lambda device: True)
    return standin


def inputs(T: int, V: int, D: int, dtype: torch.dtype, bias: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(T + V + D)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(V, (T,), generator=generator)
    labels[4::7] = -100
    return {
        "hidden": normal(T, D).to(dtype),
        "weight": (normal(V, D) * 2 / D**0.5).to(dtype),
        "labels": labels,
        "bias": normal(V).to(dtype) if bias else None,
        "ref_hidden": normal(T, D).to(dtype),
        "upstream": normal(T),
    }


def run(
    module: Any, case: dict[str, Any], head: bool, path: str | None = None, **options: Any
) -> dict[str, Tensor]:
    hidden = case["hidden"].clone().requires_grad_()
    weight = case["weight"].clone().requires_grad_(head)
    bias = None if case["bias"] is None else case["bias"].clone().requires_grad_(head)
    arguments = (hidden, weight, case["labels"], bias, case["ref_hidden"], LossOptions(**options))
    with cuda.forced_path(path) if path else nullcontext():
        logps, ref_logps = module.token_logps(*arguments)
    assert not ref_logps.requires_grad
    logps.backward(case["upstream"].to(logps.dtype))
    found = {"logps": logps.detach(), "ref_logps": ref_logps, "hidden": hidden.grad}
    if head:
        found |= {"weight": weight.grad} | ({} if bias is None else {"bias": bias.grad})
    return found


def check(case: dict[str, Any], head: bool, path: str, **options: Any) -> None:
    """Errors against float64 at most twice those of eager PyTorch in the same precision."""
    exact_case = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in case.items()
    }
    exact = run(reference, exact_case, head, **options)
    eager = run(reference, case, head, **options)
    found = run(cuda, case, head, path=path, **options)
    assert found.keys() == exact.keys()
    for name, truth in exact.items():
        band = torch.finfo(case["hidden"].dtype).eps / 2 * float(truth.abs().max())
        assert_as_good(found[name], eager[name], truth, band, name=name)
        assert found[name].dtype == (torch.float32 if "logps" in name else case["hidden"].dtype)


@pytest.mark.parametrize("path", ["rows", "fused"])
@pytest.mark.parametrize("head", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("room_mib", ["1", "64"], ids=["chunks", "one-chunk"])
def test_values_and_gradients(
    kernels: StandIn, monkeypatch: pytest.MonkeyPatch, path: str, head: bool, room_mib: str
) -> None:
    monkeypatch.setenv("CPO_FAST_WORKSPACE_MIB", room_mib)
    case = inputs(700, 1003, 24, torch.bfloat16, bias=False)
    check(case, head, path, temperature=0.7)
    if path == "fused":
        assert kernels.calls[0] == "linear_lse" and "row_kernel" not in kernels.calls
    forward = kernels.calls.count("linear_exp" if path == "fused" else "row_kernel")
    chunk_count = 2 if room_mib == "1" else 1  # each anew in the backward of a trained head
    if head and chunk_count > 1:
        forward -= chunk_count
    assert forward == chunk_count * (1 if path == "fused" else 2)


@pytest.mark.parametrize("path", ["rows", "fused"])
def test_chunks_are_kept_in_the_room_of_the_heads_sum(
    kernels: StandIn, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setenv("CPO_FAST_WORKSPACE_MIB", "1")  # 512 rows; all 600 with 4 V D bytes more
    check(inputs(600, 1003, 64, torch.bfloat16, bias=False), True, path)
    kernel = "linear_exp" if path == "fused" else "row_kernel"
    assert kernels.calls.count(kernel) == 2 * (1 if path == "fused" else 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bias_and_soft_cap(kernels: StandIn, dtype: torch.dtype) -> None:
    check(inputs(65, 131, 20, dtype, bias=True), True, "rows", softcap=5.0, temperature=1.3)


def test_far_offsets_and_one_token(kernels: StandIn) -> None:
    case = inputs(1, 77, 8, torch.bfloat16, bias=False)
    case["labels"][:] = 3
    check(case, True, "fused")
    case["ref_hidden"] *= 200  # LSEs hundreds apart from the policy's
    check(case, True, "fused")


def test_equal_hidden_states_give_equal_bits(kernels: StandIn) -> None:
    case = inputs(130, 300, 16, torch.bfloat16, bias=False)
    case["ref_hidden"] = case["hidden"]
    for path in ("rows", "fused"):
        found = run(cuda, case, False, path=path)
        assert torch.equal(found["logps"], found["ref_logps"])


def test_nothing_to_score_and_no_rows(kernels: StandIn) -> None:
    for T in (0, 5):
        case = inputs(T, 50, 16, torch.bfloat16, bias=False)
        case["labels"][:] = -100
        for path in ("rows", "fused"):
            if T or path == "rows":
                found = run(cuda, case, True, path=path)
                assert all((value == 0).all() for name, value in found.items())


def test_an_ignore_index_that_is_a_label(kernels: StandIn) -> None:
    case = inputs(20, 50, 16, torch.bfloat16, bias=False)
    case["labels"] = torch.arange(20)
    check(case, False, "rows", ignore_index=4)


def test_no_gradient_work_unless_asked(kernels: StandIn) -> None:
    case = inputs(20, 50, 16, torch.bfloat16, bias=False)
    arguments = [case[k] for k in ("hidden", "weight", "labels", "bias", "ref_hidden")]
    with cuda.forced_path("fused"):
        cuda.token_logps(*arguments, LossOptions())
    assert kernels.calls == ["linear_lse", "linear_lse"]


def test_cpo_loss_is_log_2_when_policy_equals_reference(
    kernels: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "obstacle", lambda device: None)
    case = inputs(60, 300, 16, torch.bfloat16, bias=False)
    segments = torch.arange(60) // 10
    segments[55:] = -1
    pairs = torch.tensor([[0, 1], [2, 3], [2, 4]])
    found = {}
    for impl in ("cuda", "reference"):
        hidden = case["hidden"].clone().requires_grad_()
        arguments = (hidden, case["weight"], case["labels"], segments, pairs)
        same = cpo_loss(*arguments, ref_hidden=case["hidden"], impl=impl)
        assert float(same.loss) == pytest.approx(math.log(2), abs=1e-7)
        assert (same.chosen_rewards == 0).all() and (same.rejected_rewards == 0).all()
        out = cpo_loss(*arguments, ref_hidden=case["ref_hidden"], impl=impl)
        (out.loss + 0.01 * out.logps.sum()).backward()
        found[impl] = (out.loss.detach(), hidden.grad)
    for got, want in zip(found["cuda"], found["reference"], strict=True):
        assert got is not None and want is not None
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02 * float(want.abs().max()))


def test_segment_sums(kernels: StandIn) -> None:
    logps = torch.randn(40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    segments = torch.arange(40) % 7 - 1
    labels = torch.arange(40).where(segments >= 0, -100)
    labels[5] = -100
    scored = logps * (labels != -100)
    found = cuda.sums_and_counts(scored, segments, labels, 8, -100)
    want = sums_and_counts(scored, segments, labels, 8, -100)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    upstream = torch.arange(8, dtype=torch.float64)
    (got,) = torch.autograd.grad(found[0], logps, upstream, retain_graph=True)
    assert torch.equal(got, torch.autograd.grad(want[0], logps, upstream)[0])
    assert cuda.sums_and_counts(logps, segments.clamp(max=-1), labels, 0, -100)[0].shape == (0,)
    arguments = (logps, segments, labels, 8, -100)
    torch.library.opcheck(torch.ops.cpo_fast.cuda_segment_sums, arguments)


def test_what_was_measured_to_win_is_taken(
    kernels: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "obstacle", lambda device: None)
    case = inputs(20, 50, 16, torch.bfloat16, bias=False)
    arguments = [case[k].clone() for k in ("hidden", "weight", "labels")]

    def kernels_run(**options: Any) -> list[str]:
        kernels.calls.clear()
        linear_logprobs(*arguments, **options)
        return kernels.calls

    assert kernels_run() == [], "nothing was measured: impl=None goes elsewhere"
    assert kernels_run(impl="cuda") == ["row_kernel"]
    monkeypatch.setitem(cuda.MEASURED, (50, 16), cuda.Measured("fused", "this test"))
    assert kernels_run() == ["linear_lse"]
    assert kernels_run(bias=torch.zeros(50).bfloat16()) == ["row_kernel"], "fused takes no bias"
    arguments[1] = arguments[1][:49]
    assert kernels_run() == [], "another head"
    arguments[0], arguments[1] = arguments[0].float(), case["weight"].float()
    assert kernels_run() == [], "a dtype that these kernels do not take"


@pytest.mark.parametrize("variant", ["cuda rows", "cuda fused"])
@pytest.mark.parametrize("rule", [name for name in RULES if name != "same bits every run"])
def test_the_rules_that_a_gpu_is_asked_for(
    kernels: StandIn, monkeypatch: pytest.MonkeyPatch, rule: str, variant: str
) -> None:
    monkeypatch.setattr(cuda, "obstacle", lambda device: None)
    monkeypatch.setattr(cuda, "_has_wgmma", constant_under_compile)
    RULES[rule](variant, "cpu", True)


@torch.compiler.assume_constant_result
def constant_under_compile(device: torch.device) -> bool:
    return bool(torch.tensor([1.0]).item())  # would break the graph if it were traced


def test_a_path_can_be_forced(kernels: StandIn) -> None:
    case = inputs(20, 50, 16, torch.bfloat16, bias=False)
    with cuda.forced_path("fused"):
        run(cuda, case, False)
    assert "row_kernel" not in kernels.calls
    kernels.calls.clear()
    run(cuda, case, False)
    assert "linear_lse" not in kernels.calls


@pytest.mark.parametrize("fused", [False, True])
def test_operators_pass_opcheck(kernels: StandIn, fused: bool) -> None:
    case = inputs(20, 50, 16, torch.bfloat16, bias=not fused)
    hidden, weight = case["hidden"].requires_grad_(), case["weight"].requires_grad_()
    labels, bias, ref = case["labels"].clamp(min=-1), case["bias"], case["ref_hidden"]
    path = "fused" if fused else "rows"
    plan = Plan(None, 1.0, -1, True, True, True, 2**20, path, 1)
    arguments = (hidden, weight, labels, bias, ref, *astuple(plan))
    torch.library.opcheck(torch.ops.cpo_fast.cuda_logps, arguments)


def test_the_fused_path_is_refused_with_its_reason() -> None:
    case = inputs(20, 50, 12, torch.bfloat16, bias=True)
    arguments = [case[k] for k in ("hidden", "weight", "labels", "bias", "ref_hidden")]
    with cuda.forced_path("fused"):
        with pytest.raises(ValueError, match="multiple of 8"):
            cuda.token_logps(*arguments, LossOptions())
        arguments[0], arguments[1] = arguments[0][:, :8], arguments[1][:, :8]
        with pytest.raises(ValueError, match="without bias"):
            cuda.token_logps(*arguments, LossOptions())
        with pytest.raises(ValueError, match="bfloat16"):
            cuda.token_logps(arguments[0].half(), *arguments[1:], LossOptions())
    with pytest.raises(ValueError, match="path must be"), cuda.forced_path("tensor"):
        pass


def test_cpu_tensors_never_reach_a_kernel() -> None:
    assert cuda.obstacle(torch.device("cpu")) == "for CUDA tensors only"
    assert cuda.supports(torch.bfloat16) and not cuda.supports(torch.float32)
    with pytest.raises(ValueError, match="CUDA tensors"):
        cuda_launch.site(torch.zeros(1))


@pytest.mark.parametrize(("V", "D"), [(152064, 3584), (151936, 2048), (151936, 896), (50257, 768)])
def test_chunk_plan(V: int, D: int) -> None:
    for T in (1, 127, 1000, 8192, 16384):
        rows = chunked.chunk_rows(T, V, D, 2, 132, 2**30)
        assert 1 <= rows <= T
        assert rows * chunked.padded_columns(V) * 2 <= 2**30
        assert rows == T or rows % 128 == 0
        assert (pairs := chunked.chunk_rows(T, V, D, 2, 132, 2**30, 256)) == T or pairs % 256 == 0
    assert chunked.chunk_rows(8192, 152064, 3584, 2, 132, 1) == 1
    # An independent count: no other chunk size that fits gives a higher utilisation.
    T, room = 8192, 2**30

    def busy(rows: int) -> float:
        """The utilised share of tile slots, over both products and all chunks."""
        work = slots = 0
        for size in [rows] * (T // rows) + [T % rows] * (T % rows > 0):
            for width, terms in ((V, D), (D, V)):
                tiles = math.ceil(size / 128) * math.ceil(width / 256)
                work += size / 128 * width / 256 * terms
                slots += math.ceil(tiles / 132) * 132 * terms
        return work / slots

    chosen = chunked.chunk_rows(T, V, D, 2, 132, room)
    fits = range(128, min(T, room // (2 * chunked.padded_columns(V))) + 1, 128)
    assert busy(chosen) >= max(map(busy, fits)) - 1e-12
    assert chunked.padded_columns(V) % 64 == 0 and 0 <= chunked.padded_columns(V) - V < 64

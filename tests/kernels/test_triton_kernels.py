"""The Triton kernels against float64: on a GPU where there is one, else in the interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from cpo_fast.testing.error_rule import assert_as_good, largest_error
from tests.kernels.triton_cases import (
    DEVICE,
    EXACT_FLOATS,
    FLOATS,
    IGNORED,
    OPTIONS,
    skip_unless_runnable,
    standing_in_for_a_gpu,
)

skip_unless_runnable()

from cpo_fast.kernels import lean_rows  # noqa: E402
from cpo_fast.kernels.reduction import row_scale, segment_sums  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning",  # numpy on log(0)
    "ignore:Conversion of an array",  # Triton 3.6 on numpy
)


@pytest.fixture(autouse=True)
def on_the_device() -> Iterator[None]:
    with torch.device(DEVICE), standing_in_for_a_gpu():
        yield


# --- the row kernel ---------------------------------------------------------------------------


@pytest.fixture(params=["large steps", "small steps"])
def row_logps_(request: pytest.FixtureRequest) -> Iterator[Callable[..., Tensor]]:
    """The launcher. Small steps (256 columns in 16 bits) bring short rows into the main loop."""
    with ExitStack() as stack:
        if request.param == "small steps":
            stack.enter_context(lean_rows.forced_tile(16, 1))
        yield lean_rows.row_logps_


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


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("row_logps_", "V"),
    [("large steps", 1), ("large steps", 7), ("large steps", 5003), ("small steps", 1000)],
    indirect=["row_logps_"],
)
@pytest.mark.parametrize("kind", ["random", "peaked", "flat", "huge-negative", "masked-vocabulary"])
def test_row_kernel(
    row_logps_: Callable[..., Tensor], dtype: torch.dtype, V: int, kind: str
) -> None:
    torch.manual_seed(V)
    raw = logits_of(kind, V).to(dtype)
    labels = torch.tensor([V // 2, V // 2, IGNORED, V - 1])
    buffer = padded(raw)
    logps = row_logps_(buffer, labels, V, grad_rows=3)
    truth, truth_grad = eager_rows(raw, labels, torch.float64, {})
    eager, eager_grad = eager_rows(raw, labels, dtype, {})
    assert_as_good(logps, eager, truth, band=2e-6)
    assert (logps <= 0).all()
    eps = torch.finfo(dtype).eps
    assert_as_good(buffer[:3, :V], eager_grad[:3], truth_grad[:3], band=eps)
    assert (buffer[2] == 0).all()  # an ignored row: a zero gradient, padding included
    assert (buffer[:3, V:] == 0).all()
    assert torch.equal(buffer[3, :V], raw[3])  # beyond grad_rows: not written


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", list(OPTIONS))
def test_row_kernel_options(
    row_logps_: Callable[..., Tensor], dtype: torch.dtype, name: str
) -> None:
    torch.manual_seed(1)
    V = 301
    raw = (torch.randn(3, V) * 8).to(dtype)
    raw[0, :5] = torch.tensor([0.0, 1e-3, -0.4, 2.0, 40.0]).to(dtype)  # both branches of tanh
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


def test_saturated_tokens_keep_their_digits(row_logps_: Callable[..., Tensor]) -> None:
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
def test_broken_logits_are_seen(
    row_logps_: Callable[..., Tensor], poison: float, place: int
) -> None:
    raw = torch.randn(2, 40)
    raw[0, place] = poison
    buffer = padded(raw)
    logps = row_logps_(buffer, torch.tensor([5, 5]), 40, grad_rows=2)
    assert logps[0].isnan() and buffer[0, :40].isnan().any()
    assert logps[1].isfinite() and buffer[1].isfinite().all()


def test_label_outside_the_vocabulary_reads_nothing(row_logps_: Callable[..., Tensor]) -> None:
    logps = row_logps_(padded(torch.randn(2, 40)), torch.tensor([40, -7]), 40, grad_rows=2)
    assert logps.isnan().all()


def test_row_offsets_need_64_bits(row_logps_: Callable[..., Tensor]) -> None:
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


def test_unaligned_rows_are_refused(row_logps_: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        row_logps_(torch.randn(2, 17), torch.tensor([0, 1]), 17, grad_rows=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("label", [0, 255, 256, 1023, 1024, 1029])
@pytest.mark.parametrize("row_logps_", ["small steps"], indirect=True)
def test_a_label_in_every_part_of_a_row(
    row_logps_: Callable[..., Tensor], dtype: torch.dtype, label: int
) -> None:
    # 1030 columns: steps of 256 (float32: 128) columns, then a ragged end.
    torch.manual_seed(label)
    raw = (torch.randn(2, 1030) * 3).to(dtype)
    labels = torch.tensor([label, label])
    buffer = padded(raw)
    logps = row_logps_(buffer, labels, 1030, grad_rows=1)
    truth, truth_grad = eager_rows(raw, labels, torch.float64, {})
    eager, eager_grad = eager_rows(raw, labels, dtype, {})
    assert_as_good(logps, eager, truth, band=2e-6)
    band = torch.finfo(dtype).eps
    assert_as_good(buffer[:1, :1030], eager_grad[:1], truth_grad[:1], band)
    assert torch.equal(buffer[1, :1030], raw[1]), "a reference row keeps its label's logit"


def test_policy_and_reference_rows_get_the_same_bits(row_logps_: Callable[..., Tensor]) -> None:
    raw = (torch.randn(1, 3001) * 5).bfloat16().expand(4, -1)
    labels = torch.tensor([7, 2999, 7, 2999])
    logps = row_logps_(padded(raw), labels, 3001, grad_rows=2, temperature=0.7)
    assert torch.equal(logps[:2], logps[2:])


@pytest.mark.parametrize("mask", [-1e9, -1e10, -1e30, torch.finfo(torch.bfloat16).min])
@pytest.mark.parametrize("allowed", [130, 2])
@pytest.mark.parametrize("row_logps_", ["small steps"], indirect=True)
def test_a_vocabulary_masked_by_a_bias(
    row_logps_: Callable[..., Tensor], mask: float, allowed: int
) -> None:
    V = 1030
    raw = torch.randn(3, V).bfloat16()
    bias = torch.zeros(V, dtype=torch.bfloat16)
    bias[: V - allowed] = mask  # whole vectors and steps of it, the first ones
    labels = torch.tensor([V - 2, V - 1, 5])  # the last one is masked itself
    buffer = padded(raw)
    logps = row_logps_(buffer, labels, V, grad_rows=3, bias=bias)
    truth, truth_grad = eager_rows(raw, labels, torch.float64, {"bias": bias})
    assert largest_error(logps[:2], truth[:2]) <= 2e-6
    assert largest_error(buffer[:, :V], truth_grad) <= torch.finfo(torch.bfloat16).eps
    assert logps[2] <= mask / 2


def test_a_vocabulary_of_which_only_the_label_is_left(
    row_logps_: Callable[..., Tensor],
) -> None:
    raw = torch.full((3, 300), -1e10)
    raw[1] = float("-inf")
    raw[2] = -3e38
    raw[:, 7] = torch.tensor([2.0, -1e10, 2.0])
    buffer = padded(raw)
    logps = row_logps_(buffer, torch.tensor([7, 7, 7]), 300, grad_rows=3)
    assert (logps == 0).all() and (buffer[:, :300] == 0).all()


@pytest.mark.parametrize("size", [1e8, 1e10, 3e38])
def test_huge_logits_are_right_or_not_a_number(
    row_logps_: Callable[..., Tensor], size: float
) -> None:
    raw = torch.zeros(6, 300)
    raw[0], raw[1] = -size, size  # flat
    raw[2, 9], raw[3, 9] = size, -size  # another one
    raw[4, 5], raw[5, 5] = size, -size  # the label
    labels = torch.full((6,), 5)
    buffer = padded(raw)
    logps = row_logps_(buffer, labels, 300, grad_rows=6)
    truth, truth_grad = eager_rows(raw, labels, torch.float64, {})
    for i in range(6):
        bad = logps[i].isnan() and buffer[i, :300].isnan().any()
        right = torch.allclose(logps[i].double(), truth[i], rtol=1e-5, atol=1e-4)
        right = right or (truth[i] < -1e38 and logps[i] == -float("inf"))  # float32 has no more
        exact = torch.allclose(buffer[i, :300].double(), truth_grad[i], rtol=1e-4, atol=1e-6)
        assert bad or (right and exact), (i, logps[i], truth[i])
        if size <= 1e8:
            assert not bad


# --- reductions -------------------------------------------------------------------------------


def test_segment_sums() -> None:
    torch.manual_seed(0)
    T, S = 2500, 5
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


@pytest.mark.parametrize("dtype", EXACT_FLOATS)
def test_row_scale(dtype: torch.dtype) -> None:
    rows, coefficients = torch.randn(5, 1100).to(dtype), torch.randn(5)
    expected = (rows.float() * coefficients[:, None]).to(dtype)
    assert torch.equal(row_scale(rows, coefficients), expected)

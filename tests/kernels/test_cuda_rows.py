"""The CUDA row kernel against float64: on a GPU where there is one, and always in the emulator.

See test_cuda_kernels.py for what the emulator can and cannot show.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.cuda_places import (
    NAN,
    Place,
    emulated,
    everywhere,
    labels_for,
    normal,
    place,
    row_truth,
)

pytestmark = pytest.mark.slow
__all__ = ["emulated", "place"]  # fixtures
INF = float("inf")


def check_row_kernel(
    place: Place,
    logits: Tensor,  # [C, V] float32, to be rounded
    labels: Tensor,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    temperature: float = 1.0,
    grad_rows: int | None = None,
) -> None:
    (C, V), stride = logits.shape, (logits.shape[1] + 7) // 8 * 8 + 24
    grad_rows = C if grad_rows is None else grad_rows
    buffer = torch.full((C, stride), NAN, dtype=dtype, device=place.device)
    buffer[:, :V] = logits.to(dtype)
    before = buffer[:, :V].clone()
    logps, lse = torch.full((2, C), NAN, device=place.device).unbind(0)
    place.launch(
        "row_kernel",
        dtype=str(dtype).removeprefix("torch."),
        logits=buffer,
        stride=stride,
        rows=C,
        vocab=V,
        grad_rows=grad_rows,
        labels=labels,
        bias=bias,
        softcap=softcap,
        temperature=temperature,
        logps=logps,
        lse=lse,
    )
    want_logps, want_lse, want = row_truth(before, labels, bias, softcap, temperature)
    scale = 1 + want_lse.abs() + want_logps.abs()
    assert (logps <= 0).all()
    assert ((logps.double() - want_logps).abs() <= 2e-6 * scale).all()
    assert ((lse.double() - want_lse).abs() <= 2e-6 * scale).all()
    got, want = buffer[:grad_rows, :V].double(), want[:grad_rows]
    # One rounding of the result, and fp32's error in the exponent.
    exponent = 4e-7 * scale[:grad_rows, None] / min(temperature, 1.0) + 1e-5
    allowed = want.abs() * (torch.finfo(dtype).eps / 2 * 1.01 + exponent) + 1e-7
    assert ((got - want).abs() <= allowed).all()
    assert torch.equal(buffer[grad_rows:, :V], before[grad_rows:])
    assert buffer[:, (V + 7) // 8 * 8 :].isnan().all()  # nothing beyond the last vector


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [1, 9, 131, 16392, 20007])
def test_row_kernel(place: Place, V: int, dtype: torch.dtype) -> None:
    C = 7
    check_row_kernel(place, 3 * normal(place, C, V), labels_for(place, C, V), dtype, grad_rows=6)


@everywhere
def test_row_kernel_with_all_options(place: Place) -> None:
    C, V = 5, 1003
    check_row_kernel(
        place,
        8 * normal(place, C, V),
        labels_for(place, C, V),
        torch.bfloat16,
        bias=normal(place, V, seed=1),
        softcap=15.0,
        temperature=0.6,
    )


@everywhere
def test_row_kernel_on_extreme_logits(place: Place) -> None:
    V, C = 300, 6
    logits = normal(place, C, V)
    logits[0] -= 1e4
    logits[1] *= 200  # peaked
    logits[2] = 5.0  # flat
    logits[3] = -3e38
    logits[4, :] = -float("inf")
    logits[4, 7] = 1.0  # certain of its label
    logits[5, 9] = 500.0  # certain of another one
    labels = torch.tensor([0, int(logits[1].argmax()), 2, 299, 7, 3], device=place.device)
    check_row_kernel(place, logits[[0, 1, 2, 4, 5]], labels[[0, 1, 2, 4, 5]], torch.bfloat16)
    check_row_kernel(place, logits[3:4], labels[3:4], torch.bfloat16, grad_rows=0)


def run_rows(
    place: Place,
    logits: Tensor,  # [C, V] bfloat16 or float16
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    temperature: float = 1.0,
    grad_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logps, lse, gradients or logits) of the kernel."""
    C, V = logits.shape
    buffer = torch.full((C, (V + 7) // 8 * 8), NAN, dtype=logits.dtype, device=place.device)
    buffer[:, :V] = logits
    logps, lse = torch.full((2, C), NAN, device=place.device).unbind(0)
    place.launch(
        "row_kernel",
        dtype=str(logits.dtype).removeprefix("torch."),
        logits=buffer,
        stride=buffer.shape[1],
        rows=C,
        vocab=V,
        grad_rows=C if grad_rows is None else grad_rows,
        labels=labels,
        bias=bias,
        softcap=softcap,
        temperature=temperature,
        logps=logps,
        lse=lse,
    )
    return logps, lse, buffer[:, :V]


@everywhere
@pytest.mark.parametrize("V", [64, 20007])
def test_row_kernel_does_not_hide_nan_or_infinity(place: Place, V: int) -> None:
    logits = normal(place, 8, V).bfloat16()
    logits[1, 40] = NAN
    logits[2, 40] = INF
    logits[3, 1] = NAN  # the label
    logits[4, 1] = INF
    logits[5, 1] = -INF  # a label that cannot be: log 0
    logits[6] = -INF
    labels = torch.ones(8, dtype=torch.int64, device=place.device)
    logps, lse, gradient = run_rows(place, logits, labels)
    assert logps[[0, 7]].isfinite().all() and gradient[[0, 7]].isfinite().all()
    for row in (1, 2, 3, 4, 6):
        assert logps[row].isnan(), row
        assert not gradient[row].isfinite().all(), row
    assert logps[5] == -INF and abs(lse[5] - logits[5].double().logsumexp(0)) <= 1e-5
    assert gradient[5].isfinite().all() and gradient[5, 1] == 1


def shifted_truth(z: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """As row_truth, for rows whose differences float64 cannot represent at their size."""
    top = z.double().amax(1, keepdim=True)
    logps, lse, gradient = row_truth(z.double() - top, labels, None, 0.0, temperature)
    return logps, lse + top.squeeze(1) / temperature, gradient


@everywhere
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("V", [65, 20007])
def test_row_kernel_on_logits_that_float32_can_hardly_scale(
    place: Place, V: int, temperature: float
) -> None:
    """Products with log2(e) overflow or have rounding errors too large for exp2; other rows stay
    correct."""
    C, lowest = 18, torch.finfo(torch.bfloat16).min
    logits = normal(place, C, V)
    logits[1:4] = -3e38
    logits[2, 3] = -2.5e38  # the label
    logits[3, 50] = -2.5e38  # another one
    logits[5, [3, 50]] = 3e38  # the label and another one
    logits[6, 50] = 2.3e38
    logits[7, V // 2 :] = lowest  # a masked vocabulary
    logits[8, :50] = lowest  # and the label masked as well
    logits[9] = lowest
    logits[10] = -INF
    logits[10, [3, 60]] = lowest
    logits[12, V // 2 :] = -1e10
    logits[13] = -1.2e10
    logits[14] = -3e9
    logits[14, [3, 60]] = -2e9
    logits[15, [3, 60, 61]] = 7e9
    logits[16, 5:] = -1e30
    labels = torch.full((C,), 3, device=place.device)
    before = logits.bfloat16()
    found = run_rows(place, before, labels, temperature=temperature)
    logps, lse, gradient = shifted_truth(before, labels, temperature)
    for got, want in ((found[0].double(), logps), (found[1].double(), lse)):
        beyond = want.abs() > torch.finfo(torch.float32).max  # a finite number in float64 only
        assert (got[beyond] == want[beyond].sign() * INF).all()
        scale = torch.where(want.abs() > 1e6, want.abs(), 10)
        assert ((got - want).abs() <= 2e-6 * scale)[~beyond].all()
    eps = torch.finfo(torch.bfloat16).eps
    assert ((found[2].double() - gradient).abs() <= eps * gradient.abs() + 1e-7).all()
    ordinary = [0, 4, 11, 17]
    alone = run_rows(place, before[ordinary], labels[ordinary], temperature=temperature)
    for got, want in zip(alone, found, strict=True):
        assert torch.equal(got, want[ordinary])


@everywhere
def test_row_kernel_takes_a_vocabulary_masked_by_a_bias(place: Place) -> None:
    C, V = 4, 20007
    logits = normal(place, C, V).bfloat16()
    bias = normal(place, V, seed=1)
    bias[V // 3 :] = torch.finfo(torch.float32).min
    labels = torch.tensor([5, 17, V // 3 - 1, -1], device=place.device)
    logps, lse, gradient = run_rows(place, logits, labels, bias=bias)
    want_logps, want_lse, want = row_truth(logits, labels, bias, 0.0, 1.0)
    assert ((logps - want_logps).abs() <= 2e-6 * 12).all()
    assert ((lse - want_lse).abs() <= 2e-6 * 12).all()
    eps = torch.finfo(torch.bfloat16).eps
    assert ((gradient.double() - want).abs() <= eps * want.abs() + 1e-9).all()
    assert (gradient[:, V // 3 :] == 0).all()


@everywhere
def test_row_kernel_keeps_the_slope_where_the_soft_cap_is_reached(place: Place) -> None:
    """1 - tanh^2 cancels completely for |x| > 9 caps; the gradient stays accurate."""
    C, V, cap = 3, 1003, 5.0
    logits = torch.linspace(-30, 30, C * V, device=place.device).mul(cap / 2).view(C, V).bfloat16()
    logits[0, :2] = torch.tensor([1e-3, -2e-2], device=place.device)  # near zero, by the series
    labels = torch.tensor([0, 1, V - 1], device=place.device)
    _, _, gradient = run_rows(place, logits, labels, softcap=cap, temperature=0.8)
    _, _, want = row_truth(logits, labels, None, cap, 0.8)
    # In float64 the truth's own 1 - tanh^2 has three digits left where the slope is 1e-13.
    seen = want.abs() > 1e-16
    assert seen.sum() > C * V / 2 and want[seen].abs().min() < 1e-14
    error = (gradient.double() - want).abs()[seen] / want.abs()[seen]
    assert error.max() <= torch.finfo(torch.bfloat16).eps / 2 + 1e-3


@everywhere
@pytest.mark.parametrize("V", [131, 20007])
@pytest.mark.parametrize("softcap", [0.0, 9.0])
def test_policy_and_reference_rows_have_the_same_bits(place: Place, V: int, softcap: float) -> None:
    logits, labels = (3 * normal(place, 7, V)).bfloat16(), labels_for(place, 7, V)
    options = {"softcap": softcap, "temperature": 0.9}
    policy = run_rows(place, logits, labels, **options)
    reference = run_rows(place, logits, labels, grad_rows=0, **options)
    assert torch.equal(policy[0], reference[0]) and torch.equal(policy[1], reference[1])
    assert torch.equal(reference[2], logits)

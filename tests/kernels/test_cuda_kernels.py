"""The CUDA kernels against float64: on a GPU where there is one, and always in the emulator.

The emulator runs the source of csrc/cuda and completes every asynchronous operation as late as
allowed. It models neither timing nor undocumented behaviour, so a pass there is not a pass on a
GPU. `pytest -m gpu tests/kernels/test_cuda_kernels.py` runs these and larger shapes on a device.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cpo_fast.loss import cuda
from cpo_fast.loss.options import LossOptions
from tests.kernels.cuda_places import (
    HOPPER,
    NAN,
    VARIANTS,
    Place,
    build_emulated,
    emulated,
    emulated_log,
    everywhere,
    labels_for,
    load_emulated,
    needs_hopper,
    normal,
    on_hopper,
    place,
    row_truth,
    the_gpu,
    toolkit_include,
)
from tests.kernels.test_cuda_python import check, inputs, run

pytestmark = pytest.mark.slow
__all__ = ["emulated", "place"]  # fixtures


# --- linear LSE -----------------------------------------------------------------------------------


def linear(
    place: Place,
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,
    temperature: float = 1.0,
    offsets: Tensor | None = None,
) -> dict[str, Tensor]:
    (T, D), V = hidden.shape, weight.shape[0]
    size = place.module.linear_workspace_bytes(rows=T, vocab=V)
    outputs = torch.full((3, T), NAN, device=place.device)
    found = dict(zip(("logps", "lse", "factors"), outputs, strict=True))
    stride = (V + 7) // 8 * 8 + 8
    exp = torch.full((T, stride), NAN, dtype=torch.bfloat16, device=place.device)
    with_exp = offsets is not None
    place.launch(
        "linear_lse",
        dtype=str(hidden.dtype).removeprefix("torch."),
        hidden=hidden,
        hidden_stride=hidden.stride(0),
        weight=weight,
        weight_stride=weight.stride(0),
        rows=T,
        vocab=V,
        width=D,
        labels=labels,
        temperature=temperature,
        logps=found["logps"],
        lse=found["lse"],
        workspace=torch.full((size,), 255, dtype=torch.uint8, device=place.device),
        exp=exp if with_exp else None,
        exp_stride=stride,
        offsets=offsets,
        factors=found["factors"] if with_exp else None,
    )
    if with_exp:
        assert (exp[(labels < 0) | (labels >= V), :V] == 0).all()
        assert (exp[:, V : (V + 7) // 8 * 8] == 0).all()
        assert exp[:, (V + 7) // 8 * 8 :].isnan().all()
        found["gradient"] = exp[:, :V].double() * found["factors"].double()[:, None]
    return found


def check_linear(
    place: Place,
    T: int,
    V: int,
    D: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    temperature: float = 1.0,
    offsets: Tensor | None = None,
    spread: float = 2.0,
) -> dict[str, Tensor]:
    hidden = normal(place, T, D).to(dtype)
    weight = (spread / D**0.5 * normal(place, V, D, seed=1)).to(dtype)
    labels = labels_for(place, T, V)
    found = linear(place, hidden, weight, labels, temperature, offsets)
    z = hidden.double() @ weight.double().t()
    logps, lse, gradient = row_truth(z, labels, None, 0.0, temperature)
    scale = 1 + lse.abs() + z.abs().amax(1) / temperature
    assert (found["logps"] <= 0).all()
    assert ((found["logps"].double() - logps).abs() <= 3e-6 * scale).all()
    assert ((found["lse"].double() - lse).abs() <= 3e-6 * scale).all()
    if offsets is not None:
        exponent = 2e-6 * (scale + 60)[:, None]
        allowed = gradient.abs() * (torch.finfo(torch.bfloat16).eps / 2 * 1.01 + exponent) + 1e-7
        assert ((found["gradient"] - gradient).abs() <= allowed).all()
    return found


SHAPES = [(1, 1, 8), (3, 255, 72), (129, 257, 64), (300, 700, 136), (520, 513, 40)]


@on_hopper
@pytest.mark.parametrize(("T", "V", "D"), SHAPES)
def test_linear_lse(place: Place, T: int, V: int, D: int) -> None:
    needs_hopper(place)
    check_linear(place, T, V, D, temperature=0.7)


@on_hopper
def test_linear_lse_float16(place: Place) -> None:
    needs_hopper(place)
    check_linear(place, 140, 300, 72, torch.float16)


@on_hopper
@pytest.mark.parametrize(("T", "V", "D"), SHAPES)
def test_linear_exp(place: Place, T: int, V: int, D: int) -> None:
    needs_hopper(place)
    near = check_linear(place, T, V, D)["lse"] + normal(place, T, seed=2)
    check_linear(place, T, V, D, offsets=near)


@on_hopper
def test_linear_exp_repairs_offsets_out_of_reach(place: Place) -> None:
    needs_hopper(place)
    T, V, D = 530, 300, 40
    offsets = check_linear(place, T, V, D)["lse"].clone()
    offsets[:4] += torch.tensor([59.0, -59.0, 0.0, 0.0], device=place.device)
    check_linear(place, T, V, D, offsets=offsets)  # still in reach
    offsets[2] += 300  # everything vanishes: the first row pair is done again
    offsets[514] -= 300  # everything overflows: the third; the second is left as it is
    offsets[515] = NAN
    check_linear(place, T, V, D, offsets=offsets)


@on_hopper
def test_linear_exp_of_ignored_rows_is_zero_whatever_they_hold(place: Place) -> None:
    needs_hopper(place)
    T, V, D = 140, 300, 40
    hidden = normal(place, T, D).bfloat16()
    weight = normal(place, V, D, seed=1).bfloat16()
    labels = labels_for(place, T, V)
    ignored = (labels < 0) | (labels >= V)
    offsets = linear(place, hidden, weight, labels)["lse"]
    want = linear(place, hidden, weight, labels, offsets=offsets)
    hidden[ignored] = NAN
    offsets[ignored] = NAN
    found = linear(place, hidden, weight, labels, offsets=offsets)
    assert (found["gradient"][ignored] == 0).all() and (found["logps"][ignored] == 0).all()
    for name in ("logps", "gradient"):
        assert torch.equal(found[name][~ignored], want[name][~ignored])


@on_hopper
def test_linear_exp_of_very_low_logits(place: Place) -> None:
    """exp(-offset) alone overflows, and lanes without a column have nothing to multiply it with."""
    needs_hopper(place)
    T, V, D = 3, 5, 8
    hidden = torch.ones(T, D, device=place.device).bfloat16()
    weight = torch.full((V, D), -20.0, device=place.device).bfloat16()  # logits -160
    labels = torch.tensor([0, 1, 4], device=place.device)
    offsets = torch.full((T,), -158.0, device=place.device)
    found = linear(place, hidden, weight, labels, offsets=offsets)
    want = torch.full((T, V), -1 / V, dtype=torch.float64, device=place.device)
    want[torch.arange(T), labels] += 1
    assert ((found["gradient"] - want).abs() <= 5e-3).all()


@pytest.mark.parametrize("place", [HOPPER], indirect=True)
def test_exp_needs_three_launches_and_the_last_one_mostly_nothing(place: Place) -> None:
    T, V, D = 300, 300, 40
    hidden, weight = normal(place, T, D).bfloat16(), normal(place, V, D, seed=1).bfloat16()
    labels = labels_for(place, T, V)
    offsets = linear(place, hidden, weight, labels)["lse"]
    emulated_log(place.module)
    linear(place, hidden, weight, labels, offsets=offsets)
    first, combine, last = emulated_log(place.module)
    assert first[0] == last[0] == "linear_kernel" and combine[0] == "combine"
    assert first[1] > 0 and first[2] > 0
    assert last[1:] == (0, 0), "no copy, no barrier of the cluster"
    offsets[299] += 100
    linear(place, hidden, weight, labels, offsets=offsets)
    again = emulated_log(place.module)
    assert len(again) == 3 and 0 < again[2][1] < again[0][1], "one row pair of two"


@pytest.mark.parametrize("place", [HOPPER], indirect=True)
def test_a_fresh_thread_gets_a_context(place: Place) -> None:
    """Encoding tensor maps needs a context; autograd's threads start without one."""
    hidden, weight = normal(place, 4, 8).bfloat16(), normal(place, 9, 8, seed=1).bfloat16()
    labels = labels_for(place, 4, 9)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(linear, place, hidden, weight, labels).result()
    assert torch.equal(found["logps"], linear(place, hidden, weight, labels)["logps"])


@pytest.mark.complete
def test_variants_for_tuning_give_the_same(tmp_path: Path) -> None:
    """All constants together, each at its value farthest from the default."""
    include = toolkit_include()
    if shutil.which("g++") is None or include is None:
        pytest.skip("the emulator needs g++ and CUDA's headers (a toolkit's or triton's)")
    macros = {macro for variant in VARIANTS for macro in variant} - {"-DCPO_LAG=0"}
    module = load_emulated(build_emulated(tmp_path, include, *macros))
    place = Place(module, torch.device("cpu"), {"device": 0, "stream": 0})
    for T, V, D in [(1, 1, 8), (300, 1700, 136), (700, 257, 24)]:
        offsets = check_linear(place, T, V, D)["lse"] + normal(place, T, seed=2)
        offsets[T // 2] += 300
        check_linear(place, T, V, D, offsets=offsets)


@on_hopper
def test_linear_bits_depend_neither_on_the_batch_nor_on_exp(place: Place) -> None:
    needs_hopper(place)
    T, V, D = 260, 600, 40
    hidden = normal(place, T, D).bfloat16()
    weight = normal(place, V, D, seed=1).bfloat16()
    labels = labels_for(place, T, V)
    whole = linear(place, hidden, weight, labels)
    again = linear(place, hidden, weight, labels, offsets=whole["lse"])
    some = [259, 5, 130]
    alone = linear(place, hidden[some].contiguous(), weight, labels[some].contiguous())
    for name in ("logps", "lse"):
        assert torch.equal(whole[name], again[name])
        assert torch.equal(whole[name][some], alone[name])


# --- small kernels --------------------------------------------------------------------------------


@everywhere
def test_segment_sums(place: Place) -> None:
    T, S = 1000, 5
    logps = normal(place, T)
    generator = torch.Generator().manual_seed(3)
    segments = (torch.randint(S, (T,), generator=generator) - 1).to(place.device)  # S - 1 is empty
    labels = torch.arange(T, device=place.device)
    labels[::3] = -100
    sums = torch.full((S,), NAN, dtype=torch.float64, device=place.device)
    counts = torch.full((S,), -1, dtype=torch.int64, device=place.device)
    place.launch(
        "segment_sums",
        logps=logps,
        segment_ids=segments,
        labels=labels,
        ignore_index=-100,
        tokens=T,
        segments=S,
        sums=sums,
        counts=counts,
    )
    for s in range(S):
        mine = segments == s
        assert abs(sums[s] - logps[mine].double().sum()) <= 1e-9
        assert counts[s] == (mine & (labels != -100)).sum()


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_row_scale(place: Place, dtype: torch.dtype) -> None:
    rows = normal(place, 70, 264).to(dtype)
    coefficients = normal(place, 70, seed=1)
    coefficients[4] = 0
    rows[4] = NAN
    out = torch.full_like(rows, NAN)
    place.launch(
        "row_scale",
        dtype=str(dtype).removeprefix("torch."),
        rows=rows,
        coefficients=coefficients,
        out=out,
        tokens=70,
        width=264,
    )
    want = (rows.float() * coefficients[:, None]).to(dtype)
    want[4] = 0
    assert torch.equal(out, want)


# --- through the primitive ------------------------------------------------------------------------


def on_place(place: Place, case: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(place.device) if isinstance(v, Tensor) else v for k, v in case.items()}


@on_hopper
@pytest.mark.parametrize("path", ["rows", "fused"])
def test_log_probs_and_gradients(place: Place, path: str) -> None:
    needs_hopper(place)
    case = on_place(place, inputs(14, 331, 24, torch.bfloat16, bias=False))
    check(case, True, path, temperature=1.2)
    case["ref_hidden"] = case["hidden"]
    found = run(cuda, case, False, path=path)
    assert torch.equal(found["logps"], found["ref_logps"])


LARGE = [(1000, 50257, 768), (2048, 152064, 3584), (16384, 151936, 896)]  # the last: T V > 2^31


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "V", "D"), LARGE)
@pytest.mark.parametrize("path", ["rows", "fused"])
def test_large_shapes_on_a_gpu(path: str, T: int, V: int, D: int) -> None:
    place = the_gpu()
    needs_hopper(place)
    generator = torch.Generator(place.device).manual_seed(1)
    hidden, ref = (
        torch.randn(T, D, device=place.device, generator=generator).bfloat16() for _ in range(2)
    )
    weight = torch.randn(V, D, device=place.device, generator=generator).mul(2 / D**0.5).bfloat16()
    labels = torch.randint(V, (T,), device=place.device, generator=generator)
    labels[::9] = -100
    hidden.requires_grad_()
    with cuda.forced_path(path):
        logps, ref_logps = cuda.token_logps(hidden, weight, labels, None, ref, LossOptions())
    upstream = torch.randn(T, device=place.device, generator=generator)
    logps.backward(upstream)
    assert hidden.grad is not None and ref_logps is not None
    sample = torch.arange(0, T, max(T // 64, 1), device=place.device)
    for rows, found in ((hidden.detach(), logps.detach()), (ref, ref_logps)):
        z = rows[sample].double() @ weight.double().t()
        truth, _, gradient = row_truth(z, labels[sample], None, 0.0, 1.0)
        assert (found[sample] - truth).abs().max() <= (1e-4 if path == "fused" else 0.1)
        if rows is not ref:
            want = (gradient @ weight.double()) * upstream[sample, None].double()
            error = (hidden.grad[sample] - want).abs().max()
            assert error <= 0.02 * want.abs().max()
    assert (logps[::9] == 0).all() and (hidden.grad[::9] == 0).all()

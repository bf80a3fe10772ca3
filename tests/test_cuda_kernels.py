"""The CUDA kernels against float64: on a GPU where there is one, and always in the emulator.

The emulator runs the source of csrc/cuda with everything asynchronous as late as it may be; it
knows neither the hardware's timing nor undocumented behaviour, so a pass there is not a pass on a
GPU. `pytest -m gpu tests/test_cuda_kernels.py` runs the same tests and larger shapes on a device.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_places import Place, build_emulated, toolkit_include
from test_cuda_python import check, inputs, run
from torch import Tensor

from cpo_fast.loss import cuda, cuda_launch

pytestmark = pytest.mark.slow
HOPPER, AMPERE = "emulated-hopper", "emulated-ampere"
GPU = pytest.param("gpu", marks=pytest.mark.gpu)
NAN = float("nan")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    include = toolkit_include()
    if shutil.which("g++") is None or include is None:
        pytest.skip("the emulator needs g++ and CUDA's headers (a toolkit's or triton's)")
    return build_emulated(tmp_path_factory.mktemp("emulated"), include)


def the_gpu() -> Place:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda", 0)
    if cuda.obstacle(device):
        pytest.skip("cpo_fast._cuda is not built, or the device is not of capability 8.x or 9.0")
    site = {"device": 0, "stream": torch.cuda.current_stream(0).cuda_stream}
    return Place(cuda_launch.kernels(), device, site)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    if request.param == "gpu":
        yield the_gpu()
    else:
        module = request.getfixturevalue("emulated")
        site = {"device": 0 if request.param == HOPPER else 1, "stream": 0}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_launch, "kernels", lambda: module)
            patch.setattr(cuda_launch, "site", lambda tensor: site)
            yield Place(module, torch.device("cpu"), site)


def needs_hopper(place: Place) -> None:
    if place.device.type == "cuda" and torch.cuda.get_device_capability(0) != (9, 0):
        pytest.skip("linear_lse needs compute capability 9.0")


everywhere = pytest.mark.parametrize("place", [HOPPER, AMPERE, GPU], indirect=True)
on_hopper = pytest.mark.parametrize("place", [HOPPER, GPU], indirect=True)


def normal(place: Place, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(place.device)


def labels_for(place: Place, T: int, V: int) -> Tensor:
    """Random ones, some ignored, and the corners."""
    labels = torch.randint(V, (T,), generator=torch.Generator().manual_seed(T + V))
    labels[3::5] = -1
    labels[0] = V - 1
    if T > 1:
        labels[1] = 0
    if T > 2:
        labels[2] = V  # out of range: ignored, and nothing read or written there
    return labels.to(place.device)


# --- row kernel -----------------------------------------------------------------------------------


def row_truth(
    z: Tensor, labels: Tensor, bias: Tensor | None, softcap: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """float64 (logps, lse, gradient) of logits z [C, V]."""
    raw = z.double().requires_grad_()
    with torch.enable_grad():
        final = raw if bias is None else raw + bias.double()
        if softcap:
            final = softcap * torch.tanh(final / softcap)
        final = final / temperature
        lse = final.logsumexp(1)
        scored = (labels >= 0) & (labels < z.shape[1])
        picked = final.gather(1, labels.where(scored, 0)[:, None]).squeeze(1)
        logps = (picked - lse).where(scored, 0)
        (gradient,) = torch.autograd.grad(logps.sum(), raw)
    return logps.detach(), lse.detach(), gradient


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


@everywhere
def test_row_kernel_does_not_hide_a_nan(place: Place) -> None:
    buffer = normal(place, 2, 64).bfloat16()
    buffer[1, 40] = NAN
    logps = torch.zeros(2, device=place.device)
    labels = torch.tensor([1, 1], device=place.device)
    options = {"bias": None, "softcap": 0.0, "temperature": 1.0, "lse": None, "grad_rows": 2}
    place.launch(
        "row_kernel",
        dtype="bfloat16",
        logits=buffer,
        stride=64,
        rows=2,
        vocab=64,
        labels=labels,
        logps=logps,
        **options,
    )
    assert logps[0].isfinite() and logps[1].isnan()


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
    options = {"softcap": None, "temperature": 1.0, "ignore_index": -100, "path": path}
    logps, ref_logps = cuda.token_logps(hidden, weight, labels, None, ref, **options)
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

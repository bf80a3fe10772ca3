"""The fused kernel of csrc/cpu with every available engine; without AMX, its tile instructions are
emulated."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cpo_fast.loss import available_impls, linear_logprobs
from cpo_fast.testing.error_rule import assert_as_good, norm_of_error

if "cpu" not in available_impls("cpu"):
    pytest.skip("cpo_fast._cpu is not built", allow_module_level=True)

from cpo_fast import _cpu
from cpo_fast.loss import cpu, cpu_rows
from cpo_fast.loss.options import LossOptions
from tests.loss.native import check_operators, count_vendor_flops, score

ROOT = Path(__file__).parents[2]
ENGINES = [engine for engine in cpu_rows.ENGINES if _cpu.fused_available(engine)]
if not ENGINES:
    pytest.skip("this processor has no AVX512-BF16", allow_module_level=True)


@pytest.fixture(params=ENGINES, autouse=True)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu_rows.forced_isa(request.param):
        yield request.param


def tensors(n: int, D: int, V: int, scale: float, seed: int = 5) -> tuple[Tensor, ...]:
    """hidden, another hidden, weight, bias, labels (some ignored), coefficients."""
    g = torch.Generator().manual_seed(seed)
    hidden, other = (torch.randn(n, D, generator=g).bfloat16() for _ in range(2))
    weight = (scale * torch.randn(V, D, generator=g)).bfloat16()
    bias = torch.randn(V, generator=g).bfloat16()
    labels = torch.randint(0, V, (n,), generator=g)
    labels[1::7] = -100
    return hidden, other, weight, bias, labels, torch.randn(n, generator=g)


def assert_exact(ours: list[Tensor], eager: list[Tensor], exact: list[Tensor]) -> None:
    """Log-probs are float32 sums; gradients follow the error rule."""
    assert (ours[0] <= 0).all()
    assert (ours[0] - exact[0]).abs().max() < 1e-4
    for got, theirs, want in zip(ours[1:], eager[1:], exact[1:], strict=True):
        band = 2**-8 * float(want.norm())
        assert_as_good(got, theirs, want, band, measure=norm_of_error)


SIZES = [(300, 40, 4099), (33, 600, 700), (1, 7, 40)]  # several chunks and slots; long sums
OPTIONS = [
    {},
    {"softcap": 5.0},
    {"bias": True, "temperature": 0.8},
    {"bias": True, "softcap": 20.0},
]


@pytest.mark.parametrize("scale", [0.05, 0.5, 3.0])
def test_logps_of_both_sides_equal_float64(scale: float) -> None:
    hidden, other, weight, _, labels, _ = tensors(*SIZES[0], scale)
    got = cpu.token_logps(hidden, weight, labels, None, other, LossOptions(temperature=0.8))
    for h, logps in zip((hidden, other), got, strict=True):
        want = linear_logprobs(h.double(), weight.double(), labels, temperature=0.8)
        assert (logps <= 0).all()
        assert (logps - want).abs().max() < 1e-4


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("fits", [True, False], ids=["kept", "recomputed"])
def test_trained_head_is_exact(
    sizes: tuple[int, int, int],
    options: dict[str, float],
    fits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden, _, weight, bias, labels, coef = tensors(*sizes, scale=0.3)
    options = dict(options)
    leaves = (hidden, weight, bias) if options.pop("bias", False) else (hidden, weight)
    exact = score(leaves, labels, coef, torch.float64, "reference", **options)
    eager = score(leaves, labels, coef, torch.bfloat16, "reference", **options)
    if not fits:
        monkeypatch.setattr(cpu, "fused_engine", lambda *_: cpu_rows._engine)
        monkeypatch.setattr(cpu, "limit", lambda device: 100 * sizes[0] * 2)  # blocks of 100
    assert_exact(score(leaves, labels, coef, torch.bfloat16, "cpu", **options), eager, exact)


@pytest.mark.parametrize("softcap", [None, 1000.0])
def test_offset_is_raised_as_logits_grow(softcap: float | None) -> None:
    """Every vocabulary block exceeds the earlier ones: sums and stored E are rescaled often."""
    g = torch.Generator().manual_seed(6)
    weight = torch.randn(6000, 64, generator=g) * 0.1
    weight[:, 0] = torch.linspace(0, 60, 6000)
    hidden = torch.randn(40, 64, generator=g)
    hidden[:, 0] = torch.linspace(-4, 4, 40)
    leaves = (hidden.bfloat16(), weight.bfloat16())
    labels, coef = torch.randint(0, 6000, (40,), generator=g), torch.ones(40)
    labels[-20:] = 5999 - torch.arange(20)
    options = {} if softcap is None else {"softcap": softcap}
    ours = score(leaves, labels, coef, torch.bfloat16, "cpu", **options)
    exact = score(leaves, labels, coef, torch.float64, "reference", **options)
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-6, atol=1e-4)
    for got, want in zip(ours[1:], exact[1:], strict=True):
        assert (got - want).norm() < 0.01 * want.norm()


def test_label_far_below_the_rest() -> None:
    """The labels are 200 nats below the other half of the vocabulary: the offset of their part
    cannot represent the sum over the others, which dW needs at the label."""
    hidden, _, weight, _, _, coef = tensors(40, 32, 6000, 0.1)
    hidden[:, 0] = 1
    weight[:, 0] = torch.where(torch.arange(6000) < 3000, -100, 100).bfloat16()
    labels = torch.arange(40) * 70
    exact = score((hidden, weight), labels, coef, torch.float64, "reference")
    ours = score((hidden, weight), labels, coef, torch.bfloat16, "cpu")
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-6, atol=1e-4)
    for got, want in zip(ours[1:], exact[1:], strict=True):
        assert got.isfinite().all()
        assert (got - want).norm() < 0.01 * want.norm()


def test_head_gradient_does_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, _, weight, bias, labels, coef = tensors(48, 16, 500, 1.0)
    monkeypatch.setattr(cpu, "fused_engine", lambda *_: cpu_rows._engine)

    def grads(room: int) -> list[Tensor]:
        monkeypatch.setattr(cpu, "limit", lambda device: room)
        return score((hidden, weight, bias), labels, coef, torch.bfloat16, "cpu")

    whole = grads(2 * 48 * 499)  # one row too few to be kept
    for a, b in zip(whole, grads(2 * 48 * 100), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("head", "grad", "reference", "fits", "count"),
    [
        (False, False, False, True, 1),
        (False, False, True, True, 2),
        (False, True, False, True, 2),
        (False, True, True, True, 3),
        (True, True, False, True, 3),
        (True, True, True, True, 4),
        (True, True, True, False, 5),
        (True, False, False, True, 2),
    ],
)
def test_matrix_products(
    head: bool,
    grad: bool,
    reference: bool,
    fits: bool,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Products of T x V x D: vendor GEMMs by the profiler, the kernel by its arguments."""
    n, D, V = 64, 16, 400
    done = []

    class Counting:
        def fused_fold(self, engine: str, hidden: int, ref: int, *rest: int) -> None:
            done.append((1 + (ref != 0) + (rest[-6] != 0)) * rest[3] * rest[4] * rest[5])
            _cpu.fused_fold(engine, hidden, ref, *rest)

        def fused_residual(self, *arguments: int) -> None:
            done.append(arguments[-6] * arguments[-5] * arguments[-4])  # n, D, cols
            _cpu.fused_residual(*arguments)

        def __getattr__(self, name: str) -> object:
            return getattr(_cpu, name)

    monkeypatch.setattr(cpu_rows, "_cpu", Counting())
    if not fits:
        monkeypatch.setattr(cpu, "fused_engine", lambda *_: cpu_rows._engine)
        monkeypatch.setattr(cpu, "limit", lambda device: 2 * n * V - 1)
    hidden, other, weight, *_ = tensors(n, D, V, 1.0)
    given = (hidden, weight, torch.arange(n), torch.arange(n) // 16)
    vendor = count_vendor_flops(
        (*given, torch.tensor([[0, 1], [2, 3]])), other if reference else None, head=head, grad=grad
    )
    assert (vendor + 2 * sum(done)) / (2 * n * V * D) == pytest.approx(count)


def test_threads_change_no_bits_and_denormals_stay_enabled() -> None:
    hidden, _, weight, bias, labels, coef = tensors(*SIZES[0], 0.3)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(score((hidden, weight, bias), labels, coef, torch.bfloat16, "cpu")[:2])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert (torch.tensor([1e-40]) * 0.5).item() > 0


def test_fused_kernel_needs_enough_workspace(engine: str) -> None:
    assert cpu_rows.fused_engine(torch.bfloat16, 3584, 2**28) == engine
    assert cpu_rows.fused_engine(torch.bfloat16, 3584, 2**20) == ""
    assert cpu_rows.fused_engine(torch.float32, 64, 2**28) == ""


def test_opcheck(engine: str) -> None:
    hidden, other, weight, bias, labels, coef = tensors(48, 16, 500, 1.0)
    args = (hidden.requires_grad_(), weight.requires_grad_(), labels, bias.requires_grad_(), other)
    check_operators(args, coef, head=True, engine=engine, slots=8)


EMULATED = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("cpo_fast._cpu", sys.argv[1])
sys.modules["cpo_fast._cpu"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["cpo_fast._cpu"])
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "amx", sys.argv[2]]))
"""


@pytest.mark.slow
@pytest.mark.skipif("amx" in ENGINES, reason="the tests above run it, emulated or not")
def test_amx_in_an_emulator(tmp_path: Path) -> None:
    """The code of the AMX engine with its tile instructions in plain C++."""
    pybind11 = pytest.importorskip("pybind11")
    module = tmp_path / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    folders = [sysconfig.get_path("include"), pybind11.get_include(), str(ROOT / "csrc" / "cpu")]
    subprocess.run(
        ["g++", "-O1", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-w"]
        + [
            "-DCPO_FAST_EMULATED_TILES",
            "-include",
            str(ROOT / "tests/kernels/tile_emulator/tiles.h"),
        ]
        + [f"-I{folder}" for folder in folders]
        + [str(source) for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
        + ["-o", str(module)],
        check=True,
    )
    out = subprocess.run(
        [sys.executable, "-c", EMULATED, str(module), __file__],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert out.returncode == 0, out.stdout[-4000:] + out.stderr[-2000:]
    assert " passed" in out.stdout

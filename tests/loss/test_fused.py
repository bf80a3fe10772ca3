"""The fused kernel of csrc/cpu with every engine that runs here; without AMX, in an emulator of its
tile instructions."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cpo_fast.loss import available_impls, cpo_loss, linear_logprobs
from cpo_fast.testing.error_rule import assert_as_good, norm_of_error

if "cpu" not in available_impls("cpu"):
    pytest.skip("cpo_fast._cpu is not built", allow_module_level=True)

from cpo_fast import _cpu
from cpo_fast.loss import cpu, cpu_rows
from cpo_fast.loss.operators import Plan
from cpo_fast.loss.options import LossOptions

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


def run(
    leaves: tuple[Tensor, ...],  # hidden, weight, perhaps bias
    labels: Tensor,
    coef: Tensor,
    dtype: torch.dtype,
    impl: str,
    **options: float,
) -> list[Tensor]:
    """Log-probs and gradients of all leaves, as float64."""
    inputs = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    bias = inputs[2] if len(inputs) > 2 else None
    logps = linear_logprobs(*inputs[:2], labels, bias=bias, impl=impl, **options)
    grads = torch.autograd.grad((logps * coef).sum(), inputs)
    return [x.detach().double() for x in (logps, *grads)]


def assert_exact(ours: list[Tensor], eager: list[Tensor], exact: list[Tensor]) -> None:
    """Log-probs of float32 sums; gradients no worse than eager's."""
    assert (ours[0] <= 0).all()
    assert (ours[0] - exact[0]).abs().max() < 1e-4
    for got, theirs, want in zip(ours[1:], eager[1:], exact[1:], strict=True):
        band = 2**-8 * float(want.norm())
        assert_as_good(got, theirs, want, band, measure=norm_of_error)


SIZES = [(300, 40, 4099), (33, 600, 700), (1, 7, 40)]  # chunks, slots and ragged ends; long sums
OPTIONS = [
    {},
    {"softcap": 5.0},
    {"bias": True, "temperature": 0.8},
    {"bias": True, "softcap": 20.0},
]


@pytest.mark.parametrize("scale", [0.05, 0.5, 3.0])
def test_logps_of_both_sides_are_those_of_float64(scale: float) -> None:
    hidden, other, weight, _, labels, _ = tensors(*SIZES[0], scale)
    got = cpu.token_logps(hidden, weight, labels, None, other, LossOptions(temperature=0.8))
    for h, logps in zip((hidden, other), got, strict=True):
        want = linear_logprobs(h.double(), weight.double(), labels, temperature=0.8)
        assert (logps <= 0).all()
        assert (logps - want).abs().max() < 1e-4


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("fits", [True, False], ids=["kept", "computed again"])
def test_trained_head(
    sizes: tuple[int, int, int],
    options: dict[str, float],
    fits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden, _, weight, bias, labels, coef = tensors(*sizes, scale=0.3)
    options = dict(options)
    leaves = (hidden, weight, bias) if options.pop("bias", False) else (hidden, weight)
    exact = run(leaves, labels, coef, torch.float64, "reference", **options)
    eager = run(leaves, labels, coef, torch.bfloat16, "reference", **options)
    if not fits:
        monkeypatch.setattr(cpu, "fused_engine", lambda *_: cpu_rows._engine)
        monkeypatch.setattr(cpu, "limit", lambda device: 100 * sizes[0] * 2)  # blocks of 100
    assert_exact(run(leaves, labels, coef, torch.bfloat16, "cpu", **options), eager, exact)


@pytest.mark.parametrize("softcap", [None, 1000.0])
def test_offset_is_raised_as_logits_grow(softcap: float | None) -> None:
    """Each vocabulary block exceeds all earlier ones: sums and stored E are rescaled many times."""
    g = torch.Generator().manual_seed(6)
    weight = torch.randn(6000, 64, generator=g) * 0.1
    weight[:, 0] = torch.linspace(0, 60, 6000)
    hidden = torch.randn(40, 64, generator=g)
    hidden[:, 0] = torch.linspace(-4, 4, 40)
    leaves = (hidden.bfloat16(), weight.bfloat16())
    labels, coef = torch.randint(0, 6000, (40,), generator=g), torch.ones(40)
    labels[-20:] = 5999 - torch.arange(20)
    options = {} if softcap is None else {"softcap": softcap}
    ours = run(leaves, labels, coef, torch.bfloat16, "cpu", **options)
    exact = run(leaves, labels, coef, torch.float64, "reference", **options)
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-6, atol=1e-4)
    for got, want in zip(ours[1:], exact[1:], strict=True):
        assert (got - want).norm() < 0.01 * want.norm()


def test_label_far_below_the_rest() -> None:
    """The label is 200 nats above its part of the vocabulary: no offset of that part can represent
    the sum of the others, which dW needs at the label."""
    hidden, _, weight, _, _, coef = tensors(40, 32, 6000, 0.1)
    hidden[:, 0] = 1
    weight[:, 0] = torch.where(torch.arange(6000) < 3000, -100, 100).bfloat16()
    labels = torch.arange(40) * 70
    exact = run((hidden, weight), labels, coef, torch.float64, "reference")
    ours = run((hidden, weight), labels, coef, torch.bfloat16, "cpu")
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-6, atol=1e-4)
    for got, want in zip(ours[1:], exact[1:], strict=True):
        assert got.isfinite().all()
        assert (got - want).norm() < 0.01 * want.norm()


def test_head_gradient_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, _, weight, bias, labels, coef = tensors(48, 16, 500, 1.0)
    monkeypatch.setattr(cpu, "fused_engine", lambda *_: cpu_rows._engine)

    def grads(room: int) -> list[Tensor]:
        monkeypatch.setattr(cpu, "limit", lambda device: room)
        return run((hidden, weight, bias), labels, coef, torch.bfloat16, "cpu")

    whole = grads(2 * 48 * 499)  # one too few to be kept
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
    """Products of T x V x D: the vendor's from the profiler, the kernel's from its arguments."""
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
    source = {"ref_hidden": other} if reference else {"ref_logps": torch.zeros(4)}
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        out = cpo_loss(
            hidden.requires_grad_(grad),
            weight.requires_grad_(head),
            torch.arange(n),
            torch.arange(n) // 16,
            torch.tensor([[0, 1], [2, 3]]),
            impl="cpu",
            **source,
        )
        if grad or head:
            out.loss.backward()
    products = (event for event in profiler.key_averages() if event.key == "aten::mm")
    flops = sum(event.flops for event in products) + 2 * sum(done)
    assert flops / (2 * n * V * D) == pytest.approx(count)


def test_any_number_of_threads_and_the_mode_of_denormals() -> None:
    hidden, _, weight, bias, labels, coef = tensors(*SIZES[0], 0.3)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run((hidden, weight, bias), labels, coef, torch.bfloat16, "cpu")[:2])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert (torch.tensor([1e-40]) * 0.5).item() > 0


def test_too_little_workspace_means_no_fused_kernel(engine: str) -> None:
    assert cpu_rows.fused_engine(torch.bfloat16, 3584, 2**28) == engine
    assert cpu_rows.fused_engine(torch.bfloat16, 3584, 2**20) == ""
    assert cpu_rows.fused_engine(torch.float32, 64, 2**28) == ""


def test_opcheck(engine: str) -> None:
    hidden, other, weight, bias, labels, coef = tensors(48, 16, 500, 1.0)
    args = (hidden.requires_grad_(), weight.requires_grad_(), labels, bias.requires_grad_(), other)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    plan = astuple(Plan(5.0, 1.0, -100, True, True, True, 2**20, engine, 8))
    op = torch.ops.cpo_fast.cpu_logps.default
    torch.library.opcheck(op, args + plan, test_utils=tests)
    stats, residual = op(*(x.detach() for x in args), *plan)[3:]
    leaves = tuple(x.detach() for x in args[:4])
    torch.library.opcheck(
        torch.ops.cpo_fast.cpu_head_grads.default,
        (coef, *leaves, stats, residual, True, True, *plan),
        test_utils=tests,
    )


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
@pytest.mark.usefixtures("tmp_path")
def test_amx_in_an_emulator(tmp_path: Path) -> None:
    """The code of the AMX engine, with its tile instructions in plain C++."""
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

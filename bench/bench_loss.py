"""The loss op against its peers: time, CPU time, extra memory and error, in one table with ratios.

Every provider computes the sigmoid loss of the same pairs from the same hidden states and gives the
gradient of `hidden` (and of the head, where it is trained). Each round of a provider is preceded by
one round of the floor, so that both see the same machine: the three bare `torch.mm` that a frozen
head with an on-line reference cannot do without (H W^T twice, P W), in chunks of 256 rows, outputs
preallocated. Ratios are of medians; on a busy machine look at those of CPU time. Errors of loss and
gradient are those against float64 on the same inputs, relative, in the Euclidean norm.

CPO_FAST_BENCH_SHAPES="512,896,151936;2048,896,151936" sets other sizes (tokens, hidden,
vocabulary). trl's op is asked for log-probs only, which flatters it: its trainer asks for four
statistics more.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cpo_fast.loss import available_impls, cpo_loss

ROUNDS = 5
BETA = 0.1
SEGMENTS = 4  # of equal length, as Liger wants them: chosen, chosen, rejected, rejected
PAIRS = torch.tensor([[0, 2], [1, 3]])
SHAPES = [
    tuple(map(int, shape.split(",")))
    for shape in os.environ.get("CPO_FAST_BENCH_SHAPES", "512,896,151936").split(";")
]
CASES = {
    "frozen head, reference on-line": (False, True, True),
    "frozen head, reference cached": (False, False, True),
    "frozen head, forward only": (False, True, False),
    "trained head, reference on-line": (True, True, True),
}
PACKAGES = {
    "trl chunked": "trl",
    "Liger fused DPO": "liger-kernel",
    "cut-cross-entropy": "cut-cross-entropy",
}


@dataclass(frozen=True)
class Problem:
    hidden: Tensor  # [T, D]
    ref_hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    labels: Tensor  # [T]
    segments: Tensor  # [T]
    ref_logps: Tensor  # [SEGMENTS] of the cached reference
    online: bool
    backward: bool


@functools.cache
def tensors(T: int, D: int, V: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=g).bfloat16()
    ref_hidden = (hidden.float() + 0.05 * torch.randn(T, D, generator=g)).bfloat16()
    weight = (0.05 * torch.randn(V, D, generator=g)).bfloat16()
    return hidden, ref_hidden, weight, torch.randint(0, V, (T,), generator=g)


def problem(shape: tuple[int, ...], case: str) -> Problem:
    trained, online, backward = CASES[case]
    hidden, ref_hidden, weight, labels = tensors(*shape)
    return Problem(
        hidden.clone().requires_grad_(backward),
        ref_hidden,
        weight.detach().requires_grad_(trained),
        labels,
        torch.arange(shape[0]) * SEGMENTS // shape[0],
        torch.full((SEGMENTS,), -12.0 * shape[0] / SEGMENTS),
        online,
        backward,
    )


# --- providers ------------------------------------------------------------------------------------


def preference(p: Problem, score: Callable[[Tensor], Tensor]) -> Tensor:
    """The sigmoid loss of a provider of per-token log-probs."""
    logps = score(p.hidden).double().view(SEGMENTS, -1).sum(1)
    ref = p.ref_logps
    if p.online:
        with torch.no_grad():
            ref = score(p.ref_hidden).double().view(SEGMENTS, -1).sum(1)
    ratio = (logps - ref)[PAIRS]
    return -F.logsigmoid(BETA * (ratio[:, 0] - ratio[:, 1])).mean()


def eager(p: Problem) -> Tensor:
    def score(hidden: Tensor) -> Tensor:
        logps = F.linear(hidden, p.weight).float().log_softmax(-1)
        return logps.gather(1, p.labels.unsqueeze(1)).squeeze(1)

    return preference(p, score)


def trl_chunked(p: Problem) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as size

    def score(hidden: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(
            hidden, p.weight, None, p.labels, 1.0, size, None, 1.0, ()
        )[0]

    return preference(p, score)


def cut_cross_entropy(p: Problem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if p.hidden.is_cuda else "torch_compile"

    def score(hidden: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, p.weight, p.labels, reduction="none", impl=impl)

    return preference(p, score)


@functools.cache
def liger_module(online: bool) -> torch.nn.Module:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    return LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=online)


def liger(p: Problem) -> Tensor:
    if not p.online:
        pytest.skip("Liger's fused DPO takes no cached reference")
    D = p.hidden.shape[1]
    loss, *_ = liger_module(p.online)(
        p.weight,
        p.hidden.view(SEGMENTS, -1, D),
        p.labels.view(SEGMENTS, -1),
        ref_input=p.ref_hidden.view(SEGMENTS, -1, D),
        ref_weight=p.weight.detach(),
    )
    return loss


def ours(p: Problem, isa: str = "", impl: str | None = None) -> Tensor:
    source = {"ref_hidden": p.ref_hidden} if p.online else {"ref_logps": p.ref_logps}
    with contextlib.ExitStack() as stack:
        if isa:
            from cpo_fast.loss.cpu_rows import forced_isa

            stack.enter_context(forced_isa(isa))
        return cpo_loss(
            p.hidden,
            p.weight,
            p.labels,
            p.segments,
            PAIRS,
            beta=BETA,
            num_segments=SEGMENTS,
            impl=impl,
            **source,
        ).loss


PROVIDERS: dict[str, Callable[[Problem], Tensor]] = {
    "eager": eager,
    "trl chunked": trl_chunked,
    "Liger fused DPO": liger,
    "cut-cross-entropy": cut_cross_entropy,
}
if "cpu" in available_impls("cpu"):
    from cpo_fast import _cpu

    PROVIDERS[f"ours, vendor GEMM + {_cpu.isa('')}"] = functools.partial(ours, isa=_cpu.isa(""))
    if _cpu.amx_available():
        PROVIDERS["ours, by itself (AMX)"] = ours
else:
    PROVIDERS["ours, reference"] = ours


@functools.cache
def floor(T: int, D: int, V: int) -> Callable[[], None]:
    hidden, ref_hidden, weight, _ = tensors(T, D, V)
    rows = min(T, 256)
    logits, out = weight.new_empty(rows, V), weight.new_empty(rows, D)

    def run() -> None:
        for start in range(0, T, rows):
            h, r = hidden[start : start + rows], ref_hidden[start : start + rows]
            z = logits[: len(h)]
            torch.mm(r, weight.t(), out=z)
            torch.mm(h, weight.t(), out=z)
            torch.mm(z, weight, out=out[: len(h)])

    return run


# --- truth and memory -----------------------------------------------------------------------------


@functools.cache
def truth(shape: tuple[int, ...], case: str) -> tuple[Tensor, Tensor]:
    """Loss and gradient of `hidden` in float64, 64 tokens at a time."""
    p = problem(shape, case)
    weight = p.weight.detach().double()

    def score(hidden: Tensor) -> tuple[Tensor, Tensor]:
        logps, slopes = [], []
        for h, y in zip(hidden.detach().double().split(64), p.labels.split(64), strict=True):
            logp = (h @ weight.t()).log_softmax(-1)
            logps.append(logp.gather(1, y.unsqueeze(1)).squeeze(1))
            slopes.append(weight[y] - logp.exp_() @ weight)
        return torch.cat(logps), torch.cat(slopes)

    values, slopes = score(p.hidden)
    values.requires_grad_()
    ref, _ = score(p.ref_hidden) if p.online else (None, None)
    loss = preference(p, lambda hidden: values if hidden is p.hidden else ref)
    (coef,) = torch.autograd.grad(loss, values)
    return loss.detach(), coef.unsqueeze(1) * slopes


def extra_memory(run: Callable[[], object]) -> int | None:
    """Bytes by which the resident set grew beyond what was there, at its peak."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = status("VmRSS")
    except OSError:
        return None
    run()
    return max(status("VmHWM") - before, 0)


def drop_workspace() -> None:
    """What our op keeps for its next call counts as extra memory, too."""
    with contextlib.suppress(ImportError):
        from cpo_fast.loss.cpu_rows import workspace

        workspace.memory = torch.empty(0, dtype=torch.uint8)


# --- the benchmark --------------------------------------------------------------------------------

lines: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", *lines, sep="\n")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.mark.parametrize("provider", list(PROVIDERS))
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-D{}-V{}".format(*s))
def test_loss(benchmark, shape: tuple[int, ...], case: str, provider: str) -> None:
    package = PACKAGES.get(provider)
    if package is not None and version(package) is None:
        lines.append(f"{case:33} {provider:28} not installed: pip install {package}")
        pytest.skip(f"{package} is not installed")
    p = problem(shape, case)
    bare = floor(*shape)
    wall, cpu, bare_wall, bare_cpu = [], [], [], []

    def timed(run: Callable[[], object], walls: list[float], cpus: list[float]) -> object:
        begun, used = time.perf_counter(), time.process_time()
        result = run()
        walls.append(time.perf_counter() - begun)
        cpus.append(time.process_time() - used)
        return result

    def step() -> Tensor:
        p.hidden.grad = p.weight.grad = None
        with torch.set_grad_enabled(p.backward):
            loss = PROVIDERS[provider](p)
        if p.backward:
            loss.backward()
        return loss.detach()

    loss = step()  # compiles what is compiled
    drop_workspace()
    memory = extra_memory(step)
    benchmark.pedantic(
        lambda: timed(step, wall, cpu),
        setup=lambda: timed(bare, bare_wall, bare_cpu) and None,
        rounds=ROUNDS,
    )

    exact_loss, exact_grad = truth(shape, case)
    errors = {"loss": abs(float(loss.double() / exact_loss) - 1)}
    if p.hidden.grad is not None:
        errors["gradient"] = float((p.hidden.grad.double() - exact_grad).norm() / exact_grad.norm())
    seconds, used = statistics.median(wall), statistics.median(cpu)
    ratio, cpu_ratio = seconds / statistics.median(bare_wall), used / statistics.median(bare_cpu)
    T, D, V = shape
    benchmark.extra_info.update(
        provider=provider,
        case=case,
        tokens=T,
        hidden=D,
        vocabulary=V,
        dtype="bfloat16",
        input_bytes=2 * (2 * T * D + V * D),
        logits_bytes=2 * T * V,
        extra_bytes=memory,
        cpu_seconds=used,
        floor_seconds=statistics.median(bare_wall),
        floor_cpu_seconds=statistics.median(bare_cpu),
        ratio_to_floor=ratio,
        cpu_ratio_to_floor=cpu_ratio,
        errors=errors,
        threads=torch.get_num_threads(),
        versions={"torch": torch.__version__, **{n: version(n) for n in PACKAGES.values()}},
    )
    lines.append(
        f"{case:33} {provider:28} {seconds:7.3f} s {ratio:5.2f} x floor  CPU {used:7.3f} s "
        f"{cpu_ratio:5.2f} x  +{(memory or 0) / 2**20:6.0f} MiB  "
        + "  ".join(f"{name} err {value:.1e}" for name, value in errors.items())
    )

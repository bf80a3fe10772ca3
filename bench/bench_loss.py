"""The loss op against its peers: time, CPU time, extra memory and error, in one table with ratios.

Every provider computes the sigmoid loss of the same pairs from the same hidden states and gives the
gradient of `hidden` (and of the head, where it is trained). Each round of a provider is preceded by
one round of the floor, so that both see the same machine: the three bare `torch.mm` that a frozen
head with an on-line reference cannot do without (H W^T twice, P W), in chunks of 256 rows, outputs
preallocated. Ratios are of medians; on a busy machine look at those of CPU time. Errors of loss and
gradient are those against float64 on the same inputs, relative, in the Euclidean norm.

CPO_FAST_BENCH_SHAPES="512,896,151936;2048,896,151936" sets other sizes (tokens, hidden,
vocabulary).
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from bench.loss_peers import (
    BETA,
    CASES,
    PACKAGES,
    PEERS,
    SEGMENTS,
    CannotCompute,
    Problem,
    problem,
    tensors,
    truth,
    version,
)
from bench.memory import extra_memory
from cpo_fast.loss import available_impls, cpo_loss

ROUNDS = 5
SHAPES = [
    tuple(map(int, shape.split(",")))
    for shape in os.environ.get("CPO_FAST_BENCH_SHAPES", "512,896,151936").split(";")
]


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
            p.pairs,
            beta=BETA,
            num_segments=SEGMENTS,
            impl=impl,
            **source,
        ).loss


PROVIDERS: dict[str, Callable[[Problem], Tensor]] = dict(PEERS)
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
def exact(shape: tuple[int, ...], case: str) -> tuple[Tensor, Tensor]:
    return truth(problem(shape, case))


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

    try:
        loss = step()  # compiles what is compiled
    except CannotCompute as reason:
        pytest.skip(str(reason))
    drop_workspace()
    memory = extra_memory(step)
    benchmark.pedantic(
        lambda: timed(step, wall, cpu),
        setup=lambda: timed(bare, bare_wall, bare_cpu) and None,
        rounds=ROUNDS,
    )

    exact_loss, exact_grad = exact(shape, case)
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

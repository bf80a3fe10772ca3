"""The loss op against its peers on the CPU: time, CPU time, extra memory and error, in one table.

Every provider computes the sigmoid loss of the same pairs from the same hidden states and gives the
gradient of `hidden` (and of the head, where it is trained). Each round of a provider is preceded by
one round of the floor, so that both see the same machine: the three bare `torch.mm` that a frozen
head with an on-line reference cannot do without (H W^T twice, P W), in chunks of 256 rows, outputs
preallocated. Ratios are of medians; on a busy machine look at those of CPU time. Errors of loss and
gradient are those against float64 on the same inputs, relative, in the Euclidean norm.

Sizes are those of the 0.5B model at 256 to 1024 tokens; CPO_FAST_BENCH_SHAPES="all" takes the 3B
and the 7B model and up to 8192 tokens too (hours), and "512,896,151936;2048,896,151936" others
(tokens, hidden, vocabulary). `bench.gpu_check` measures the same on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.loss_peers import (
    CASES,
    PACKAGES,
    PEERS,
    CannotCompute,
    Problem,
    Truth,
    ours,
    problem,
    tensors,
    truth,
    version,
)
from bench.memory import extra_memory
from cpo_fast.loss import available_impls
from cpo_fast.loss.workspace import limit

ROUNDS = 5
MODELS = [(896, 151936), (2048, 151936), (3584, 152064)]  # D, V of Qwen2.5-VL's 0.5B, 3B, 7B
LARGEST = (8192, 896, 152064)  # for the bound on memory


def shapes(text: str) -> list[tuple[int, ...]]:
    if text == "all":
        return [(T, *model) for model in MODELS for T in (256, 512, 1024, 2048, 4096, 8192)]
    if not text:
        return [(T, *MODELS[0]) for T in (256, 512, 1024)]
    return [tuple(map(int, shape.split(","))) for shape in text.split(";")]


SHAPES = shapes(os.environ.get("CPO_FAST_BENCH_SHAPES", ""))


def forced(p: Problem, isa: str) -> Tensor:
    """`ours` by this engine of the fused kernel, or by these row kernels."""
    with cpu_rows.forced_isa(isa):
        return ours(p)


PROVIDERS: dict[str, Callable[[Problem], Tensor]] = dict(PEERS)
if "cpu" in available_impls("cpu"):
    from cpo_fast import _cpu
    from cpo_fast.loss import cpu_rows

    PROVIDERS[f"ours, vendor GEMM + {_cpu.isa('')}"] = functools.partial(forced, isa=_cpu.isa(""))
    if cpu_rows.default_engine:
        PROVIDERS[f"ours, by itself ({cpu_rows.default_engine})"] = ours
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
def exact(shape: tuple[int, ...], case: str) -> Truth:
    return truth(problem(shape, case))


def relative_error(value: Tensor, want: Tensor) -> float:
    return float((value.double() - want).norm() / want.norm())


def drop_workspace() -> None:
    """What our op keeps for its next call counts as extra memory, too."""
    if "cpu" in available_impls("cpu"):
        cpu_rows.workspace.memory = torch.empty(0, dtype=torch.uint8)


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
    wall, cpu, bare_wall, bare_cpu, forward = [], [], [], [], []

    def timed(run: Callable[[], object], walls: list[float], cpus: list[float]) -> object:
        begun, used = time.perf_counter(), time.process_time()
        result = run()
        walls.append(time.perf_counter() - begun)
        cpus.append(time.process_time() - used)
        return result

    def step() -> Tensor:
        p.hidden.grad = p.weight.grad = None
        begun = time.perf_counter()
        with torch.set_grad_enabled(p.backward):
            loss = PROVIDERS[provider](p)
        forward.append(time.perf_counter() - begun)
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

    want = exact(shape, case)
    errors = {"loss": abs(float(loss.double() / want.loss) - 1)}
    if p.hidden.grad is not None:
        errors["gradient"] = relative_error(p.hidden.grad, want.hidden_grad)
    if p.weight.grad is not None and want.weight_grad is not None:
        errors["dW"] = relative_error(p.weight.grad, want.weight_grad)
    seconds, used = statistics.median(wall), statistics.median(cpu)
    of_forward = statistics.median(forward[-ROUNDS:])
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
        workspace_bytes=limit(torch.device("cpu")),
        extra_bytes=memory,
        forward_seconds=of_forward,
        backward_seconds=seconds - of_forward if p.backward else None,
        cpu_seconds=used,
        floor_seconds=statistics.median(bare_wall),
        floor_cpu_seconds=statistics.median(bare_cpu),
        ratio_to_floor=ratio,
        cpu_ratio_to_floor=cpu_ratio,
        errors=errors,
        threads=torch.get_num_threads(),
        processor=processor(),
        versions={"torch": torch.__version__, **{n: version(n) for n in PACKAGES.values()}},
    )
    both = f"{of_forward:7.3f} + {seconds - of_forward:6.3f}" if p.backward else " " * 16
    lines.append(
        f"T{T} D{D} {case:33} {provider:30} {seconds:7.3f} s ({both}) {ratio:5.2f} x floor  "
        f"CPU {used:7.3f} s {cpu_ratio:5.2f} x  +{(memory or 0) / 2**20:6.0f} MiB  "
        + "  ".join(f"{name} err {value:.1e}" for name, value in errors.items())
    )


@pytest.mark.skipif("cpu" not in available_impls("cpu"), reason="cpo_fast._cpu is not built")
def test_memory_of_the_largest(benchmark) -> None:
    """8192 tokens of a frozen head, reference on-line: workspace + four float32 numbers for each of
    T x D."""
    T, D, _ = LARGEST
    p = problem(LARGEST, "frozen head, reference on-line")
    small = problem((16, D, LARGEST[2]), "frozen head, reference on-line")
    ours(small).backward()  # what is set up once is no matter of size

    def step(isa: str) -> None:
        p.hidden.grad = None
        forced(p, isa).backward()

    grown: list[int | None] = []
    for isa in (_cpu.isa(""), cpu_rows.default_engine):
        drop_workspace()
        grown.append(extra_memory(functools.partial(step, isa)))
    allowed = limit(torch.device("cpu")) + 4 * T * D * 4  # bytes
    names = (f"vendor GEMM + {_cpu.isa('')}", f"by itself ({cpu_rows.default_engine})")
    benchmark.extra_info.update(
        shape=LARGEST, allowed_bytes=allowed, extra_bytes=dict(zip(names, grown, strict=True))
    )
    for name, extra in zip(names, grown, strict=True):
        if extra is not None:
            lines.append(
                f"memory at T{T} D{D} V{LARGEST[2]}, {name}: "
                f"+{extra / 2**20:.0f} MiB, allowed {allowed / 2**20:.0f}"
            )
            assert extra <= allowed
    benchmark.pedantic(step, (cpu_rows.default_engine,), rounds=1)


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()

"""The loss op against its peers on the CPU: time, CPU time, extra memory and error, in one table.

Every provider computes the sigmoid loss of the same pairs from the same hidden states, with the
gradient of `hidden` and of a trained head. Rounds of provider and floor alternate, so that both see
the same machine load. The floor is the three bare `torch.mm` that a frozen head with an on-line
reference needs (H W^T twice, P W), in chunks of 256 rows, outputs preallocated. Ratios are of
medians; on a busy machine use the CPU time ratios. Errors of loss and gradient are relative to
float64 on the same inputs, in the Euclidean norm.

Default sizes: the 0.5B model at 256 to 1024 tokens. CPO_FAST_BENCH_SHAPES="all" adds the 3B and the
7B model and up to 8192 tokens (hours); "512,896,151936;2048,896,151936" selects others (tokens,
hidden, vocabulary). `bench.gpu_check` measures the same on a GPU.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu.cases import FROZEN
from bench.gpu.environment import find_version
from bench.loss_peers import (
    CASES,
    PACKAGES,
    PEERS,
    CannotCompute,
    Problem,
    Shape,
    Truth,
    build_floor,
    compute_errors,
    compute_ours,
    compute_truth,
    make_problem,
)
from bench.measure import Clocked, measure_extra_memory
from cpo_fast.doctor import processor
from cpo_fast.loss import available_impls
from cpo_fast.loss.workspace import limit

ROUNDS = 5
MODELS = [(896, 151936), (2048, 151936), (3584, 152064)]  # D, V of Qwen2.5-VL's 0.5B, 3B, 7B
LARGEST = (8192, 896, 152064)  # for the memory bound
FLOOR_ROWS = 256


def parse_shapes(text: str) -> list[Shape]:
    if text == "all":
        return [(T, *model) for model in MODELS for T in (256, 512, 1024, 2048, 4096, 8192)]
    if not text:
        return [(T, *MODELS[0]) for T in (256, 512, 1024)]
    found = []
    for shape in text.split(";"):
        T, D, V = map(int, shape.split(","))
        found.append((T, D, V))
    return found


SHAPES = parse_shapes(os.environ.get("CPO_FAST_BENCH_SHAPES", ""))


def force_isa(p: Problem, isa: str) -> Tensor:
    """Our op with the fused kernel's engine or the row kernels `isa`."""
    with cpu_rows.forced_isa(isa):
        return compute_ours(p)


PROVIDERS: dict[str, Callable[[Problem], Tensor]] = dict(PEERS)
if "cpu" in available_impls("cpu"):
    from cpo_fast import _cpu
    from cpo_fast.loss import cpu_rows

    PROVIDERS[f"ours, vendor GEMM + {_cpu.isa('')}"] = functools.partial(
        force_isa, isa=_cpu.isa("")
    )
    if cpu_rows.default_engine:
        PROVIDERS[f"ours, by itself ({cpu_rows.default_engine})"] = compute_ours
else:
    PROVIDERS["ours, reference"] = compute_ours


@functools.cache
def get_floor(shape: Shape) -> Callable[[], None]:
    return build_floor(shape, FROZEN, "cpu", min(shape[0], FLOOR_ROWS))


@functools.cache
def get_truth(shape: Shape, case: str) -> Truth:
    return compute_truth(make_problem(shape, case))


def drop_workspace() -> None:
    """Free the workspace that our op keeps between calls: it must count as extra memory."""
    if "cpu" in available_impls("cpu"):
        cpu_rows.workspace.memory = torch.empty(0, dtype=torch.uint8)


# --- the benchmark --------------------------------------------------------------------------------

lines: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():
        print("", *lines, sep="\n")


@pytest.mark.parametrize("provider", list(PROVIDERS))
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-D{}-V{}".format(*s))
def test_loss(benchmark: Any, shape: Shape, case: str, provider: str) -> None:
    package = PACKAGES.get(provider)
    if package is not None and find_version(package) is None:
        lines.append(f"{case:33} {provider:28} not installed: pip install {package}")
        pytest.skip(f"{package} is not installed")
    p = make_problem(shape, case)
    forward = []

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
        loss = step()  # warms up: some providers compile
    except CannotCompute as reason:
        pytest.skip(str(reason))
    drop_workspace()
    memory = measure_extra_memory(step)
    clocked, floor = Clocked(step), Clocked(get_floor(shape))
    benchmark.pedantic(clocked, setup=floor, rounds=ROUNDS)

    errors = compute_errors(get_truth(shape, case), loss, p.hidden.grad, p.weight.grad)
    seconds, used = statistics.median(clocked.wall), statistics.median(clocked.cpu)
    of_forward = statistics.median(forward[-ROUNDS:])
    floor_seconds, floor_used = statistics.median(floor.wall), statistics.median(floor.cpu)
    ratio, cpu_ratio = seconds / floor_seconds, used / floor_used
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
        floor_seconds=floor_seconds,
        floor_cpu_seconds=floor_used,
        ratio_to_floor=ratio,
        cpu_ratio_to_floor=cpu_ratio,
        errors=errors,
        threads=torch.get_num_threads(),
        processor=processor(),
        versions={"torch": torch.__version__, **{n: find_version(n) for n in PACKAGES.values()}},
    )
    both = f"{of_forward:7.3f} + {seconds - of_forward:6.3f}" if p.backward else " " * 16
    lines.append(
        f"T{T} D{D} {case:33} {provider:30} {seconds:7.3f} s ({both}) {ratio:5.2f} x floor  "
        f"CPU {used:7.3f} s {cpu_ratio:5.2f} x  +{(memory or 0) / 2**20:6.0f} MiB  "
        + "  ".join(f"{name} err {value:.1e}" for name, value in errors.items())
    )


@pytest.mark.skipif("cpu" not in available_impls("cpu"), reason="cpo_fast._cpu is not built")
def test_memory_of_the_largest(benchmark: Any) -> None:
    """Bound at 8192 tokens, frozen head, on-line reference: workspace + 4 T x D float32 numbers."""
    T, D, V = LARGEST
    p = make_problem(LARGEST, FROZEN)
    compute_ours(make_problem((16, D, V), FROZEN)).backward()  # one-time setup is not measured

    def step(isa: str) -> None:
        p.hidden.grad = None
        force_isa(p, isa).backward()

    grown: list[int | None] = []
    for isa in (_cpu.isa(""), cpu_rows.default_engine):
        drop_workspace()
        grown.append(measure_extra_memory(functools.partial(step, isa)))
    allowed = limit(torch.device("cpu")) + 4 * T * D * 4  # bytes
    names = (f"vendor GEMM + {_cpu.isa('')}", f"by itself ({cpu_rows.default_engine})")
    benchmark.extra_info.update(
        shape=LARGEST, allowed_bytes=allowed, extra_bytes=dict(zip(names, grown, strict=True))
    )
    for name, extra in zip(names, grown, strict=True):
        if extra is not None:
            lines.append(
                f"memory at T{T} D{D} V{V}, {name}: "
                f"+{extra / 2**20:.0f} MiB, allowed {allowed / 2**20:.0f}"
            )
            assert extra <= allowed
    benchmark.pedantic(step, (cpu_rows.default_engine,), rounds=1)

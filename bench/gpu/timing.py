"""Median times from the device's clock, in alternating rounds, and the memory of a call.

The host can take longer to launch a small call than the device takes to run it. Such calls are
captured in a CUDA graph and replayed, so that only the device's work is timed.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from bench.gpu.cases import VENDOR_SETTINGS
from bench.gpu.units import describe_error
from cpo_fast.loss.chunked import fp32_sums

SECONDS = 3.0  # limit of a measurement's rounds
ROUNDS = 15
EVENTS, GRAPHS = "events", "replayed graphs"
Output = TypeVar("Output")


def start_clock(run: Callable[[], object], device: str) -> Callable[[], float]:
    """Start `run`; returns a function that waits for it and returns its seconds."""
    if device == "cpu":
        begun = time.perf_counter()
        run()
        seconds = time.perf_counter() - begun
        return lambda: seconds
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()

    def wait() -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return wait


def time_in_turn(
    runs: dict[str, Callable[[], object]], device: str, rounds: int = ROUNDS
) -> dict[str, dict[str, Any]]:
    """{name: {"median", "least", "most", "rounds"}} in seconds. Rounds alternate between runs, so
    that clocks and temperature are equal for all."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # warm-up: compilation, handles, the allocator's blocks
        run()
        run()
    begun = time.monotonic()
    for done in range(rounds):
        waits = {name: start_clock(run, device) for name, run in runs.items()}
        for name, wait in waits.items():
            found[name].append(wait())
        if done >= 2 and time.monotonic() - begun > SECONDS:
            break
    return {
        name: {
            "median": statistics.median(seconds),
            "least": min(seconds),
            "most": max(seconds),
            "rounds": len(seconds),
        }
        for name, seconds in found.items()
    }


def time_small_in_turn(
    runs: dict[str, Callable[[], object]], device: str, rounds: int = ROUNDS
) -> tuple[dict[str, dict[str, Any]], str]:
    """(times as from `time_in_turn`, clock): of replayed CUDA graphs, or of plain calls if one of
    `runs` cannot be captured.

    Do not reuse the process after a failed capture: PyTorch can remain in capture mode.
    """
    if device == "cpu":
        return time_in_turn(runs, device, rounds), EVENTS
    times = time_in_turn(runs, device, rounds)
    try:
        graphs: dict[str, Callable[[], object]] = {
            name: capture_graph(run)[0].replay for name, run in runs.items()
        }
        return time_in_turn(graphs, device, rounds), GRAPHS
    except Exception as error:  # anything that cannot be captured
        return times, f"{EVENTS}; no graph: {describe_error(error, 120)}"


def capture_graph(run: Callable[[], Output]) -> tuple[torch.cuda.CUDAGraph, Output]:
    """A CUDA graph of one call and its output, after the required warm-up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph, output


def apply_both_settings(
    runs: dict[str, Callable[[], object]],
) -> dict[str, Callable[[], object]]:
    """{"NAME, SETTING": run} for both settings of the vendor library's GEMM."""

    def run_like_ours(run: Callable[[], object]) -> None:
        with fp32_sums():
            run()

    default, ours = VENDOR_SETTINGS
    found: dict[str, Callable[[], object]] = {}
    for name, run in runs.items():
        found[f"{name}, {default}"] = run
        found[f"{name}, {ours}"] = functools.partial(run_like_ours, run)
    return found


def release(device: str) -> None:
    """Free cached device memory, to avoid fragmentation by the previous measurement."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def measure_extra_bytes(run: Callable[[], object], device: str) -> int | None:
    """Peak growth of device memory during `run`; None on a CPU."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before

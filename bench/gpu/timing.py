"""Medians of a device's own clock, in turn with a floor, and the memory that a call takes.

Small calls take the host longer to launch than the device to run. Their launches are recorded in a
CUDA graph, which is replayed: what is timed is the device's work alone, as where the host runs
ahead.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu.cases import VENDOR_SETTINGS
from cpo_fast.loss.chunked import fp32_sums

SECONDS = 3.0  # of rounds per measurement, at most
ROUNDS = 15
EVENTS, GRAPHS = "events", "replayed graphs"


def clocked(run: Callable[[], object], device: str) -> Callable[[], float]:
    """Starts `run` and returns how to learn its seconds, which waits for it."""
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


def in_turn(runs: dict[str, Callable[[], object]], device: str, rounds: int = ROUNDS) -> dict:
    """{name: {"median", "least", "most", "rounds"}} in seconds; rounds of all alternate, so that
    clocks and temperature are the same for all."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # warm: compilation, handles, the allocator's blocks
        run()
        run()
    begun = time.monotonic()
    for done in range(rounds):
        waits = {name: clocked(run, device) for name, run in runs.items()}
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


def in_turn_small(
    runs: dict[str, Callable[[], object]], device: str, rounds: int = ROUNDS
) -> tuple[dict, str]:
    """(as from `in_turn`, how it was timed): by replayed CUDA graphs of all runs, or, where one
    cannot be captured, by `in_turn` itself.

    After a capture that failed, the process should do nothing more: PyTorch may be left in it.
    """
    if device == "cpu":
        return in_turn(runs, device, rounds), EVENTS
    times = in_turn(runs, device, rounds)
    try:
        graphs: dict[str, Callable[[], object]] = {
            name: captured(run).replay for name, run in runs.items()
        }
        return in_turn(graphs, device, rounds), GRAPHS
    except Exception as error:  # whatever an implementation does that a graph cannot hold
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
        return times, f"{EVENTS}; no graph: {reason}"


def captured(run: Callable[[], object]) -> Any:
    """A CUDA graph of one call, after two on another stream, as capturing asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def under_both_settings(
    runs: dict[str, Callable[[], object]],
) -> dict[str, Callable[[], object]]:
    """{"NAME, SETTING": run} for both settings of the vendor library's products."""

    def like_ours(run: Callable[[], object]) -> None:
        with fp32_sums():
            run()

    default, ours = VENDOR_SETTINGS
    found: dict[str, Callable[[], object]] = {}
    for name, run in runs.items():
        found[f"{name}, {default}"] = run
        found[f"{name}, {ours}"] = functools.partial(like_ours, run)
    return found


def release(device: str) -> None:
    """Gives cached device memory back, so that the one before leaves no fragments."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def extra_bytes(run: Callable[[], object], device: str) -> int | None:
    """Device memory at the peak of `run` beyond what there was before; None on a CPU."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before

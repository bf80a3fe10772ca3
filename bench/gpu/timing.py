"""Medians of a device's own clock, in turn with a floor, and the memory that a call takes."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch

SECONDS = 3.0  # of rounds per measurement, at most
ROUNDS = 15


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

"""Wall time, CPU time and peak memory of a call."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path


class Clocked:
    """A call that records its wall and CPU seconds; CPU time excludes other processes."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __call__(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.call()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)


def measure_extra_memory(run: Callable[[], object]) -> int | None:
    """Peak growth of the resident set during `run`, in bytes; None if the system does not report
    it."""

    def read_status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # reused allocator memory would not count as growth
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = read_status("VmRSS")
    except OSError:
        return None
    run()
    return max(read_status("VmHWM") - before, 0)

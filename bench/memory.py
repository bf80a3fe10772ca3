"""How much memory something takes at its peak."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path


def extra_memory(run: Callable[[], object]) -> int | None:
    """Bytes by which the resident set grew beyond what was there, at its peak; None where the
    system does not say.
    """

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # what the allocator kept would be used again without being seen
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = status("VmRSS")
    except OSError:
        return None
    run()
    return max(status("VmHWM") - before, 0)

"""Worker process that runs the units of one phase: `python -m bench.gpu.worker`.

A CUDA error breaks its process; the parent then starts another worker, which continues after the
failed unit. The worker writes JSON lines to a pipe: the plan, then start and result of each unit.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback
from typing import Any, TextIO

from bench.gpu.units import NotHere, Setting, Unit, describe_error

PR_SET_PDEATHSIG = 1


def main(source: str, setting: Setting, done: set[str], pipe: TextIO) -> None:
    """Run the units of the "module:function" of bench.gpu (default: `list_units`) except those in
    `done`."""

    def send(**line: Any) -> None:
        pipe.write(json.dumps(line) + "\n")
        pipe.flush()

    module, _, function = source.partition(":")
    list_units = getattr(importlib.import_module(f"bench.gpu.{module}"), function or "list_units")
    units = [u for u in list_units(setting) if u.key not in done and setting.runs(u)]
    send(plan=[[unit.key, unit.variant, unit.phase] for unit in units])
    for unit in units:
        send(begin=unit.key, limit=unit.limit * setting.patience)
        begun = time.monotonic()
        status, figures, broken = run_unit(unit)
        ends = figures.pop("fresh_process", False) or broken
        seconds = time.monotonic() - begun
        ending = {"ends": ends, "broken": broken}
        send(key=unit.key, status=status, unit_seconds=seconds, **ending, **figures)
        if ends:
            break


def run_unit(unit: Unit) -> tuple[str, dict[str, Any], bool]:
    """(status, figures or reason, whether this process is broken)."""
    try:
        figures = unit.run()
        synchronise()
        return "ok", figures, False
    except NotHere as reason:
        return "skipped", {"reason": str(reason)}, False
    except AssertionError as failure:
        traceback.print_exc()
        return "failed", {"reason": str(failure) or "an assertion failed"}, is_broken()
    except Exception as error:
        traceback.print_exc()
        memory = type(error).__name__ == "OutOfMemoryError"
        broken = is_broken() or (not memory and "CUDA error" in str(error))
        return "error", {"reason": describe_error(error, 300)}, broken


def synchronise() -> None:
    """Synchronise the device, so that a kernel's error surfaces in the unit that launched it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def is_broken() -> bool:
    """Whether a kernel's error broke this process, so that every later call fails. Tested on the
    device, as the error messages of PyTorch, Triton and our launchers differ."""
    try:
        synchronise()
    except Exception:
        return True
    return False


if __name__ == "__main__":
    if sys.platform == "linux":  # exit when the parent ends, in any way
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    name, settings, done, descriptor = sys.argv[1:]
    with os.fdopen(int(descriptor), "w") as pipe:
        main(name, Setting.loads(settings), set(json.loads(done)), pipe)

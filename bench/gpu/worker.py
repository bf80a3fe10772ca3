"""Runs the units of one phase in a process of its own: `python -m bench.gpu.worker`.

A CUDA error spoils the process that met it, so the parent starts another one, which goes on behind
the unit that failed. The parent is told what happens in lines of JSON through a pipe: the plan,
then each unit's start and result.
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

from bench.gpu.units import NotHere, Setting, Unit

PR_SET_PDEATHSIG = 1


def main(source: str, setting: Setting, behind: set[str], pipe: TextIO) -> None:
    """Runs the units that "module:function" of bench.gpu returns; the function is `units` where
    none is named."""

    def tell(**line: Any) -> None:
        pipe.write(json.dumps(line) + "\n")
        pipe.flush()

    module, _, function = source.partition(":")
    units = getattr(importlib.import_module(f"bench.gpu.{module}"), function or "units")(setting)
    units = [unit for unit in units if unit.key not in behind and setting.runs(unit)]
    tell(plan=[[unit.key, unit.variant, unit.phase] for unit in units])
    for unit in units:
        tell(begin=unit.key, limit=unit.limit * setting.patience)
        begun = time.monotonic()
        status, figures, spoils = outcome(unit)
        ends = figures.pop("fresh_process", False) or spoils
        seconds = time.monotonic() - begun
        ending = {"ends": ends, "spoilt": spoils}
        tell(key=unit.key, status=status, unit_seconds=seconds, **ending, **figures)
        if ends:
            break


def outcome(unit: Unit) -> tuple[str, dict[str, Any], bool]:
    """(status, figures or reason, whether this process can do nothing more)."""
    try:
        figures = unit.run()
        settle()
        return "ok", figures, False
    except NotHere as reason:
        return "skipped", {"reason": str(reason)}, False
    except AssertionError as broken:
        traceback.print_exc()
        return "failed", {"reason": str(broken) or "an assertion does not hold"}, spoilt()
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        memory = type(error).__name__ == "OutOfMemoryError"
        return "error", {"reason": text}, spoilt() or (not memory and "CUDA error" in str(error))


def settle() -> None:
    """Waits for the device, so that the unit that launched a kernel meets its fault."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def spoilt() -> bool:
    """A fault of a kernel stays: every later call of this process fails. PyTorch, Triton and our
    launchers each word it in their own way, so the device is asked."""
    try:
        settle()
    except Exception:
        return True
    return False


if __name__ == "__main__":
    if sys.platform == "linux":  # end with the parent, however that ends
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    name, settings, done, descriptor = sys.argv[1:]
    with os.fdopen(int(descriptor), "w") as told:
        main(name, Setting.loads(settings), set(json.loads(done)), told)

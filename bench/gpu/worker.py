"""Worker process that runs the units of one phase: `python -m bench.gpu.worker`.

A CUDA error breaks its process, so the parent then starts another worker, which continues after the
failed unit. The worker reports through a pipe in JSON lines: the plan, then start and result of
each unit.
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


def main(source: str, setting: Setting, behind: set[str], pipe: TextIO) -> None:
    """Run the units that "module:function" of bench.gpu returns (default function: `units`), except
    those in `behind`."""

    def send(**line: Any) -> None:
        pipe.write(json.dumps(line) + "\n")
        pipe.flush()

    module, _, function = source.partition(":")
    units = getattr(importlib.import_module(f"bench.gpu.{module}"), function or "units")(setting)
    units = [unit for unit in units if unit.key not in behind and setting.runs(unit)]
    send(plan=[[unit.key, unit.variant, unit.phase] for unit in units])
    for unit in units:
        send(begin=unit.key, limit=unit.limit * setting.patience)
        begun = time.monotonic()
        status, figures, spoils = outcome(unit)
        ends = figures.pop("fresh_process", False) or spoils
        seconds = time.monotonic() - begun
        ending = {"ends": ends, "spoilt": spoils}
        send(key=unit.key, status=status, unit_seconds=seconds, **ending, **figures)
        if ends:
            break


def outcome(unit: Unit) -> tuple[str, dict[str, Any], bool]:
    """(status, figures or reason, whether this process is broken)."""
    try:
        figures = unit.run()
        settle()
        return "ok", figures, False
    except NotHere as reason:
        return "skipped", {"reason": str(reason)}, False
    except AssertionError as broken:
        traceback.print_exc()
        return "failed", {"reason": str(broken) or "an assertion failed"}, spoilt()
    except Exception as error:
        traceback.print_exc()
        memory = type(error).__name__ == "OutOfMemoryError"
        broken_here = spoilt() or (not memory and "CUDA error" in str(error))
        return "error", {"reason": describe_error(error, 300)}, broken_here


def settle() -> None:
    """Synchronise the device, so that a kernel's error is raised in the unit that launched it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def spoilt() -> bool:
    """Whether a kernel's error broke this process: then every later call fails. Tested on the
    device, as the messages of PyTorch, Triton and our launchers differ."""
    try:
        settle()
    except Exception:
        return True
    return False


if __name__ == "__main__":
    if sys.platform == "linux":  # exit with the parent, however it ends
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    name, settings, done, descriptor = sys.argv[1:]
    with os.fdopen(int(descriptor), "w") as pipe:
        main(name, Setting.loads(settings), set(json.loads(done)), pipe)

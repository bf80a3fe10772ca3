"""NVIDIA's compute-sanitizer over every kernel on small shapes, where it is installed.

`python -m bench.gpu.sanitizer VARIANT` is what runs under it.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from typing import Any

from bench.gpu.units import ROOT, NotHere, Setting, Unit

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
VARIANTS = ("cuda rows", "cuda fused", "triton lean")
OURS = "kns=3cpo"  # mangled names of our namespace: not the vendor's GEMM
FAILED = 86
SECONDS = 50.0  # less than the limit of a unit: a slow tool is not a fault of ours


def run(tool: str, variant: str, device: str) -> dict[str, Any]:
    if device == "cpu":
        raise NotHere("there is nothing to check on a CPU")
    if shutil.which("compute-sanitizer") is None:
        raise NotHere("compute-sanitizer is not installed")
    done = sanitized(tool, variant)
    if "not supported" in done.stdout or "Failed to initialize" in done.stdout:
        raise NotHere(f"compute-sanitizer does not work here: {done.stdout[-200:]}")
    if done.returncode == 3:
        raise NotHere(f"{variant} does not run on this device")
    summary = re.findall(r"={9} (.*(?:SUMMARY|Error:|Warning:|hazard).*)", done.stdout)
    found = done.returncode == FAILED
    if found and tool == "initcheck" and sanitized(tool, "reference").returncode == FAILED:
        raise NotHere("initcheck finds as much where no kernel of ours runs: it misses writes")
    assert not found, "; ".join(summary)[:400]
    ours = "Traceback" in done.stderr and "OutOfMemoryError" not in done.stderr
    assert not ours, done.stderr[-300:]
    if done.returncode != 0:  # only FAILED says that the tool found something
        raise NotHere(f"the tool ended with {done.returncode}: {done.stderr[-200:]}")
    return {"summary": summary[-1:]}


def sanitized(tool: str, variant: str) -> subprocess.CompletedProcess[str]:
    """`exercise(variant)` in a process under a tool. Raises NotHere where that takes too long."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FAILED)]
    command += ["--print-limit", "20"]
    if tool == "racecheck":
        command += ["--racecheck-detect-level", "error"]
    if tool == "memcheck":  # our launchers check every call; what PyTorch tries out is not ours
        command += ["--report-api-errors", "no"]
    # Of a kernel that is left out, initcheck might not see the writes: it gets them all.
    if variant.startswith("cuda") and tool != "initcheck":
        command += ["--kernel-name", OURS]
    command += [sys.executable, "-m", "bench.gpu.sanitizer", variant]
    # Without PyTorch's cache every tensor is an allocation of its own, whose end is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise NotHere(f"took longer than {SECONDS:.0f} s under the tool") from None
    print(done.stdout, done.stderr)
    return done


def units(setting: Setting) -> list[Unit]:
    return [
        Unit(f"{tool}: {variant}", functools.partial(run, tool, variant, setting.device), limit=120)
        for tool in TOOLS
        for variant in VARIANTS
    ]


def plan_units(setting: Setting) -> list[Unit]:
    """The two tools that find most, over the kernels that are not Triton's."""
    return [
        Unit(f"{tool}: {variant}", functools.partial(run, tool, variant, setting.device), limit=60)
        for tool in TOOLS[:2]
        for variant in VARIANTS[:2]
        if variant not in setting.hung
    ]


def exercise(variant: str) -> int:
    """Forward and backward on ragged shapes, in chunks and in one; 3 where it cannot run."""
    import torch

    from bench.gpu.inputs import Inputs, workspace
    from bench.gpu.variants import using, variants

    if variant not in variants("cuda"):
        return 3
    for shape in ((300, 1013, 72), (5, 20007, 64)):
        data = Inputs("random", *shape, torch.bfloat16, "cuda")
        for mib in (1, 64):
            leaves = data.leaves()
            with using(variant) as impl, workspace(mib):
                out = data.loss(*leaves, leaves[0].detach().roll(1, 0) * 20, impl)
                torch.autograd.grad(out.loss, leaves)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(exercise(sys.argv[1]))

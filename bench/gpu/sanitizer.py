"""Runs every kernel on small shapes under NVIDIA's compute-sanitizer, if installed.

The tool runs `python -m bench.gpu.sanitizer VARIANT`.
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
OURS = "kns=3cpo"  # mangled names in our namespace; excludes the vendor's GEMM
FAILED = 86  # the tool's exit status if it reports an error
UNSUPPORTED = 3  # `exercise`'s exit status if the variant does not run on this device
SECONDS = 50.0  # below a unit's limit, so that a slow tool is skipped, not failed


def run(tool: str, variant: str, device: str) -> dict[str, Any]:
    if device == "cpu":
        raise NotHere("compute-sanitizer needs a GPU")
    if shutil.which("compute-sanitizer") is None:
        raise NotHere("compute-sanitizer is not installed")
    done = run_tool(tool, variant)
    if "not supported" in done.stdout or "Failed to initialize" in done.stdout:
        raise NotHere(f"compute-sanitizer does not work here: {done.stdout[-200:]}")
    if done.returncode == UNSUPPORTED:
        raise NotHere(f"{variant} does not run on this device")
    summary = re.findall(r"={9} (.*(?:SUMMARY|Error:|Warning:|hazard).*)", done.stdout)
    found = done.returncode == FAILED
    if found and tool == "initcheck" and run_tool(tool, "reference").returncode == FAILED:
        raise NotHere("initcheck also fails without our kernels: it misses writes")
    assert not found, "; ".join(summary)[:400]
    ours = "Traceback" in done.stderr and "OutOfMemoryError" not in done.stderr
    assert not ours, done.stderr[-300:]
    if done.returncode != 0:  # only FAILED means that the tool found an error
        raise NotHere(f"the tool ended with {done.returncode}: {done.stderr[-200:]}")
    return {"summary": summary[-1:]}


def run_tool(tool: str, variant: str) -> subprocess.CompletedProcess[str]:
    """Run `exercise(variant)` in a process under a tool. Raises NotHere on a timeout."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FAILED)]
    command += ["--print-limit", "20"]
    if tool == "racecheck":
        command += ["--racecheck-detect-level", "error"]
    if tool == "memcheck":  # our launchers check every call; PyTorch provokes API errors on purpose
        command += ["--report-api-errors", "no"]
    # initcheck must see all kernels: it would miss the writes of excluded kernels.
    if variant.startswith("cuda") and tool != "initcheck":
        command += ["--kernel-name", OURS]
    command += [sys.executable, "-m", "bench.gpu.sanitizer", variant]
    # Without PyTorch's cache every tensor is a separate allocation with checked bounds.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise NotHere(f"took longer than {SECONDS:.0f} s under the tool") from None
    print(done.stdout, done.stderr)
    return done


def list_tool_units(
    setting: Setting, tools: tuple[str, ...], names: tuple[str, ...], limit: float
) -> list[Unit]:
    return [
        Unit(f"{tool}: {name}", functools.partial(run, tool, name, setting.device), limit=limit)
        for tool in tools
        for name in names
    ]


def list_units(setting: Setting) -> list[Unit]:
    return list_tool_units(setting, TOOLS, VARIANTS, limit=120)


def list_plan_units(setting: Setting) -> list[Unit]:
    """The two most productive tools over the CUDA kernels."""
    alive = tuple(name for name in VARIANTS[:2] if name not in setting.hung)
    return list_tool_units(setting, TOOLS[:2], alive, limit=60)


def exercise(variant: str) -> int:
    """Forward and backward on ragged shapes, in one chunk and in several. Returns an exit status:
    UNSUPPORTED if the variant does not run on this device."""
    import torch

    from bench.gpu.variants import force_variant, list_variants
    from bench.gpu.workspace import limit_workspace
    from cpo_fast.testing.loss_problems import LossProblem

    if variant not in list_variants("cuda"):
        return UNSUPPORTED
    for shape in ((300, 1013, 72), (5, 20007, 64)):
        data = LossProblem("random", *shape, torch.bfloat16, "cuda")
        for mib in (1, 64):
            leaves = data.leaves()
            with force_variant(variant) as impl, limit_workspace(mib):
                out = data.loss(*leaves, leaves[0].detach().roll(1, 0) * 20, impl)
                torch.autograd.grad(out.loss, leaves)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(exercise(sys.argv[1]))

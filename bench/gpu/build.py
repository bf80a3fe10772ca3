"""Builds the native parts in place, where there are compilers; nothing is installed."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from typing import Any

from bench.gpu.units import ROOT, NotHere, Setting, Unit


def build(needs_cuda: bool) -> dict[str, Any]:
    for needed in ("pybind11", "setuptools"):
        if importlib.util.find_spec(needed) is None:
            raise NotHere(f"{needed} is needed to build; the reference and Triton remain")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(run.stdout, run.stderr)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    names = ("_cpu", "_cuda")
    built = [name for name in names if (ROOT / "cpo_fast" / f"{name}{suffix}").exists()]
    assert run.returncode == 0, run.stderr[-300:]
    if needs_cuda and "_cuda" not in built:
        if shutil.which("nvcc") is None:
            raise NotHere('no nvcc: impl="cuda" cannot be built and is not checked')
        raise AssertionError("nvcc is here, but cpo_fast._cuda was not built; see the log")
    return {"built": built}


def units(setting: Setting) -> list[Unit]:
    return [Unit("native parts", lambda: build(setting.device == "cuda"), limit=240)]

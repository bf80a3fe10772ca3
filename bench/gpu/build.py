"""The native parts: built in place, or taken from a prebuilt kit. Nothing is installed outside the
tree and the scratch folder."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from bench.gpu.units import ROOT, NotHere, Setting, Unit


def build(needs_cuda: bool) -> dict[str, Any]:
    for needed in ("pybind11", "setuptools"):
        if importlib.util.find_spec(needed) is None:
            raise NotHere(f"{needed} is needed to build; the reference and Triton still run")
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
        raise AssertionError("nvcc was found, but cpo_fast._cuda was not built; see the log")
    return {"built": built}


_placed = False  # whether this process has installed a kit's binary


def unpack(kit: str, scratch: str) -> dict[str, Any]:
    """Install the peers' wheels for later processes and the kit's binary."""
    global _placed
    from bench.gpu import kit as kits

    found = kits.unpack(Path(kit), Path(scratch))
    _placed = found.cuda
    return {**found.record(), "environment": found.environment}


def build_unless_placed(setting: Setting) -> dict[str, Any]:
    if _placed:
        raise NotHere("the kit's binary is installed")
    if setting.device == "cpu":
        raise NotHere("a CPU needs no CUDA kernels")
    return build_cuda()


def build_cuda(root: Path = ROOT) -> dict[str, Any]:
    """Build `cpo_fast._cuda` alone in place, for sm_90a and this Python. Objects are cached in
    build/: a second build only links."""
    from bench import gpu_kit

    place = root / "cpo_fast" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    fresh = place.with_name(f".{place.name}.new")
    here = gpu_kit.Target(sysconfig.get_path("include"), sysconfig.get_config_var("EXT_SUFFIX"))
    try:
        gpu_kit.Builder(here, root / "build" / "gpu-kit").build((), fresh)
    except (ImportError, gpu_kit.Missing) as reason:
        raise NotHere(f"_cuda cannot be built here, and is not checked: {reason}") from None
    fresh.replace(place)
    return {"built": ["_cuda"]}


def kit_units(setting: Setting) -> list[Unit]:
    return [
        Unit("kit", functools.partial(unpack, setting.kit, setting.scratch), limit=60),
        Unit("native parts", functools.partial(build_unless_placed, setting), limit=70),
    ]


def wheel_units(setting: Setting) -> list[Unit]:
    """A kit's wheels and binary; without a binary nothing is built."""
    return kit_units(setting)[:1]


def units(setting: Setting) -> list[Unit]:
    return [Unit("native parts", lambda: build(setting.device == "cuda"), limit=240)]

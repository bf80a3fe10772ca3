"""Native extensions: built in place, or installed from a prebuilt kit. Nothing is installed outside
the tree and the scratch folder."""

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
            raise NotHere(f"the build needs {needed}; the reference and Triton still run")
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


_installed = False  # whether this process has installed a kit's binary


def unpack(kit: str, scratch: str) -> dict[str, Any]:
    """Install the kit's binary, and the peers' wheels for later processes."""
    global _installed
    from bench.gpu import kit as kits

    found = kits.unpack(Path(kit), Path(scratch))
    _installed = found.cuda
    return {**found.make_record(), "environment": found.environment}


def build_unless_installed(setting: Setting) -> dict[str, Any]:
    if _installed:
        raise NotHere("the kit's binary is installed")
    if setting.device == "cpu":
        raise NotHere("CUDA kernels are not needed on a CPU")
    return build_cuda()


def build_cuda(root: Path = ROOT) -> dict[str, Any]:
    """Build only `cpo_fast._cuda` in place, for sm_90a and this Python. Objects are cached in
    build/: a second build only links."""
    from bench import gpu_kit

    place = root / "cpo_fast" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    fresh = place.with_name(f".{place.name}.new")
    here = gpu_kit.Target(sysconfig.get_path("include"), sysconfig.get_config_var("EXT_SUFFIX"))
    try:
        gpu_kit.Builder(here, root / "build" / "gpu-kit").build((), fresh)
    except (ImportError, gpu_kit.Missing) as reason:
        raise NotHere(f"_cuda cannot be built and is not checked: {reason}") from None
    fresh.replace(place)
    return {"built": ["_cuda"]}


def list_kit_units(setting: Setting) -> list[Unit]:
    return [
        Unit("kit", functools.partial(unpack, setting.kit, setting.scratch), limit=60),
        Unit("native parts", functools.partial(build_unless_installed, setting), limit=70),
    ]


def list_wheel_units(setting: Setting) -> list[Unit]:
    """A kit's wheels and binary; a missing binary is not built."""
    return list_kit_units(setting)[:1]


def list_units(setting: Setting) -> list[Unit]:
    return [Unit("native parts", lambda: build(setting.device == "cuda"), limit=240)]

"""Where the CUDA kernels can run in tests: on a GPU, or as their own source in the emulator.

The emulator (tests/cuda_emulator) needs a C++ compiler and CUDA's headers. Only two
things of the source are translated, because they are not C++: launches, and the declaration of
dynamic shared memory; one instruction, ex2, becomes a function call.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pybind11
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
EMULATOR = ROOT / "tests" / "cuda_emulator"
REPLACED = ("ptx.h", "wgmma.h")


@dataclass(frozen=True)
class Place:
    """Kernels, the tensors they take, and the site arguments of a launch."""

    module: Any
    device: torch.device
    site: dict[str, int]

    def launch(self, kernel: str, **arguments: Any) -> None:
        """Calls a launcher, tensors by address (None: 0), and waits for it."""
        by_address = {
            name: value.data_ptr() if isinstance(value, Tensor) else 0 if value is None else value
            for name, value in arguments.items()
        }
        getattr(self.module, kernel)(**by_address, **self.site)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def toolkit_include() -> Path | None:
    """A folder with the CUDA headers."""
    homes = [Path(os.environ["CUDA_HOME"])] if "CUDA_HOME" in os.environ else []
    if shutil.which("nvcc"):
        dry = subprocess.run(
            ["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True, check=False
        )
        homes += [Path(top) for top in re.findall(r"TOP=(\S+)", dry.stderr)]
    includes = [home / "include" for home in homes]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:  # its wheel carries the headers too
        includes.append(Path(triton.origin).parent / "backends" / "nvidia" / "include")
    return next((path for path in includes if (path / "cudaTypedefs.h").exists()), None)


def translate(source: str) -> str:
    source = source.replace("#include <cuda_runtime.h>", '#include "emulator.h"')
    source = re.sub(r'asm\("ex2\.approx.*', "y = exp2f(x);", source)
    source = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];",
        r"auto* const \2 = reinterpret_cast<\1*>(emu::dynamic_shared());",
        source,
    )
    return re.sub(
        r"(\w+(?:<[^<>;]*>)?)<<<(.*?)>>>\s*\((.*?)\);",
        r'emu::launch([&] { \1(\3); }, "\1", \2);',
        source,
        flags=re.S,
    )


def build_emulated(folder: Path, include: Path, *macros: str) -> Any:
    """cpo_fast._cuda from csrc/cuda, for the CPU; `macros` such as "-DCPO_LAG=1"."""
    for path in (ROOT / "csrc" / "cuda").iterdir():
        if path.name not in REPLACED:
            name = f"{path.stem}_cu.cpp" if path.suffix == ".cu" else path.name
            (folder / name).write_text(translate(path.read_text()))
    found = [folder, EMULATOR, include, pybind11.get_include(), sysconfig.get_path("include")]
    flags = ["-O1", "-std=c++17", "-fPIC", "-w", *macros, *(f"-I{path}" for path in found)]

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        subprocess.run(["g++", *flags, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*folder.glob("*.cpp"), EMULATOR / "emulator.cpp"]))
    library = folder / "_cuda.so"
    subprocess.run(["g++", "-shared", *objects, "-o", str(library), "-lpthread"], check=True)
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(library))
    spec = importlib.util.spec_from_file_location("_cuda", library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module

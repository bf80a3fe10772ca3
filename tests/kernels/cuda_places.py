"""Where the CUDA kernels can run in tests: on a GPU, or as their own source in the emulator.

The emulator (tests/kernels/cuda_emulator) needs a C++ compiler and CUDA's headers. Only two
things of the source are translated, because they are not C++: launches, and the declaration of
dynamic shared memory; one instruction, ex2, becomes a function call.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pybind11
import pytest
import torch
from torch import Tensor

from bench.gpu.kit import VARIANTS as BUILDS
from cpo_fast.loss import chunked, cuda, cuda_launch

ROOT = Path(__file__).parents[2]
EMULATOR = ROOT / "tests" / "kernels" / "cuda_emulator"
REPLACED = ("ptx.h", "wgmma.h")
VARIANTS = list(BUILDS.values())


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


def build_emulated(folder: Path, include: Path, *macros: str) -> Path:
    """The library cpo_fast._cuda from csrc/cuda, for the CPU; `macros` such as "-DCPO_LAG=1"."""
    for path in (ROOT / "csrc" / "cuda").iterdir():
        if path.name not in REPLACED:
            name = f"{path.stem}_cu.cpp" if path.suffix == ".cu" else path.name
            (folder / name).write_text(translate(path.read_text()))
    found = [folder, EMULATOR, include, pybind11.get_include(), sysconfig.get_path("include")]
    # Checked jumps would refuse to switch stacks.
    flags = ["-O1", "-U_FORTIFY_SOURCE", "-std=c++17", "-fPIC", "-w", *macros]
    flags += [f"-I{path}" for path in found]

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        subprocess.run(["g++", *flags, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*folder.glob("*.cpp"), EMULATOR / "emulator.cpp"]))
    library = folder / "_cuda.so"
    subprocess.run(["g++", "-shared", *objects, "-o", str(library), "-lpthread"], check=True)
    return library


def load_emulated(library: Path) -> Any:
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(library))
    spec = importlib.util.spec_from_file_location("_cuda", library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def emulated_log(module: Any) -> list[tuple[str, int, int]]:
    """Launches of an emulated module since the last call: name, bulk copies, cluster barriers."""
    function = ctypes.CDLL(module.__file__).emulator_log
    function.restype = ctypes.c_char_p
    parts = (entry.split(":") for entry in function().decode().split())
    return [(name, int(copies), int(barriers)) for name, copies, barriers in parts]


# --- fixtures and inputs of the tests -------------------------------------------------------------

HOPPER, AMPERE = "emulated-hopper", "emulated-ampere"
GPU = pytest.param("gpu", marks=pytest.mark.gpu)
NAN = float("nan")


@pytest.fixture(scope="module")
def emulated(shared_folder: Path) -> Any:
    include = toolkit_include()
    if shutil.which("g++") is None or include is None:
        pytest.skip("the emulator needs g++ and CUDA's headers (a toolkit's or triton's)")
    folder = shared_folder / "emulated"
    with (shared_folder / "emulated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / "_cuda.so"
        if not library.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            build_emulated(folder, include)
    return load_emulated(library)


def the_gpu() -> Place:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda", 0)
    if cuda.obstacle(device):
        pytest.skip("cpo_fast._cuda is not built, or the device is not of capability 8.x or 9.0")
    site = {"device": 0, "stream": torch.cuda.current_stream(0).cuda_stream}
    return Place(cuda_launch.kernels(), device, site)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    if request.param == "gpu":
        yield the_gpu()
    else:
        module = request.getfixturevalue("emulated")
        site = {"device": 0 if request.param == HOPPER else 1, "stream": 0}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_launch, "kernels", lambda: module)
            patch.setattr(cuda_launch, "site", lambda tensor: site)
            patch.setattr(cuda, "_has_wgmma", lambda device: request.param == HOPPER)
            patch.setattr(chunked, "multiprocessors", lambda device: 132)
            yield Place(module, torch.device("cpu"), site)


def needs_hopper(place: Place) -> None:
    if place.device.type == "cuda" and torch.cuda.get_device_capability(0) != (9, 0):
        pytest.skip("linear_lse needs compute capability 9.0")


everywhere = pytest.mark.parametrize("place", [HOPPER, AMPERE, GPU], indirect=True)
on_hopper = pytest.mark.parametrize("place", [HOPPER, GPU], indirect=True)


def normal(place: Place, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(place.device)


def labels_for(place: Place, T: int, V: int) -> Tensor:
    """Random labels, some ignored, and corner cases."""
    labels = torch.randint(V, (T,), generator=torch.Generator().manual_seed(T + V))
    labels[3::5] = -1
    labels[0] = V - 1
    if T > 1:
        labels[1] = 0
    if T > 2:
        labels[2] = V  # out of range: ignored, and nothing read or written there
    return labels.to(place.device)


def row_truth(
    z: Tensor, labels: Tensor, bias: Tensor | None, softcap: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """float64 (logps, lse, gradient) of logits z [C, V]."""
    raw = z.double().requires_grad_()
    with torch.enable_grad():
        final = raw if bias is None else raw + bias.double()
        if softcap:
            final = softcap * torch.tanh(final / softcap)
        final = final / temperature
        lse = final.logsumexp(1)
        scored = (labels >= 0) & (labels < z.shape[1])
        picked = final.gather(1, labels.where(scored, 0)[:, None]).squeeze(1)
        logps = (picked - lse).where(scored, 0)
        (gradient,) = torch.autograd.grad(logps.sum(), raw)
    return logps.detach(), lse.detach(), gradient

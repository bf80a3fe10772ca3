"""Build steps beyond pyproject.toml: the native kernels of csrc/, and kernels/ as a subpackage.

The native parts do not include torch: they build in seconds and work with every torch version. The
CPU part needs a C++ compiler, the CUDA part nvcc (no device). Both are optional: without them the
package runs on its reference implementation.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

ROOT = Path(__file__).parent
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "--threads=2",  # one per target
    "--compiler-options=-fPIC,-fvisibility=hidden",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
]


def cuda_home() -> Path | None:
    """The toolkit's folder: CUDA_HOME, or the one of nvcc on the PATH."""
    if named := os.environ.get("CUDA_HOME"):
        return Path(named)
    if shutil.which("nvcc") is None:
        return None
    dry = subprocess.run(["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True, check=False)
    tops = [line.split("TOP=", 1)[1] for line in dry.stderr.splitlines() if "TOP=" in line]
    return Path(tops[0]).resolve() if tops else None


def sources(folder: str, *suffixes: str) -> list[str]:
    return sorted(
        str(p.relative_to(ROOT)) for p in (ROOT / folder).glob("*") if p.suffix in suffixes
    )


class BuildNative(build_ext):
    """Compiles .cu files with nvcc; a failed extension does not fail the installation."""

    def build_extension(self, ext: Extension) -> None:
        kernels = [source for source in ext.sources if source.endswith(".cu")]
        inputs = [*ext.sources, *ext.depends, __file__]
        if not self.force and not newer_group(inputs, self.get_ext_fullpath(ext.name), "newer"):
            return  # up to date
        force, self.force = self.force, True  # setuptools would ignore changes of .cu files
        try:
            with ThreadPoolExecutor() as pool:
                ext.extra_objects = list(pool.map(self.compile_cuda, kernels))
            ext.sources = [source for source in ext.sources if source not in kernels]
            super().build_extension(ext)
        except Exception as error:  # any failure costs this implementation only
            self.warn(f"{ext.name} was not built ({error}); the package works without it")
        finally:
            self.force = force

    def compile_cuda(self, source: str) -> str:
        target = Path(self.build_temp) / f"{source}.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"nvcc {source}", file=sys.stderr)
        subprocess.run(["nvcc", *NVCC_FLAGS, "-c", source, "-o", str(target)], check=True)
        return str(target)


extensions = [
    Extension(
        "cpo_fast._cpu",
        sources("csrc/cpu", ".cpp"),
        depends=sources("csrc/cpu", ".h"),
        include_dirs=[pybind11.get_include(), "csrc/cpu"],
        extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-fvisibility=hidden"],
        extra_link_args=["-fopenmp"],
        language="c++",
    )
]
if (toolkit := cuda_home()) is not None and sources("csrc/cuda", ".cu"):
    extensions.append(
        Extension(
            "cpo_fast._cuda",
            sources("csrc/cuda", ".cpp", ".cu"),
            depends=sources("csrc/cuda", ".h"),
            include_dirs=[pybind11.get_include(), "csrc/cuda", str(toolkit / "include")],
            library_dirs=[str(toolkit / "lib64"), str(toolkit / "lib")],
            libraries=["cudart_static", "rt", "pthread", "dl"],
            extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden"],
            language="c++",
        )
    )

setup(
    packages=[*find_packages(include=["cpo_fast", "cpo_fast.*"]), "cpo_fast.kernels"],
    package_dir={"cpo_fast.kernels": "kernels"},
    package_data={
        "cpo_fast": ["py.typed", "**/*.json", "**/*.yaml", "**/*.html", "**/*.css", "**/*.js"]
    },
    ext_modules=extensions,
    cmdclass={"build_ext": BuildNative},
)

"""Index arithmetic and row mathematics of the CUDA kernels, compiled for and run on the CPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_index_arithmetic_and_logp_on_the_cpu(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed: csrc/cuda/index.h cannot be compiled for the CPU")
    program = tmp_path / "check"
    source = ROOT / "tests" / "kernels" / "cuda_index_check.cpp"
    flags = ["-O2", "-std=c++17", "-Wall", "-Werror", f"-I{ROOT / 'csrc' / 'cuda'}"]
    subprocess.run(["g++", *flags, str(source), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "ok\n")

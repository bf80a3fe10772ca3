"""The tests of the Triton kernels, run in Triton's interpreter, which needs its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from tests.kernels.triton_cases import INTERPRETING

triton = pytest.importorskip("triton")
TESTS = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING, reason="already in the interpreter")
def test_kernels_in_the_interpreter(pytestconfig: pytest.Config) -> None:
    versions = [tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, numpy)]
    if versions[0] < (3, 9) and versions[1] >= (2, 4):
        pytest.skip("older interpreters of Triton (3.6 at least) fail with numpy >= 2.4")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        + ["-m", pytestconfig.getoption("markexpr")]
        + [str(TESTS / f"test_triton_{module}.py") for module in ("kernels", "loss", "layers")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=TESTS.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout

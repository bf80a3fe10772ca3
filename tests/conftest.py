"""An environment without settings of the machine, one thread a process, the longest files first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in [*os.environ]:
    launched = name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if launched or (name.startswith("CPO_FAST_") and name != "CPO_FAST_LONG_TESTS"):
        del os.environ[name]

# A busy machine draws and tests examples slowly; that is no failure.
settings.register_profile("any pace", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any pace")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all processes of a test run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


TRAINING = ("tests/run/", "tests/training/")
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154"
    "789c63f8ffff3f0005fe02fe0def46b80000000049454e44ae426082"
)


@pytest.fixture(scope="module", autouse=True)
def pixels_as_figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """The runs of `TRAINING` write one pixel per figure: figures, which tests/report draws, take
    half the time of a small run."""
    if not request.node.nodeid.startswith(TRAINING):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        draw_pixels(patch.setattr)
        yield


def draw_pixels(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let every figure of a report be one pixel."""
    from cpo_fast.report.figures import Panel

    replace(Panel, "render", lambda panel, *themes: [PIXEL] * len(themes))


LONGEST = (
    "tests/kernels/test_triton_interpreter.py",
    "tests/training/test_distributed.py",
    "tests/test_docs.py",
    "tests/training/test_resume.py",
    "tests/run/test_whole_runs.py",
    "tests/bench/test_gpu_check.py",
    "tests/bench/test_gpu_plans.py",
    "tests/experiments/test_study.py",
    "tests/test_packaging.py",
    "tests/kernels/test_cuda_compile.py",
    "tests/kernels/test_cuda_rows.py",
    "tests/kernels/test_cuda_kernels.py",
    "tests/model/test_attention.py",
    "tests/kernels/test_triton_compile.py",
    "tests/loss/test_cpu.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first, so that no process is left alone with one at the end."""
    rank = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.split("::")[0], len(LONGEST)))

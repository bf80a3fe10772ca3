"""The package installs without a compiler, and what it installs is complete."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "kernels", "cpo_fast")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site folder with the package, built where every compiler fails and nvcc is not found."""
    pytest.importorskip("setuptools", reason="the dev extra is not installed")
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skip)
        else:
            shutil.copy(ROOT / name, source / name)
    tools = tmp_path_factory.mktemp("bin")
    for name in ("cc", "c++", "gcc", "g++"):
        (tools / name).write_text("#!/bin/sh\necho no compiler here >&2\nexit 1\n")
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": str(tools), "CC": "cc", "CXX": "c++"}
    environment.pop("CUDA_HOME", None)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
               "--no-build-isolation", "--target", str(site), str(source)]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return site


# A development install hooks the import system and would lend its native modules to the copy.
UNHOOK = "import sys\nsys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)]\n"


def run(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-P", "-c", UNHOOK + code]
    return subprocess.run(
        command, cwd=site, env=environment, capture_output=True, text=True, check=False
    )


def test_without_a_compiler_it_runs_on_the_reference_and_says_so_once(installed: Path) -> None:
    code = (
        "import torch, cpo_fast\n"
        f"assert cpo_fast.__file__.startswith({str(installed)!r}), cpo_fast.__file__\n"
        "h, w, y = torch.randn(3, 8), torch.randn(20, 8), torch.tensor([1, 2, 3])\n"
        "for _ in range(2): cpo_fast.linear_logprobs(h, w, y)\n"
        "print(','.join(cpo_fast.available_impls()))"
    )
    done = run(installed, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "reference"
    assert done.stderr.count("RuntimeWarning") == 1


def test_everything_that_is_not_python_is_installed_too(installed: Path) -> None:
    for name in (
        "concepts/graph.json",
        "training/phantom.yaml",
        "py.typed",
        "kernels/row_kernel.py",
    ):
        assert (installed / "cpo_fast" / name).is_file(), name
    templates = {p.name for p in (ROOT / "cpo_fast" / "report" / "templates").iterdir()}
    assert templates <= {
        p.name for p in (installed / "cpo_fast" / "report" / "templates").iterdir()
    }


def test_the_embedded_default_is_found_in_the_installed_package(installed: Path) -> None:
    code = (
        "from cpo_fast.training.arguments import parse_arguments\n"
        "print(parse_arguments([]).output_dir)"
    )
    assert run(installed, code).stdout.strip() == "runs/phantom"

"""sdist and wheel build in isolation, and the wheel works in a separate environment.

Built where every compiler fails and nvcc is not found: the wheel has to work without them. (`make
setup` builds with them; all other tests run on that.) The environment is new and empty but for the
dependencies, which it sees where this Python has them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpo_fast.cli import COMMANDS
from cpo_fast.version import __version__
from tests.docs_blocks import ROOT, blocks

pytestmark = [pytest.mark.slow, pytest.mark.complete]
BUILT = ("*.so", "__pycache__", "_build", ".git", ".venv", "runs", "build", "dist", "*.egg-info",
         "gpu-kit*", ".*_cache", ".hypothesis", ".benchmarks")  # fmt: skip
TOOLS = ("setuptools", "pybind11")
"""The build requirements in pyproject.toml."""


def checked(
    command: list[str], environment: dict[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of these sources and the wheel built from it."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*BUILT, "shared"))
    # An isolated build gets its tools from an index. They are downloaded here, so that the test is
    # skipped without a network and the build itself downloads nothing.
    tools = folder / "tools"
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-c",
             str(ROOT / "constraints.txt"), "-d", str(tools), *TOOLS]  # fmt: skip
    fetched = subprocess.run(fetch, capture_output=True, text=True, check=False)
    if fetched.returncode != 0:
        pytest.skip("no package index to take setuptools and pybind11 from")
    nothing = folder / "bin"
    nothing.mkdir()
    for name in ("cc", "c++", "gcc", "g++"):
        (nothing / name).write_text("#!/bin/sh\necho no compiler here >&2\nexit 1\n")
        (nothing / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": str(nothing),
        "CC": "cc",
        "CXX": "c++",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tools),
    }
    environment.pop("CUDA_HOME", None)
    command = [sys.executable, "-m", "build", "--outdir", str(folder / "dist"), str(source)]
    checked(command, environment, folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def python(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The interpreter of a new environment with the wheel installed."""
    place = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(place, with_pip=False)
    interpreter = place / "bin" / "python"
    (site,) = place.glob("lib/python*/site-packages")
    # .pth files in folders that a .pth file names are not read: no development install comes along.
    ours = [p for p in sys.path if p.endswith("-packages") and Path(p).is_dir()]
    (site / "dependencies.pth").write_text("\n".join(ours) + "\n")
    (wheel,) = built.glob("*.whl")
    command = [sys.executable, "-m", "pip", f"--python={interpreter}", "install", "--quiet",
               "--no-deps", "--no-index", "--ignore-installed", "--disable-pip-version-check",
               str(wheel)]  # fmt: skip
    checked(command, dict(os.environ), place)
    yield str(interpreter)


def run(python: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        [python, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_sdist_has_the_whole_source(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    for folder in ("csrc", "kernels", "cpo_fast", "tests", "bench", "docs", "examples"):
        for path in (ROOT / folder).rglob("*"):
            name = str(path.relative_to(ROOT))
            skipped = path.suffix in (".so", ".pyc") or {"__pycache__", "_build"} & {*path.parts}
            if path.is_file() and not skipped and not name.startswith("cpo_fast/kernels"):
                assert name in held, f"{name} is not in the sdist"
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "constraints.txt"} <= held


def test_wheel_has_only_the_package(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name.split("/")[0] for name in names if name.endswith("/METADATA"))
        metadata = archive.read(f"{info}/METADATA").decode()
    assert {name.split("/")[0] for name in names} == {"cpo_fast", info}
    assert not any(name.endswith(".so") for name in names)  # nothing was compiled
    for path in (ROOT / "cpo_fast").rglob("*"):
        if path.is_file() and path.suffix not in (".so", ".pyc"):
            assert str(path.relative_to(ROOT)) in names
    assert {f"cpo_fast/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")} <= names
    assert f"Version: {__version__}\n" in metadata
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata.count("\nRequires-Dist: ") >= len(declared["dependencies"])


def test_version_is_defined_once() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in declared["project"]["dynamic"]
    found = [
        str(path.relative_to(ROOT))
        for path in (*(ROOT / "cpo_fast").rglob("*.py"), ROOT / "setup.py", ROOT / "docs/conf.py")
        if re.search(rf"[\"']{re.escape(__version__)}[\"']", path.read_text(encoding="utf-8"))
    ]
    assert found == ["cpo_fast/version.py"]


def test_without_compiler_the_reference_is_used_with_one_warning(
    python: str, tmp_path: Path
) -> None:
    code = (
        "import cpo_fast, torch, warnings; warnings.simplefilter('always')\n"
        "h, w = torch.randn(4, 8), torch.randn(9, 8)\n"
        "y = torch.randint(0, 9, (4,))\n"
        "for _ in range(2): cpo_fast.linear_logprobs(h, w, y)\n"
        "print(cpo_fast.__file__, ','.join(cpo_fast.available_impls()))"
    )
    done = run(python, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    place, impls = done.stdout.split()
    assert str(Path(python).parents[1]) in place and impls == "reference"
    assert done.stderr.count("RuntimeWarning") == 1


def test_console_command(python: str, tmp_path: Path) -> None:
    command = str(Path(python).with_name("cpo-fast"))
    assert run(command, tmp_path, "--version").stdout.strip() == __version__
    listed = run(command, tmp_path, "--help")
    assert listed.returncode == 0 and all(f"\n  {name} " in listed.stdout for name in COMMANDS)
    wrong = run(command, tmp_path, "trian")
    assert wrong.returncode == 2 and "trian is not a command; did you mean train?" in wrong.stderr
    drawn = run(command, tmp_path, "phantom", "--output_dir", "d", "--num_studies", "2")
    assert drawn.returncode == 0 and (tmp_path / "d" / "files").is_dir(), drawn.stderr


def test_doctor_lists_missing_parts(python: str, tmp_path: Path) -> None:
    done = run(python, tmp_path, "-m", "cpo_fast.doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "missing  cpo_fast._cpu, not built: a C++ compiler is needed" in done.stdout
    assert "no       cpu on cpu: cannot be imported" in done.stdout


def test_readme_loss_example_runs(python: str, tmp_path: Path) -> None:
    (block,) = (b for b in blocks(ROOT / "README.md") if "import cpo_loss" in b.text)
    done = run(python, tmp_path, "-c", block.text)
    assert done.returncode == 0 and done.stdout.strip() == "0.6931", done.stderr


def test_installed_package_has_the_embedded_default(python: str, tmp_path: Path) -> None:
    code = (
        "from cpo_fast.run.settings import read_settings\nprint(read_settings([]).args.output_dir)"
    )
    assert run(python, tmp_path, "-c", code).stdout.strip() == "runs/phantom"


PROGRAM = """
import torch
from cpo_fast import CPOLoss, CPOOutput, cpo_loss, linear_logprobs

def step(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    pairs = torch.tensor([[0, 1]])
    out: CPOOutput = cpo_loss(hidden, head, labels, labels, pairs, ref_logps=torch.zeros(2))
    also: CPOOutput = CPOLoss(beta=0.1)(hidden, head, labels, labels, pairs)
    return out.loss + also.loss + linear_logprobs(hidden, head, labels).sum()
"""


def test_user_program_is_type_checked(python: str, tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="the dev extra is not installed")
    (tmp_path / "right.py").write_text(PROGRAM)
    wrong = PROGRAM.replace("beta=0.1", "beta='0.1'").replace("labels).sum()", "labels).total()")
    (tmp_path / "wrong.py").write_text(wrong)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent",
               f"--python-executable={python}", "--cache-dir", str(tmp_path / "cache"),
               "right.py", "wrong.py"]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert errors and all(line.startswith("wrong.py") for line in errors), done.stdout
    found = " ".join(errors)
    assert "[arg-type]" in found and "[attr-defined]" in found

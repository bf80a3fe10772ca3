"""kernels/ is `cpo_fast.kernels`, and never shadows the PyPI package `kernels`.

transformers imports `kernels` when it is installed. Python started in the repository root looks
there first, so that a kernels/__init__.py would win over the installed package. Without that file
the folder is at most a namespace package, which any real package of the name beats, wherever it
stands on the path, and which transformers does not take for an installed one.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
USE_TRANSFORMERS = (
    "import transformers; from transformers import Qwen2_5_VLForConditionalGeneration; "
    "from transformers.utils import is_kernels_available; print(is_kernels_available())"
)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def python(code: str, folder: Path, *path: Path) -> str:
    """What `code` prints, run with `folder` as the working directory, which -c puts on the path."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(entry) for entry in path),
        "HF_HUB_OFFLINE": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder like site-packages that holds a stand-in for the PyPI package `kernels`."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    folder = tmp_path / "site"
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text(
        "from unittest.mock import MagicMock\n"
        "def use_kernel_forward_from_hub(*names, **options):\n"
        "    return lambda thing: thing\n"
        "use_kernelized_func = use_kernel_forward_from_hub\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'):\n"
        "        raise AttributeError(name)\n"
        "    return MagicMock()\n"
    )
    metadata = folder / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
    )
    return folder


def test_the_folder_is_no_regular_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "cpo_fast" / "kernels"
    assert link.resolve() == ROOT / "kernels"
    assert not link.is_symlink() or not link.readlink().is_absolute()


@needs_triton
@pytest.mark.parametrize(
    "place",
    ["root", *(pytest.param(p, marks=pytest.mark.complete) for p in ("tests", "elsewhere"))],
)
def test_kernels_import_from_any_folder(place: str, tmp_path: Path) -> None:
    folder = {"root": ROOT, "tests": ROOT / "tests", "elsewhere": tmp_path}[place]
    code = "import cpo_fast.kernels.lean_rows as module; print(module.__file__)"
    found = Path(python(code, folder, ROOT)).resolve()
    assert found == ROOT / "kernels" / "lean_rows.py"


@pytest.mark.parametrize("place", ["root", "docs"])
def test_an_installed_kernels_package_wins(place: str, site: Path) -> None:
    folder = {"root": ROOT, "docs": ROOT / "docs"}[place]
    found = python("import kernels; print(kernels.__file__)", folder, site)
    assert Path(found) == site / "kernels" / "__init__.py"
    # Even where the repository root stands before site-packages.
    found = python("import kernels; print(kernels.__file__)", folder, ROOT, site)
    assert Path(found) == site / "kernels" / "__init__.py"


@needs_triton
def test_both_packages_in_one_process(site: Path) -> None:
    code = "import kernels, cpo_fast.kernels.lean_rows as o; print(kernels.__file__, o.__file__)"
    theirs, ours = python(code, ROOT, site).split()
    assert Path(theirs) == site / "kernels" / "__init__.py"
    assert Path(ours).resolve() == ROOT / "kernels" / "lean_rows.py"


@pytest.mark.complete
@pytest.mark.slow
def test_transformers_from_the_root_without_the_package() -> None:
    spec = importlib.util.find_spec("kernels")
    if spec is not None and spec.origin is not None:
        pytest.skip("the PyPI package kernels is installed here")
    assert python(USE_TRANSFORMERS, ROOT) == "False"


@pytest.mark.complete
@pytest.mark.slow
def test_transformers_from_the_root_with_the_package(site: Path) -> None:
    assert python(USE_TRANSFORMERS, ROOT, site) == "True"

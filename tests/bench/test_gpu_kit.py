"""Unpacking the kit for a GPU machine, with test wheels and binaries."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import pytest

from bench.gpu import kit as kits
from tests.bench.wheels import make_wheel

pytestmark = pytest.mark.complete
ROOT = Path(__file__).resolve().parents[2]
SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Extension modules `_cuda` with their name as docstring, and one that hangs on import."""
    folder = tmp_path_factory.mktemp("binaries")
    headers = [f"-I{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
    made = {}
    for name, start in (("default", ""), ("lag4", ""), ("hangs", "for (;;) sleep(1);")):
        source = folder / f"{name}.cpp"
        source.write_text(
            "#include <pybind11/pybind11.h>\n#include <unistd.h>\n"
            f'PYBIND11_MODULE(_cuda, m) {{ m.doc() = "{name}"; {start} }}\n'
        )
        made[name] = folder / name / f"_cuda{SUFFIX}"
        made[name].parent.mkdir()
        command = ["c++", "-O0", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden"]
        command += [*headers, str(source), "-o", str(made[name])]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("no C++ compiler with Python's headers")
    return made


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with kernel sources and no binary."""
    root = tmp_path / "tree"
    (root / "csrc" / "cuda").mkdir(parents=True)
    (root / "cpo_fast").mkdir()
    (root / "csrc" / "cuda" / "a.cu").write_text("kernel")
    return root


def make_kit(folder: Path, root: Path, cuda: dict[str, Path]) -> Path:
    """A kit with the binaries `cuda` for this Python, and a wheel."""
    folder.mkdir()
    file = make_wheel(folder / "wheels").relative_to(folder)
    entries = {}
    for name, path in cuda.items():
        place = folder / "cuda" / name / path.name
        place.parent.mkdir(parents=True)
        place.write_bytes(path.read_bytes())
        entries[name] = {"file": str(place.relative_to(folder)), "bytes": 1, "flags": []}
    manifest = {
        "sources": kits.hash_cuda_sources(root),
        "suffix": SUFFIX,
        "cuda": entries,
        "cuda_missing": None,
        "paths": ["tiny_peer/inner"],
        "wheels": [{"name": "tiny-peer", "version": "1.2", "file": str(file), "bytes": 1}],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def get_target(root: Path) -> Path:
    return root / "cpo_fast" / f"_cuda{SUFFIX}"


def test_an_absent_or_damaged_kit_is_no_error(tmp_path: Path) -> None:
    found = kits.unpack(tmp_path / "gpu-kit", tmp_path / "scratch")
    assert (found.environment, found.wheels, found.cuda, found.variants) == ({}, (), False, ())
    assert "no GPU kit" in found.notes[0] and "make gpu-kit" in found.notes[0]
    for text, words in (("{", "is damaged"), ("{}", "cuda")):
        (tmp_path / "manifest.json").write_text(text)
        found = kits.unpack(tmp_path, tmp_path / "scratch")
        assert not found.cuda and words in found.notes[0]


def test_a_kit_is_unpacked(tmp_path: Path, tree: Path, binaries: dict[str, Path]) -> None:
    cuda = {name: binaries[name] for name in ("default", "lag4")}
    kit, scratch = make_kit(tmp_path / "kit", tree, cuda), tmp_path / "scratch"
    found = kits.unpack(kit, scratch, root=tree)
    assert found.notes == () and found.cuda and found.variants == ("lag4",)
    assert found.wheels == ("tiny-peer 1.2",)
    assert get_target(tree).read_bytes() == binaries["default"].read_bytes()
    assert [path.name for path in (tree / "cpo_fast").iterdir()] == [get_target(tree).name]
    environment = os.environ | found.environment
    code = "import tiny_peer, sys; print(tiny_peer.VERSION, *sys.path, sep='\\n')"
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    # dill pickles modules of other folders by value, which fails for pyarrow's.
    site = scratch / "site-packages"
    assert out[0] == "1.2" and {str(site), str(site / "tiny_peer/inner")} <= set(out)
    assert json.dumps(found.make_record()).count(str(tmp_path)) == 0
    # The same kit is not installed again; a different kit is.
    marked = site / "tiny_peer" / "__init__.py"
    marked.write_text("VERSION = 'kept'\n")
    kits.unpack(kit, scratch, root=tree)
    assert "kept" in marked.read_text()
    changed = [{"name": "tiny-peer", "version": "1.3", "bytes": 1}]
    changed[0]["file"] = str(make_wheel(kit / "wheels", version="1.3").relative_to(kit))
    manifest = json.loads((kit / "manifest.json").read_text()) | {"wheels": changed}
    (kit / "manifest.json").write_text(json.dumps(manifest))
    assert kits.unpack(kit, scratch, root=tree).wheels == ("tiny-peer 1.3",)
    assert "1.3" in marked.read_text()


def test_the_existing_pythonpath_is_kept(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/before")
    found = kits.unpack(make_kit(tmp_path / "kit", tree, {}), tmp_path / "scratch", root=tree)
    assert found.environment["PYTHONPATH"].endswith(f"{os.pathsep}/before")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sources": "0" * 16}, "built from other sources"),
        ({"suffix": ".cpython-39-x86_64-linux-gnu.so"}, "built for .cpython-39"),
        ({"cuda": {}, "cuda_missing": "no nvcc"}, "no nvcc"),
    ],
)
def test_an_incompatible_binary_is_omitted(
    tmp_path: Path,
    tree: Path,
    binaries: dict[str, Path],
    changes: dict[str, Any],
    words: str,
) -> None:
    kit = make_kit(tmp_path / "kit", tree, {"default": binaries["default"]})
    manifest = json.loads((kit / "manifest.json").read_text()) | changes
    (kit / "manifest.json").write_text(json.dumps(manifest))
    found = kits.unpack(kit, tmp_path / "scratch", root=tree)
    assert not found.cuda and not get_target(tree).exists()
    assert len(found.notes) == 1 and words in found.notes[0]
    assert found.wheels, "the peers do not depend on the binary"


def test_a_binary_that_does_not_import_is_omitted(
    tmp_path: Path,
    tree: Path,
    binaries: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kits, "IMPORT_SECONDS", 2.0)
    broken = tmp_path / f"_cuda{SUFFIX}"
    broken.write_bytes(b"no machine code")
    get_target(tree).write_bytes(b"what was there")
    cuda = {"default": broken, "lag1": binaries["hangs"], "lag4": binaries["lag4"]}
    found = kits.unpack(make_kit(tmp_path / "kit", tree, cuda), tmp_path / "scratch", root=tree)
    assert not found.cuda and found.variants == ("lag4",)
    assert get_target(tree).read_bytes() == b"what was there"
    first, second = found.notes
    assert "(default) is not used: exit status 1: ImportError" in first
    assert "(lag1) is not used: it took longer than 2 s" in second


def test_a_failed_wheel_installation_keeps_the_binary(
    tmp_path: Path, tree: Path, binaries: dict[str, Path]
) -> None:
    kit = make_kit(tmp_path / "kit", tree, {"default": binaries["default"]})
    next((kit / "wheels").iterdir()).write_bytes(b"no archive")
    found = kits.unpack(kit, tmp_path / "scratch", root=tree)
    assert found.cuda and found.wheels == () and "PYTHONPATH" not in found.environment
    assert "the wheels are not installed" in found.notes[0]


def test_the_hash_covers_names_and_contents(tree: Path) -> None:
    before = kits.hash_cuda_sources(tree)
    (tree / "csrc/cuda/notes.md").write_text("no source")
    assert kits.hash_cuda_sources(tree) == before
    (tree / "csrc/cuda/b.h").write_text("")
    added = kits.hash_cuda_sources(tree)
    (tree / "csrc/cuda/a.cu").write_text("kernels")
    assert len({before, added, kits.hash_cuda_sources(tree)}) == 3


@pytest.fixture
def own_module() -> Iterator[None]:
    """Restores cpo_fast._cuda."""
    import cpo_fast

    before = sys.modules.get(kits.MODULE), cpo_fast.__dict__.get("_cuda")
    yield
    sys.modules.pop(kits.MODULE, None)
    cpo_fast.__dict__.pop("_cuda", None)
    if before[0] is not None:
        sys.modules[kits.MODULE] = before[0]
    if before[1] is not None:
        cpo_fast._cuda = before[1]  # type: ignore[attr-defined]


@pytest.mark.usefixtures("own_module")
def test_a_variant_replaces_the_kernels(
    tmp_path: Path, binaries: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cpo_fast.loss import cuda_launch

    cuda = {name: binaries[name] for name in ("default", "lag4")}
    kit = make_kit(tmp_path / "kit", ROOT, cuda)
    monkeypatch.setenv(kits.VARIABLE, str(kit))
    for name in ("lag4", "default", "lag4"):
        module = kits.load_variant(name)
        assert module.__doc__ == name
        from cpo_fast import _cuda

        assert cuda_launch.kernels() is module is _cuda
        assert importlib.util.find_spec(kits.MODULE) is module.__spec__  # as in cuda.obstacle
    with pytest.raises(ValueError, match="no variant 'fast', only: default, lag4"):
        kits.load_variant("fast")
    manifest = json.loads((kit / "manifest.json").read_text()) | {"sources": "0" * 16}
    (kit / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="other sources"):
        kits.load_variant("lag4")
    monkeypatch.delenv(kits.VARIABLE)
    with pytest.raises(ValueError, match="is not set"):
        kits.load_variant("lag4")


@pytest.mark.usefixtures("own_module")
def test_any_module_can_replace_the_kernels() -> None:
    stand_in = ModuleType(kits.MODULE)
    kits.replace_module(stand_in)
    from cpo_fast.loss import cuda_launch

    assert cuda_launch.kernels() is stand_in

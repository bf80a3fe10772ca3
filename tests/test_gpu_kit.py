"""The kit for a GPU machine: how it is made and unpacked, with wheels and binaries made here."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import pytest

from bench import gpu_kit
from bench.gpu import kit as kits

pytestmark = pytest.mark.test_bed
ROOT = Path(__file__).resolve().parents[1]
SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))


def wheel(folder: Path, name: str = "tiny_peer", version: str = "1.2", **more: str) -> Path:
    """A wheel of one module, and of the files `more` ("a/b" is written a__b)."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        **{key.replace("__", "/"): text for key, text in more.items()},
    }
    lines = []
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
        lines.append(f"{path},sha256={digest.decode().rstrip('=')},{len(text)}\n")
    files[f"{info}/RECORD"] = "".join([*lines, f"{info}/RECORD,,\n"])
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return made


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Extension modules `_cuda` that say who they are, and one that hangs in its import."""
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
    """A checkout with sources of the kernels and no binary."""
    root = tmp_path / "tree"
    (root / "csrc" / "cuda").mkdir(parents=True)
    (root / "cpo_fast").mkdir()
    (root / "csrc" / "cuda" / "a.cu").write_text("kernel")
    return root


def kit_of(folder: Path, root: Path, cuda: dict[str, Path]) -> Path:
    """A kit with the binaries `cuda` for this Python and a wheel."""
    folder.mkdir()
    file = wheel(folder / "wheels").relative_to(folder)
    entries = {}
    for name, path in cuda.items():
        place = folder / "cuda" / name / path.name
        place.parent.mkdir(parents=True)
        place.write_bytes(path.read_bytes())
        entries[name] = {"file": str(place.relative_to(folder)), "bytes": 1, "flags": []}
    manifest = {
        "sources": kits.cuda_hash(root),
        "suffix": SUFFIX,
        "cuda": entries,
        "cuda_missing": None,
        "paths": ["tiny_peer/inner"],
        "wheels": [{"name": "tiny-peer", "version": "1.2", "file": str(file), "bytes": 1}],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def target_of(root: Path) -> Path:
    return root / "cpo_fast" / f"_cuda{SUFFIX}"


# --- on the machine -------------------------------------------------------------------------------


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
    kit, scratch = kit_of(tmp_path / "kit", tree, cuda), tmp_path / "scratch"
    found = kits.unpack(kit, scratch, root=tree)
    assert found.notes == () and found.cuda and found.variants == ("lag4",)
    assert found.wheels == ("tiny-peer 1.2",)
    assert target_of(tree).read_bytes() == binaries["default"].read_bytes()
    assert [path.name for path in (tree / "cpo_fast").iterdir()] == [target_of(tree).name]
    environment = os.environ | found.environment
    code = "import tiny_peer, sys; print(tiny_peer.VERSION, *sys.path, sep='\\n')"
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    # dill stores modules of other folders by value, which fails for pyarrow's.
    site = scratch / "site-packages"
    assert out[0] == "1.2" and {str(site), str(site / "tiny_peer/inner")} <= set(out)
    assert json.dumps(found.record()).count(str(tmp_path)) == 0
    # Nothing is installed twice; another kit is.
    marked = site / "tiny_peer" / "__init__.py"
    marked.write_text("VERSION = 'kept'\n")
    kits.unpack(kit, scratch, root=tree)
    assert "kept" in marked.read_text()
    changed = [{"name": "tiny-peer", "version": "1.3", "bytes": 1}]
    changed[0]["file"] = str(wheel(kit / "wheels", version="1.3").relative_to(kit))
    manifest = json.loads((kit / "manifest.json").read_text()) | {"wheels": changed}
    (kit / "manifest.json").write_text(json.dumps(manifest))
    assert kits.unpack(kit, scratch, root=tree).wheels == ("tiny-peer 1.3",)
    assert "1.3" in marked.read_text()


def test_an_earlier_pythonpath_stays(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/before")
    found = kits.unpack(kit_of(tmp_path / "kit", tree, {}), tmp_path / "scratch", root=tree)
    assert found.environment["PYTHONPATH"].endswith(f"{os.pathsep}/before")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sources": "0" * 16}, "built of other sources"),
        ({"suffix": ".cpython-39-x86_64-linux-gnu.so"}, "built for .cpython-39"),
        ({"cuda": {}, "cuda_missing": "no nvcc"}, "no nvcc"),
    ],
)
def test_a_binary_that_does_not_fit_is_left_out(
    tmp_path: Path,
    tree: Path,
    binaries: dict[str, Path],
    changes: dict[str, Any],
    words: str,
) -> None:
    kit = kit_of(tmp_path / "kit", tree, {"default": binaries["default"]})
    manifest = json.loads((kit / "manifest.json").read_text()) | changes
    (kit / "manifest.json").write_text(json.dumps(manifest))
    found = kits.unpack(kit, tmp_path / "scratch", root=tree)
    assert not found.cuda and not target_of(tree).exists()
    assert len(found.notes) == 1 and words in found.notes[0]
    assert found.wheels, "the peers do not depend on it"


def test_a_binary_that_does_not_import_is_left_out(
    tmp_path: Path,
    tree: Path,
    binaries: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kits, "IMPORT_SECONDS", 2.0)
    broken = tmp_path / f"_cuda{SUFFIX}"
    broken.write_bytes(b"no machine code")
    target_of(tree).write_bytes(b"what was there")
    cuda = {"default": broken, "lag1": binaries["hangs"], "lag4": binaries["lag4"]}
    found = kits.unpack(kit_of(tmp_path / "kit", tree, cuda), tmp_path / "scratch", root=tree)
    assert not found.cuda and found.variants == ("lag4",)
    assert target_of(tree).read_bytes() == b"what was there"
    first, second = found.notes
    assert "(default) is not used: exit status 1: ImportError" in first
    assert "(lag1) is not used: it took longer than 2 s" in second


def test_wheels_that_pip_refuses_cost_nothing_else(
    tmp_path: Path, tree: Path, binaries: dict[str, Path]
) -> None:
    kit = kit_of(tmp_path / "kit", tree, {"default": binaries["default"]})
    next((kit / "wheels").iterdir()).write_bytes(b"no archive")
    found = kits.unpack(kit, tmp_path / "scratch", root=tree)
    assert found.cuda and found.wheels == () and "PYTHONPATH" not in found.environment
    assert "the wheels are not installed" in found.notes[0]


def test_the_hash_is_of_names_and_texts(tree: Path) -> None:
    before = kits.cuda_hash(tree)
    (tree / "csrc/cuda/notes.md").write_text("no source")
    assert kits.cuda_hash(tree) == before
    (tree / "csrc/cuda/b.h").write_text("")
    added = kits.cuda_hash(tree)
    (tree / "csrc/cuda/a.cu").write_text("kernels")
    assert len({before, added, kits.cuda_hash(tree)}) == 3


@pytest.fixture
def own_module() -> Iterator[None]:
    """Puts back what cpo_fast._cuda was."""
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
def test_a_variant_takes_the_place_of_the_kernels(
    tmp_path: Path, binaries: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cpo_fast.loss import cuda_launch

    cuda = {name: binaries[name] for name in ("default", "lag4")}
    kit = kit_of(tmp_path / "kit", ROOT, cuda)
    monkeypatch.setenv(kits.VARIABLE, str(kit))
    for name in ("lag4", "default", "lag4"):
        module = kits.load_variant(name)
        assert module.__doc__ == name
        from cpo_fast import _cuda

        assert cuda_launch.kernels() is module is _cuda
        assert importlib.util.find_spec(kits.MODULE) is module.__spec__  # as cuda.obstacle asks
    with pytest.raises(ValueError, match="no variant 'fast'; it has: default, lag4"):
        kits.load_variant("fast")
    manifest = json.loads((kit / "manifest.json").read_text()) | {"sources": "0" * 16}
    (kit / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="other sources"):
        kits.load_variant("lag4")
    monkeypatch.delenv(kits.VARIABLE)
    with pytest.raises(ValueError, match="is not set"):
        kits.load_variant("lag4")


@pytest.mark.usefixtures("own_module")
def test_any_module_can_stand_in() -> None:
    stand_in = ModuleType(kits.MODULE)
    kits.place(stand_in)
    from cpo_fast.loss import cuda_launch

    assert cuda_launch.kernels() is stand_in


# --- making it ------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wheels of the names asked for instead of downloads; no compiler."""

    def download(names: list[str], constraints: Path, folder: Path) -> None:
        listed = {gpu_kit.normal(x.partition("==")[0]) for x in constraints.read_text().split()}
        assert {gpu_kit.normal(name) for name in names} <= listed, "every version is pinned"
        for name in names:
            text = "x" * 4000
            wheel(folder, name.replace("-", "_"), pyarrow__tests__a=text, pyarrow__kept=text)

    def target(named: str | None) -> gpu_kit.Target:
        raise gpu_kit.Missing("no headers of Python 3.12")

    monkeypatch.setattr(gpu_kit, "download", download)
    monkeypatch.setattr(gpu_kit, "target", target)


@pytest.mark.usefixtures("offline")
def test_a_kit_without_headers_holds_the_peers_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kit"
    assert gpu_kit.main(["--out", str(out), "--cache", str(tmp_path / "cache")]) == 0
    manifest = kits.read_manifest(out)
    names = {*gpu_kit.PEERS, *gpu_kit.NEEDS}
    assert {entry["name"] for entry in manifest["wheels"]} == names
    assert manifest["cuda"] == {} and manifest["cuda_missing"] == "no headers of Python 3.12"
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert manifest["bytes"] == sum(path.stat().st_size for path in files)
    for entry in manifest["wheels"]:
        assert entry["bytes"] == (out / entry["file"]).stat().st_size
        assert entry["trimmed"] == (entry["name"] == "pyarrow")
    text = capsys.readouterr().out
    assert "no _cuda: no headers" in text and "MB  kit/ in all" in text
    # And it unpacks: the trimmed wheel, too.
    found = kits.unpack(out, tmp_path / "scratch")
    assert len(found.wheels) == len(names) and not found.cuda
    site = tmp_path / "scratch" / "site-packages"
    assert (site / "pyarrow" / "kept").exists()


@pytest.mark.usefixtures("offline")
def test_a_kit_that_is_too_large_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path / "kit"), "--cache", str(tmp_path), "--limit"]
    assert gpu_kit.main([*arguments, "0.001"]) == 1
    assert "too large" in capsys.readouterr().err
    assert gpu_kit.main([*arguments, "1"]) == 0
    assert gpu_kit.LIMIT_MB == 60


@pytest.mark.usefixtures("offline")
def test_quack_has_a_kit_of_its_own(tmp_path: Path) -> None:
    assert gpu_kit.main(["--quack", "--out", str(tmp_path / "kit"), "--cache", str(tmp_path)]) == 0
    manifest = kits.read_manifest(tmp_path / "kit")
    assert {entry["name"] for entry in manifest["wheels"]} == set(gpu_kit.QUACK)
    assert manifest["paths"] == list(gpu_kit.QUACK_PATHS)


def test_what_a_wheel_is_trimmed_of_is_not_in_its_record(tmp_path: Path) -> None:
    path = wheel(tmp_path, "peer", peer__tests__a="x", peer__b="y")
    gpu_kit.trim(path, ["peer/tests/*"])
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        listed = archive.read("peer-1.2.dist-info/RECORD").decode()
    assert "peer/b" in names and "peer/tests/a" not in names
    assert {line.split(",")[0] for line in listed.splitlines()} == set(names)


def test_the_interpreter_to_build_for_is_looked_at(tmp_path: Path) -> None:
    def answering(*lines: str) -> str:
        path = tmp_path / "python"
        path.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
        path.chmod(0o755)
        return str(path)

    (tmp_path / "include").mkdir()
    include, suffix = str(tmp_path / "include"), ".cpython-312-x86_64-linux-gnu.so"
    for lines, words in (
        (("3", "11", "x86_64", include, suffix), "is Python 3.11 on x86_64"),
        (("3", "12", "aarch64", include, suffix), "is Python 3.12 on aarch64"),
        (("3", "12", "x86_64", include, suffix), "no headers"),
    ):
        with pytest.raises(gpu_kit.Missing, match=f"PYTHON312=.*{re.escape(words)}"):
            gpu_kit.target(answering(*lines))
    with pytest.raises(gpu_kit.Missing, match="PYTHON312"):
        gpu_kit.target(str(tmp_path / "nothing"))
    (tmp_path / "include" / "Python.h").touch()
    assert gpu_kit.target(answering("3", "12", "x86_64", include, suffix)).suffix == suffix


def test_a_variant_compiles_only_what_knows_its_flags(tree: Path) -> None:
    folder = tree / "csrc" / "cuda"
    (folder / "plan.h").write_text("#ifndef CPO_LAG\n#define CPO_LAG 2\n#endif\n")
    (folder / "b.h").write_text('#include "plan.h"\n#include <cstdint>\n')
    (folder / "a.cu").write_text('#include "b.h"\n')
    (folder / "c.cu").write_text("int CPO_LAGGING;\n")
    a, c = folder / "a.cu", folder / "c.cu"
    assert [path.name for path in gpu_kit.dependencies(a)] == ["a.cu", "b.h", "plan.h"]
    flag = "-DCPO_LAG=4"
    assert gpu_kit.flags_for(a, [flag, "-DOTHER"]) == (flag,) and gpu_kit.flags_for(c, [flag]) == ()
    assert gpu_kit.known([flag], [a, c]) and not gpu_kit.known([flag, "-DOTHER"], [a, c])


def test_the_sources_know_every_variant_and_the_kit_every_build_that_is_measured() -> None:
    from bench.gpu import tuning

    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    for name, flags in kits.VARIANTS.items():
        assert gpu_kit.known(flags, sources), f"{name}: {flags} says nothing to csrc/cuda"
    assert set(tuning.BUILDS) <= set(kits.VARIANTS)


class Compiler(gpu_kit.Builder):
    """Writes what it was told instead of compiling it; a flag of 9 does not compile."""

    def __init__(self, sources: list[Path]) -> None:
        self.sources, self.target = sources, gpu_kit.Target("", SUFFIX)

    def build(self, flags: Any, place: Path) -> None:
        if any(flag.endswith("=9") for flag in flags):
            raise gpu_kit.Missing("static assertion failed")
        place.parent.mkdir(parents=True)
        place.write_text(" ".join(flags))


def test_variants_that_cannot_be_made_are_left_out_with_their_reason(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tree / "csrc" / "cuda" / "a.cu"
    source.write_text("CPO_LAG")
    table = {"lag1": ("-DCPO_LAG=1",), "lag9": ("-DCPO_LAG=9",), "other": ("-DCPO_OTHER=1",)}
    monkeypatch.setattr(gpu_kit, "VARIANTS", table)
    found, left_out = gpu_kit.binaries(Compiler([source]), tmp_path)
    assert list(found) == ["default", "lag1"] and found["lag1"]["flags"] == ["-DCPO_LAG=1"]
    assert found["lag1"]["file"] == f"cuda/lag1/_cuda{SUFFIX}"
    assert [line.split(":")[0] for line in left_out] == ["variant lag9", "variant other"]
    assert "static assertion" in left_out[0] and "does not know -DCPO_OTHER=1" in left_out[1]


def test_a_failed_make_leaves_the_earlier_kit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(*_: Any) -> None:
        raise gpu_kit.Missing("pip download failed")

    def target(named: str | None) -> gpu_kit.Target:
        raise gpu_kit.Missing("no headers")

    monkeypatch.setattr(gpu_kit, "download", download)
    monkeypatch.setattr(gpu_kit, "target", target)
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "manifest.json").write_text("{}")
    assert gpu_kit.main(["--out", str(tmp_path / "kit"), "--cache", str(tmp_path)]) == 2
    assert "pip download failed" in capsys.readouterr().err
    assert (tmp_path / "kit" / "manifest.json").exists()


# --- around it ------------------------------------------------------------------------------------


def test_make_and_ci_know_of_it() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("gpu-kit", "gpu-kit-quack", "gpu-publish"):
        assert f"  make {target} " in listed.stdout
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"gpu-kit/", "gpu-kit-quack/"} <= set(ignored)

    def tests_of(*words: str) -> str:
        command = ["make", "-n", "test", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return next(line for line in done.stdout.splitlines() if "-m pytest" in line)

    assert " -m 'not test_bed'" in tests_of("SKIP=test_bed") and "not" not in tests_of()
    assert "make test SKIP=test_bed" in (ROOT / ".ci" / "run").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert any(
        x.startswith("test_bed:") for x in project["tool"]["pytest"]["ini_options"]["markers"]
    )


def test_flags_are_those_of_the_setup_but_for_one_architecture() -> None:
    text = (ROOT / "setup.py").read_text()
    for flag in gpu_kit.NVCC_FLAGS:
        assert f'"{flag}"' in text
    assert sum("gencode" in flag for flag in gpu_kit.NVCC_FLAGS) == 1
    assert not any("lineinfo" in flag for flag in gpu_kit.NVCC_FLAGS)

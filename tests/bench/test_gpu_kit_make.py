"""How the kit for a GPU machine is made, with wheels made here and without a compiler."""

from __future__ import annotations

import re
import subprocess
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_kit
from bench.gpu import kit as kits
from tests.bench.wheels import wheel

pytestmark = pytest.mark.complete
ROOT = Path(__file__).resolve().parents[2]
SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder for sources of kernels."""
    folder = tmp_path / "sources"
    folder.mkdir()
    return folder


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
    assert "no _cuda: no headers" in text and "MB  kit/ in total" in text
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


def test_a_variant_compiles_only_what_knows_its_flags(sources: Path) -> None:
    folder = sources
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
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources / "a.cu"
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

    assert " -m 'not complete'" in tests_of("SKIP=complete") and " -m 'not" not in tests_of()


def test_flags_are_those_of_the_setup_but_for_one_architecture() -> None:
    text = (ROOT / "setup.py").read_text()
    for flag in gpu_kit.NVCC_FLAGS:
        assert f'"{flag}"' in text
    assert sum("gencode" in flag for flag in gpu_kit.NVCC_FLAGS) == 1
    assert not any("lineinfo" in flag for flag in gpu_kit.NVCC_FLAGS)

"""Building the kit for a GPU machine, with test wheels and without a compiler."""

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
from tests.bench.wheels import make_wheel

pytestmark = pytest.mark.complete
ROOT = Path(__file__).resolve().parents[2]
SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder for kernel sources."""
    folder = tmp_path / "sources"
    folder.mkdir()
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test wheels instead of downloads; no compiler."""

    def download(names: list[str], constraints: Path, folder: Path) -> None:
        listed = {
            gpu_kit.normalise_name(x.partition("==")[0]) for x in constraints.read_text().split()
        }
        assert {gpu_kit.normalise_name(name) for name in names} <= listed, "every version is pinned"
        for name in names:
            text = "x" * 4000
            make_wheel(folder, name.replace("-", "_"), pyarrow__tests__a=text, pyarrow__kept=text)

    def find_target(named: str | None) -> gpu_kit.Target:
        raise gpu_kit.Missing("no headers of Python 3.12")

    monkeypatch.setattr(gpu_kit, "download", download)
    monkeypatch.setattr(gpu_kit, "find_target", find_target)


@pytest.mark.usefixtures("offline")
def test_a_kit_without_headers_has_the_peers_only(
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
    # It unpacks, including the trimmed wheel.
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
def test_quack_has_a_separate_kit(tmp_path: Path) -> None:
    assert gpu_kit.main(["--quack", "--out", str(tmp_path / "kit"), "--cache", str(tmp_path)]) == 0
    manifest = kits.read_manifest(tmp_path / "kit")
    assert {entry["name"] for entry in manifest["wheels"]} == set(gpu_kit.QUACK)
    assert manifest["paths"] == list(gpu_kit.QUACK_PATHS)


def test_trimmed_files_are_removed_from_the_record(tmp_path: Path) -> None:
    path = make_wheel(tmp_path, "peer", peer__tests__a="x", peer__b="y")
    gpu_kit.trim(path, ["peer/tests/*"])
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        listed = archive.read("peer-1.2.dist-info/RECORD").decode()
    assert "peer/b" in names and "peer/tests/a" not in names
    assert {line.split(",")[0] for line in listed.splitlines()} == set(names)


def test_the_target_interpreter_is_checked(tmp_path: Path) -> None:
    def make_python(*lines: str) -> str:
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
            gpu_kit.find_target(make_python(*lines))
    with pytest.raises(gpu_kit.Missing, match="PYTHON312"):
        gpu_kit.find_target(str(tmp_path / "nothing"))
    (tmp_path / "include" / "Python.h").touch()
    assert gpu_kit.find_target(make_python("3", "12", "x86_64", include, suffix)).suffix == suffix


def test_flags_apply_only_to_sources_that_use_them(sources: Path) -> None:
    folder = sources
    (folder / "plan.h").write_text("#ifndef CPO_LAG\n#define CPO_LAG 2\n#endif\n")
    (folder / "b.h").write_text('#include "plan.h"\n#include <cstdint>\n')
    (folder / "a.cu").write_text('#include "b.h"\n')
    (folder / "c.cu").write_text("int CPO_LAGGING;\n")
    a, c = folder / "a.cu", folder / "c.cu"
    assert [path.name for path in gpu_kit.find_dependencies(a)] == ["a.cu", "b.h", "plan.h"]
    flag = "-DCPO_LAG=4"
    assert (
        gpu_kit.select_flags(a, [flag, "-DOTHER"]) == (flag,)
        and gpu_kit.select_flags(c, [flag]) == ()
    )
    assert gpu_kit.uses_flags([flag], [a, c]) and not gpu_kit.uses_flags([flag, "-DOTHER"], [a, c])


def test_every_variant_exists_in_sources_and_kit() -> None:
    from bench.gpu import tuning

    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    for name, flags in kits.VARIANTS.items():
        assert gpu_kit.uses_flags(flags, sources), f"{name}: csrc/cuda does not use {flags}"
    assert set(tuning.BUILDS) <= set(kits.VARIANTS)


class Compiler(gpu_kit.Builder):
    """Writes the flags instead of compiling; fails for a flag with value 9."""

    def __init__(self, sources: list[Path]) -> None:
        self.sources, self.target = sources, gpu_kit.Target("", SUFFIX)

    def build(self, flags: Any, place: Path) -> None:
        if any(flag.endswith("=9") for flag in flags):
            raise gpu_kit.Missing("static assertion failed")
        place.parent.mkdir(parents=True)
        place.write_text(" ".join(flags))


def test_variants_that_cannot_be_built_are_omitted_with_a_reason(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources / "a.cu"
    source.write_text("CPO_LAG")
    table = {"lag1": ("-DCPO_LAG=1",), "lag9": ("-DCPO_LAG=9",), "other": ("-DCPO_OTHER=1",)}
    monkeypatch.setattr(gpu_kit, "VARIANTS", table)
    found, left_out = gpu_kit.build_binaries(Compiler([source]), tmp_path)
    assert list(found) == ["default", "lag1"] and found["lag1"]["flags"] == ["-DCPO_LAG=1"]
    assert found["lag1"]["file"] == f"cuda/lag1/_cuda{SUFFIX}"
    assert [line.split(":")[0] for line in left_out] == ["variant lag9", "variant other"]
    assert "static assertion" in left_out[0] and "does not use -DCPO_OTHER=1" in left_out[1]


def test_a_failed_build_keeps_the_earlier_kit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(*_: Any) -> None:
        raise gpu_kit.Missing("pip download failed")

    def find_target(named: str | None) -> gpu_kit.Target:
        raise gpu_kit.Missing("no headers")

    monkeypatch.setattr(gpu_kit, "download", download)
    monkeypatch.setattr(gpu_kit, "find_target", find_target)
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "manifest.json").write_text("{}")
    assert gpu_kit.main(["--out", str(tmp_path / "kit"), "--cache", str(tmp_path)]) == 2
    assert "pip download failed" in capsys.readouterr().err
    assert (tmp_path / "kit" / "manifest.json").exists()


def test_make_targets_and_ignored_folders() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("gpu-kit", "gpu-kit-quack", "gpu-publish"):
        assert f"  make {target} " in listed.stdout
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"gpu-kit/", "gpu-kit-quack/"} <= set(ignored)

    def read_test_command(*words: str) -> str:
        command = ["make", "-n", "test", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return next(line for line in done.stdout.splitlines() if "-m pytest" in line)

    assert " -m 'not complete'" in read_test_command("SKIP=complete")
    assert " -m 'not" not in read_test_command()


def test_flags_match_setup_with_one_architecture() -> None:
    text = (ROOT / "setup.py").read_text()
    for flag in gpu_kit.NVCC_FLAGS:
        assert f'"{flag}"' in text
    assert sum("gencode" in flag for flag in gpu_kit.NVCC_FLAGS) == 1
    assert not any("lineinfo" in flag for flag in gpu_kit.NVCC_FLAGS)

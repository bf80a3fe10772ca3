"""Builds the kit for a GPU machine without a network: `python -m bench.gpu_kit`.

`--out gpu-kit` (`make gpu-kit`) contains the wheels of the peers and of dependencies that such a
machine lacks, `cpo_fast._cuda` for its Python and sm_90a only, the variants of bench/gpu/kit.py,
and a manifest. `--quack` (`make gpu-kit-quack`) contains quack's wheels instead, for a separate
run. bench/gpu/kit.py unpacks both. Exit status: 0 built, 1 too large, 2 a required part is missing.

Objects are cached in build/gpu-kit by a hash of their inputs: only changes are recompiled.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.gpu.kit import DEFAULT, VARIANTS, hash_cuda_sources
from bench.gpu.units import ROOT

PEERS = ("trl", "liger-kernel", "cut-cross-entropy")
NEEDS = ("datasets", "pyarrow", "dill", "multiprocess")
"""trl's imports that the machine lacks; it has transformers, peft, accelerate and pandas."""
QUACK = (
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "nvidia-cutlass-dsl-libs-base",
    "nvidia-cutlass-dsl-libs-core",
    "nvidia-cutlass-dsl-libs-cu13",
    "apache-tvm-ffi",
    "torch-c-dlpack-ext",
    "einops",
)
"""quack and its dependencies except torch, cuda-bindings, protobuf and typing-extensions."""
QUACK_PATHS = ("nvidia_cutlass_dsl/dsl_packages",)
"""Extra import paths: the interpreter reads .pth files only in its own site-packages."""
TRIM = {
    "pyarrow": (
        *("pyarrow/include/*", "pyarrow/includes/*", "pyarrow/src/*", "pyarrow/tests/*"),
        *("*.pyx", "*.pxd", "*.pxi", "*cpp_tests*", "*flight*", "*/libarrow_s3*", "*/_s3fs*"),
        *("*parquet_encryption*", "*/libarrow_python.so", "*/libarrow_python.so.*.*.*"),
    ),
    "nvidia-cutlass-dsl-libs-cu13": ("*/stubs/*", "*.a"),
}
"""Files removed from wheels: sources, tests, network file systems, duplicates."""
PYTHON = (3, 12)
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (35, 34, 31, 28, 27, 24, 17)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]
USUAL_PLACES = (
    "usr/bin/python3.12",
    "usr/local/bin/python3.12",
    "opt/python/cp312-cp312/bin/python",
    "{home}/.pyenv/versions/3.12*/bin/python",
    "{home}/.local/share/uv/python/cpython-3.12*/bin/python3.12",
)
NVCC_FLAGS = (
    "-O3",
    "-std=c++17",
    "--compiler-options=-fPIC,-fvisibility=hidden",
    "-gencode=arch=compute_90a,code=sm_90a",
)
CXX_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden")
LIMIT_MB = 60
"""A transfer can have 64 MiB, including the tree."""


class Missing(Exception):
    """A requirement is missing or a tool failed; the message gives the remedy."""


@dataclass(frozen=True)
class Target:
    """A Python to build for: its include folder and extension suffix."""

    include: str
    suffix: str


def run(command: Sequence[str], what: str) -> str:
    """Output of a command. Raises Missing if it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Missing(f"{what}: {error}") from None
    if done.returncode != 0:
        last = "\n".join(done.stderr.splitlines()[-12:])
        raise Missing(f"{what} failed ({done.returncode}):\n{last}")
    return done.stdout


# --- wheels ---------------------------------------------------------------------------------------


def download(names: Sequence[str], constraints: Path, folder: Path) -> None:
    """Download the wheels `names` for the machine's Python, without dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--implementation", "cp"]
    command += ["--python-version", ".".join(map(str, PYTHON)), "-c", str(constraints)]
    command += [word for name in PLATFORMS for word in ("--platform", name)]
    run([*command, "-d", str(folder), *names], "pip download")


def normalise_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def trim(wheel: Path, patterns: Sequence[str]) -> None:
    """Rewrite a wheel without the matching files and their lines in RECORD."""

    def is_excluded(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    fresh = wheel.with_suffix(".new")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(fresh, "w") as new:
        for item in old.infolist():
            if is_excluded(item.filename):
                continue
            data = old.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                lines = data.decode().splitlines(keepends=True)
                data = "".join(x for x in lines if not is_excluded(x.split(",")[0])).encode()
            new.writestr(item, data, zipfile.ZIP_DEFLATED, 9)
    fresh.replace(wheel)


def collect_wheels(names: Sequence[str], constraints: Path, kit: Path) -> list[dict[str, Any]]:
    """Put wheels into `kit`/wheels; returns their manifest entries."""
    folder = kit / "wheels"
    folder.mkdir()
    download(names, constraints, folder)
    found = []
    for path in sorted(folder.glob("*.whl")):
        name, version = path.name.split("-")[:2]
        patterns = TRIM.get(normalise_name(name), ())
        if patterns:
            trim(path, patterns)
        found.append(
            {
                "name": normalise_name(name),
                "version": version,
                "file": str(path.relative_to(kit)),
                "bytes": path.stat().st_size,
                "trimmed": bool(patterns),
            }
        )
    return found


# --- cpo_fast._cuda -------------------------------------------------------------------------------


def find_target(named: str | None) -> Target:
    """The interpreter `named`, or the first one with headers in the usual places."""
    question = (
        "import sys, sysconfig as s, platform as p; print(*sys.version_info[:2], p.machine(), "
        "s.get_path('include'), s.get_config_var('EXT_SUFFIX'), sep='\\n')"
    )
    places = [named] if named else [shutil.which("python3.12") or ""]
    if not named:
        home = Path.home().relative_to("/")
        places += [
            str(p) for x in USUAL_PLACES for p in sorted(Path("/").glob(x.format(home=home)))
        ]
    reasons = []
    for place in filter(None, places):
        try:
            answer = run([place, "-c", question], place).splitlines()
        except Missing as reason:
            reasons.append(str(reason))
            continue
        major, minor, machine, include, suffix = answer
        if (int(major), int(minor)) != PYTHON or machine != "x86_64":
            reasons.append(f"{place} is Python {major}.{minor} on {machine}")
        elif not (Path(include) / "Python.h").is_file():
            reasons.append(f"{place} has no headers (no Python.h)")
        else:
            return Target(include, suffix)
    tried = "; ".join(reasons) or "none found"
    raise Missing(f"a Python 3.12 for x86_64 with its headers is needed (PYTHON312=...): {tried}")


def find_dependencies(source: Path) -> list[Path]:
    """A source and the headers in its folder that it includes, directly or indirectly."""
    found, waiting = [], [source]
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found.append(path)
        names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.M)
        waiting += [source.parent / name for name in names]
    return sorted(found)


def select_flags(source: Path, flags: Sequence[str]) -> tuple[str, ...]:
    """The flags that this source or its headers use."""
    text = "".join(path.read_text() for path in find_dependencies(source))
    names = {flag: flag.removeprefix("-D").partition("=")[0] for flag in flags}
    return tuple(flag for flag in flags if re.search(rf"\b{names[flag]}\b", text))


class Builder:
    """Builds `_cuda` for a target; objects are shared between variants and cached between runs."""

    def __init__(self, target: Target, cache: Path, root: Path = ROOT) -> None:
        import pybind11

        self.target, self.cache = target, cache
        self.sources = sorted((root / "csrc" / "cuda").glob("*.c*"))
        home = re.search(r"TOP=(.*)", dry_run_nvcc()) if shutil.which("nvcc") else None
        if home is None:
            raise Missing("nvcc is not on the PATH: the kit has no binary of impl='cuda'")
        self.toolkit = Path(home[1].strip()).resolve()
        self.version = run(["nvcc", "--version"], "nvcc").strip().splitlines()[-1]
        includes = (target.include, pybind11.get_include(), str(self.toolkit / "include"))
        self.includes = tuple(f"-I{path}" for path in includes)
        cache.mkdir(parents=True, exist_ok=True)

    def make_command(self, source: Path, flags: Sequence[str]) -> list[str]:
        if source.suffix == ".cu":
            return ["nvcc", *NVCC_FLAGS, *flags]
        return ["c++", *CXX_FLAGS, *self.includes, *flags]

    def compile(self, source: Path, flags: Sequence[str]) -> Path:
        flags = select_flags(source, flags)
        command = self.make_command(source, flags)
        digest = hashlib.sha256(json.dumps([self.version, self.target.suffix, *command]).encode())
        for path in find_dependencies(source):
            digest.update(path.name.encode() + path.read_bytes())
        made = self.cache / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not made.exists():
            fresh = made.with_suffix(".part.o")
            print(" ".join([command[0], source.name, *flags]), flush=True)
            run([*command, "-c", str(source), "-o", str(fresh)], f"compiling {source.name}")
            fresh.replace(made)
        return made

    def build(self, flags: Sequence[str], place: Path) -> None:
        """Build the stripped extension module `place`."""
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda source: self.compile(source, flags), self.sources))
        libraries = [f"-L{self.toolkit / name}" for name in ("lib64", "lib")]
        libraries += ["-lcudart_static", "-lrt", "-lpthread", "-ldl"]
        place.parent.mkdir(parents=True, exist_ok=True)
        command = ["c++", "-shared", "-s", *map(str, objects), *libraries, "-o", str(place)]
        run(command, f"linking {place.name}")


def dry_run_nvcc() -> str:
    done = subprocess.run(["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True, check=False)
    return done.stderr


def uses_flags(flags: Sequence[str], sources: Sequence[Path]) -> bool:
    """Whether a source uses every flag: otherwise the variant would equal the default."""
    return all(any(select_flags(source, [flag]) for source in sources) for flag in flags)


def build_binaries(builder: Builder, kit: Path) -> tuple[dict[str, Any], list[str]]:
    """Build the binaries into `kit`/cuda; returns (their manifest entries, omitted variants with
    reasons)."""
    found: dict[str, Any] = {}
    left_out = []
    for name, flags in {DEFAULT: (), **VARIANTS}.items():
        if not uses_flags(flags, builder.sources):
            left_out.append(f"variant {name}: csrc/cuda does not use {' '.join(flags)}")
            continue
        place = kit / "cuda" / name / f"_cuda{builder.target.suffix}"
        try:
            builder.build(flags, place)
        except Missing as reason:
            if name == DEFAULT:
                raise
            left_out.append(f"variant {name}: {reason}")
            continue
        size = place.stat().st_size
        file = str(place.relative_to(kit))
        found[name] = {"file": file, "bytes": size, "flags": list(flags)}
    return found, left_out


# --- the folder -----------------------------------------------------------------------------------


def make_kit(out: Path, *, quack: bool, python: str | None, cache: Path) -> dict[str, Any]:
    """Replace the folder `out` by a complete kit; returns its manifest."""
    fresh = out.with_name(f".{out.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    manifest: dict[str, Any] = {"sources": None, "suffix": None, "cuda": {}, "paths": []}
    manifest |= {"cuda_missing": "this kit has wheels only", "left_out": []}
    names = QUACK if quack else (*PEERS, *NEEDS)
    constraints = ROOT / ("constraints-gpu.txt" if quack else "constraints.txt")
    if quack:
        manifest["paths"] = list(QUACK_PATHS)
    else:
        # A kit without a binary is still useful: the machine can build it.
        with tempfile.TemporaryDirectory() as copy, record_missing(manifest):
            # From a copy, so that hash and binary have the same sources.
            shutil.copytree(ROOT / "csrc" / "cuda", Path(copy, "csrc", "cuda"))
            manifest["sources"] = hash_cuda_sources(Path(copy))
            builder = Builder(find_target(python), cache, Path(copy))
            manifest |= {"suffix": builder.target.suffix, "nvcc": builder.version}
            manifest["cuda"], manifest["left_out"] = build_binaries(builder, fresh)
            manifest["cuda_missing"] = None
    manifest["wheels"] = collect_wheels(names, constraints, fresh)
    manifest["made"] = datetime.now(UTC).isoformat(timespec="seconds")
    manifest["bytes"] = measure_size(fresh)
    (fresh / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    fresh.replace(out)
    return manifest


@contextlib.contextmanager
def record_missing(manifest: dict[str, Any]) -> Iterator[None]:
    """Record a missing requirement of the binaries in the manifest."""
    try:
        yield
    except Missing as reason:
        manifest |= {"cuda": {}, "cuda_missing": str(reason)}


def measure_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def format_listing(manifest: dict[str, Any], name: str) -> str:
    lines = []
    for wheel in manifest["wheels"]:
        text = f"{wheel['name']} {wheel['version']}" + " (trimmed)" * wheel["trimmed"]
        lines.append(f"{wheel['bytes'] / 1e6:8.2f} MB  {text}")
    for kind, build in manifest["cuda"].items():
        flags = " ".join(build["flags"])
        lines.append(f"{build['bytes'] / 1e6:8.2f} MB  _cuda {kind} {flags}".rstrip())
    lines += [f"left out: {text}" for text in manifest["left_out"]]
    if manifest["cuda_missing"]:
        lines.append(f"no _cuda: {manifest['cuda_missing']}")
    return "\n".join([*lines, f"{manifest['bytes'] / 1e6:8.2f} MB  {name}/ in total"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_kit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder that the kit replaces"
    )
    parser.add_argument("--quack", action="store_true", help="only quack and its dependencies")
    parser.add_argument("--python", help="a Python 3.12 with headers to build with")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "gpu-kit", metavar="DIR")
    parser.add_argument("--limit", type=float, default=LIMIT_MB, metavar="MB", help="0: none")
    given = parser.parse_args(arguments)
    try:
        manifest = make_kit(
            given.out, quack=given.quack, python=given.python or None, cache=given.cache
        )
    except Missing as reason:
        print(f"gpu-kit: {reason}", file=sys.stderr)
        return 2
    print(format_listing(manifest, given.out.name))
    if given.limit and manifest["bytes"] > given.limit * 1e6:
        excess = f"{manifest['bytes'] / 1e6:.1f} MB of {given.limit:g} MB"
        print(f"gpu-kit: {given.out.name}/ is too large to transfer: {excess}", file=sys.stderr)
        return 1
    if manifest["bytes"] > LIMIT_MB * 1e6:
        print(f"{given.out.name}/ exceeds one transfer of {LIMIT_MB} MB: split it")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Unpacks and uses the kit of `make gpu-kit`, on a GPU machine without a network.

A kit is a folder with the peers' wheels, `cpo_fast._cuda` prebuilt for one Python and one
architecture, variants of it, and `manifest.json`. On the machine:

    kit = unpack(ROOT / "gpu-kit", scratch)            # once; `kit.notes` lists unusable parts
    Popen(..., env=os.environ | kit.environment)       # workers find the peers and the variants
    if not kit.cuda: ...                               # build it there

A worker calls `load_variant("lag3")` before the loss op runs. A missing or incompatible kit is not
an error: nothing is installed, and the notes give the reason.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.gpu.environment import hash_sources
from bench.gpu.units import ROOT

VARIANTS: dict[str, tuple[str, ...]] = {
    "lag0": ("-DCPO_LAG=0",),
    "lag3": ("-DCPO_LAG=3",),
    "split6": ("-DCPO_SPLIT_TILES=6", "-DCPO_BAND=16"),
}
"""Builds of `_cuda` with extra nvcc flags."""
DEFAULT = "default"
MODULE = "cpo_fast._cuda"
VARIABLE = "CPO_FAST_GPU_KIT"
"""Environment variable that names the kit's folder for workers."""
IMPORT_SECONDS = 20.0  # a binary that takes longer is assumed to hang
INSTALL_SECONDS = 40.0
SITE = "site-packages"
"""Required name: dill, which hashes trl's data sets, pickles modules in other folders by value."""
IMPORTS = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location(sys.argv[1], sys.argv[2])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


@dataclass(frozen=True)
class Kit:
    """The usable parts of a kit. `environment`: variables for the workers; `cuda`: whether its
    `cpo_fast._cuda` was installed in the tree; `variants`: names for `load_variant`; `notes`:
    omitted parts with reasons."""

    folder: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    wheels: tuple[str, ...] = ()
    cuda: bool = False
    variants: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def make_record(self) -> dict[str, Any]:
        """Figures for results.json, without paths."""
        return {
            "wheels": list(self.wheels),
            "cuda": self.cuda,
            "variants": list(self.variants),
            "notes": list(self.notes),
        }


def hash_cuda_sources(root: Path = ROOT) -> str:
    """Hash of csrc/cuda, 16 hexadecimal digits."""
    return hash_sources(("csrc/cuda",), root)


def read_extension_suffix() -> str:
    """This interpreter's extension suffix, such as .cpython-312-x86_64-linux-gnu.so."""
    return str(sysconfig.get_config_var("EXT_SUFFIX"))


def read_manifest(kit: Path) -> dict[str, Any]:
    """Raises ValueError if `kit` is not a kit."""
    path = kit / "manifest.json"
    if not path.is_file():
        raise ValueError(f"no GPU kit: {kit.name}/manifest.json does not exist (make gpu-kit)")
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"no GPU kit: {kit.name}/manifest.json is damaged") from None


def unpack(kit: Path, scratch: Path, *, root: Path = ROOT, python: str = sys.executable) -> Kit:
    """Install a kit: its `_cuda` into `root`/cpo_fast, its wheels into `scratch`/site-packages.

    The binary is copied only if it was built from `root`/csrc/cuda for this Python and imports in a
    new process. Nothing is downloaded, every step has a time limit, and no exception is raised:
    `Kit.notes` lists failures. A second call with the same kit and folders takes a second.
    """
    try:
        manifest = read_manifest(kit)
        sound, notes = find_sound_builds(kit, manifest, root, python)
        if DEFAULT in sound:
            target = root / "cpo_fast" / f"_cuda{manifest['suffix']}"
            fresh = target.with_name(f".{target.name}.new")
            shutil.copyfile(kit / manifest["cuda"][DEFAULT]["file"], fresh)
            fresh.chmod(0o755)
            fresh.replace(target)  # atomic: a concurrent import never sees a partial file
        reason = install(kit, manifest, scratch, python)
    except (OSError, ValueError, LookupError) as error:
        return Kit(notes=(str(error),))
    environment = {VARIABLE: str(kit.resolve())}
    wheels: tuple[str, ...] = ()
    if reason is not None:
        notes.append(f"the wheels are not installed: {reason}")
    elif manifest["wheels"]:
        wheels = tuple(f"{wheel['name']} {wheel['version']}" for wheel in manifest["wheels"])
        before = os.environ.get("PYTHONPATH")
        site = scratch.resolve() / SITE
        places = [str(site), *(str(site / path) for path in manifest.get("paths", ()))]
        places += [before] if before else []
        environment["PYTHONPATH"] = os.pathsep.join(places)
    variants = tuple(name for name in sound if name != DEFAULT)
    return Kit(kit, environment, wheels, DEFAULT in sound, variants, tuple(notes))


def find_sound_builds(
    kit: Path, manifest: dict[str, Any], root: Path, python: str
) -> tuple[list[str], list[str]]:
    """Names of the compatible builds of `_cuda` that import, and reasons for omitting others."""
    if not manifest["cuda"]:
        return [], [f"the kit has no _cuda: {manifest['cuda_missing']}"]
    if (reason := find_obstacle(manifest, root)) is not None:
        return [], [f"_cuda of the kit is not used: {reason}"]
    sound, notes = [], []
    for name, build in manifest["cuda"].items():
        reason = find_import_error(kit / build["file"], python)
        if reason is None:
            sound.append(name)
        else:
            notes.append(f"_cuda ({name}) is not used: {reason}")
    return sound, notes


def install(kit: Path, manifest: dict[str, Any], scratch: Path, python: str) -> str | None:
    """Install the wheels into `scratch`/site-packages unless present. Returns the reason for a
    failure, or None."""
    files = [str(kit / wheel["file"]) for wheel in manifest["wheels"]]
    done, text = scratch / "installed.json", json.dumps(manifest["wheels"])
    if not files or (done.is_file() and done.read_text() == text):
        return None
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
    command += ["--target", str(scratch / SITE), *files]
    scratch.mkdir(parents=True, exist_ok=True)
    reason = find_failure(command, INSTALL_SECONDS)
    if reason is None:
        done.write_text(text)
    return reason


def find_obstacle(manifest: dict[str, Any], root: Path = ROOT) -> str | None:
    """Why the kit's binaries do not match this interpreter or these sources; None if they do."""
    if manifest["suffix"] != read_extension_suffix():
        return f"built for {manifest['suffix']}, this is {read_extension_suffix()}"
    if manifest["sources"] != (here := hash_cuda_sources(root)):
        return f"built from other sources ({manifest['sources']}, not {here}): rebuild it"
    return None


def find_import_error(path: Path, python: str = sys.executable) -> str | None:
    """Why an extension module does not import in a new process; None if it does."""
    return find_failure([python, "-c", IMPORTS, MODULE, str(path)], IMPORT_SECONDS)


def find_failure(command: list[str], seconds: float) -> str | None:
    """Why a command fails, with its last line on stderr; None if it succeeds."""
    begun = time.monotonic()
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it took longer than {time.monotonic() - begun:.0f} s"
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        return None
    last = ([line for line in done.stderr.splitlines() if line.strip()] or [""])[-1]
    return f"exit status {done.returncode}: {last[:300]}"


_loaded: dict[Path, ModuleType] = {}


def load_variant(name: str) -> ModuleType:
    """Replace `cpo_fast._cuda` by a variant of the kit in this process.

    Call it before or between calls of the loss op: each launch looks the module up again.
    "default" is the kit's build without extra flags. Raises ValueError if the environment names no
    kit, the kit lacks the variant, or it was built from other sources.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise ValueError(f"no GPU kit: {VARIABLE} is not set (bench/gpu/kit.py: unpack)")
    manifest = read_manifest(Path(folder))
    builds = manifest["cuda"]
    if name not in builds:
        raise ValueError(f"the kit has no variant {name!r}, only: {', '.join(builds) or 'none'}")
    if (reason := find_obstacle(manifest)) is not None:
        raise ValueError(f"variant {name!r} cannot be used: {reason}")
    path = Path(folder) / builds[name]["file"]
    if path not in _loaded:
        # Each build needs a unique name: pybind11 caches modules by name and would return the first
        # build. The last part of the name selects the entry point (PyInit__cuda).
        spec = importlib.util.spec_from_file_location(f"gpu_kit.{name}._cuda", path)
        assert spec is not None and spec.loader is not None
        _loaded[path] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(_loaded[path])
    replace_module(_loaded[path])
    return _loaded[path]


def replace_module(module: ModuleType) -> None:
    """Make both forms of importing `cpo_fast._cuda` return `module`."""
    package, _, attribute = MODULE.rpartition(".")
    setattr(importlib.import_module(package), attribute, module)
    sys.modules[MODULE] = module

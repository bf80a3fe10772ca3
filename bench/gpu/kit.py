"""What `make gpu-kit` makes ready for a GPU machine without a network, and how it is used there.

A kit is a folder with the peers' wheels, `cpo_fast._cuda` built beforehand for one Python and one
architecture, variants of it, and `manifest.json`. On the machine

    kit = unpack(ROOT / "gpu-kit", scratch)   # once, at the start; `kit.notes` says what is missing
    Popen(..., env=os.environ | kit.environment)       # workers find the peers and the variants
    if not kit.cuda: ...                               # build there

and in a worker `load_variant("lag3")` before the loss op runs. A kit that is absent or does not fit
is no error: it brings nothing and says why.
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

from bench.gpu.environment import source_hash
from bench.gpu.units import ROOT

VARIANTS: dict[str, tuple[str, ...]] = {
    "lag0": ("-DCPO_LAG=0",),
    "lag3": ("-DCPO_LAG=3",),
    "split6": ("-DCPO_SPLIT_TILES=6", "-DCPO_BAND=16"),
}
"""Builds of `_cuda` beside the default one: what nvcc is told more."""
DEFAULT = "default"
MODULE = "cpo_fast._cuda"
VARIABLE = "CPO_FAST_GPU_KIT"
"""Names the kit's folder to workers."""
IMPORT_SECONDS = 20.0  # a binary that takes longer hangs
INSTALL_SECONDS = 40.0
SITE = "site-packages"
"""The name matters: dill, which hashes trl's data sets, stores modules found elsewhere by value."""
IMPORTS = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location(sys.argv[1], sys.argv[2])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


@dataclass(frozen=True)
class Kit:
    """What of a kit can be used here. `environment` belongs into that of the workers; `cuda` says
    whether `cpo_fast._cuda` of this tree is in place by the kit; `variants` are names for
    `load_variant`; `notes` say what was left out, and why."""

    folder: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    wheels: tuple[str, ...] = ()
    cuda: bool = False
    variants: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """For results.json, without paths."""
        return {
            "wheels": list(self.wheels),
            "cuda": self.cuda,
            "variants": list(self.variants),
            "notes": list(self.notes),
        }


def cuda_hash(root: Path = ROOT) -> str:
    """Of the sources in csrc/cuda, 16 hexadecimal digits."""
    return source_hash(("csrc/cuda",), root)


def extension_suffix() -> str:
    """How this interpreter's extension modules end, as .cpython-312-x86_64-linux-gnu.so."""
    return str(sysconfig.get_config_var("EXT_SUFFIX"))


def read_manifest(kit: Path) -> dict[str, Any]:
    """Raises ValueError with a reason where `kit` is none."""
    path = kit / "manifest.json"
    if not path.is_file():
        raise ValueError(f"no GPU kit: there is no {kit.name}/manifest.json (make gpu-kit)")
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"no GPU kit: {kit.name}/manifest.json is damaged") from None


def unpack(kit: Path, scratch: Path, *, root: Path = ROOT, python: str = sys.executable) -> Kit:
    """Makes a kit usable: its `_cuda` in `root`/cpo_fast, its wheels in `scratch`/site-packages.

    The binary is copied only if it was built of the sources in `root`/csrc/cuda, for this kind of
    Python, and imports in a process of its own. Nothing is fetched, every step has a time limit,
    and nothing is raised: `Kit.notes` says what does not work. A second call with the same kit and
    folders is done in a second.
    """
    try:
        manifest = read_manifest(kit)
        sound, notes = sound_builds(kit, manifest, root, python)
        if DEFAULT in sound:
            target = root / "cpo_fast" / f"_cuda{manifest['suffix']}"
            fresh = target.with_name(f".{target.name}.new")
            shutil.copyfile(kit / manifest["cuda"][DEFAULT]["file"], fresh)
            fresh.chmod(0o755)
            fresh.replace(target)  # whoever imports it, at any time, finds a whole file
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


def sound_builds(
    kit: Path, manifest: dict[str, Any], root: Path, python: str
) -> tuple[list[str], list[str]]:
    """Names of the builds of `_cuda` that fit and import, and why others are left out."""
    if not manifest["cuda"]:
        return [], [f"the kit has no _cuda: {manifest['cuda_missing']}"]
    if (reason := obstacle(manifest, root)) is not None:
        return [], [f"_cuda of the kit is not used: {reason}"]
    sound, notes = [], []
    for name, build in manifest["cuda"].items():
        reason = import_error(kit / build["file"], python)
        if reason is None:
            sound.append(name)
        else:
            notes.append(f"_cuda ({name}) is not used: {reason}")
    return sound, notes


def install(kit: Path, manifest: dict[str, Any], scratch: Path, python: str) -> str | None:
    """Puts the wheels into `scratch`/site-packages, unless they are there; why not, or None."""
    files = [str(kit / wheel["file"]) for wheel in manifest["wheels"]]
    done, text = scratch / "installed.json", json.dumps(manifest["wheels"])
    if not files or (done.is_file() and done.read_text() == text):
        return None
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
    command += ["--target", str(scratch / SITE), *files]
    scratch.mkdir(parents=True, exist_ok=True)
    reason = failure(command, INSTALL_SECONDS)
    if reason is None:
        done.write_text(text)
    return reason


def obstacle(manifest: dict[str, Any], root: Path = ROOT) -> str | None:
    """Why binaries of this kit do not fit this interpreter and these sources; None: they do."""
    if manifest["suffix"] != extension_suffix():
        return f"built for {manifest['suffix']}, this is {extension_suffix()}"
    if manifest["sources"] != (here := cuda_hash(root)):
        return f"built of other sources ({manifest['sources']}; csrc/cuda is {here}): rebuild it"
    return None


def import_error(path: Path, python: str = sys.executable) -> str | None:
    """Why an extension module does not import in a fresh process; None: it does."""
    return failure([python, "-c", IMPORTS, MODULE, str(path)], IMPORT_SECONDS)


def failure(command: list[str], seconds: float) -> str | None:
    """Why a command fails, in a line: the last one it prints. None: it succeeds."""
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
    """Puts a variant of the kit in the place of `cpo_fast._cuda`, for this process.

    Call it before the loss op runs, or between two calls of it: each launch asks for the module
    anew. "default" is the kit's own build without flags. Raises ValueError where the environment
    names no kit, or the kit has no such variant or was built of other sources.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise ValueError(f"no GPU kit: {VARIABLE} is not set (bench/gpu/kit.py: unpack)")
    manifest = read_manifest(Path(folder))
    builds = manifest["cuda"]
    if name not in builds:
        raise ValueError(f"the kit has no variant {name!r}; it has: {', '.join(builds) or 'none'}")
    if (reason := obstacle(manifest)) is not None:
        raise ValueError(f"variant {name!r} does not fit: {reason}")
    path = Path(folder) / builds[name]["file"]
    if path not in _loaded:
        # A name of its own for each build: pybind11 keeps modules by it, and would hand out the
        # first build again. Its last part says where the module begins (PyInit__cuda).
        spec = importlib.util.spec_from_file_location(f"gpu_kit.{name}._cuda", path)
        assert spec is not None and spec.loader is not None
        _loaded[path] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(_loaded[path])
    place(_loaded[path])
    return _loaded[path]


def place(module: ModuleType) -> None:
    """Makes `module` what `cpo_fast._cuda` means from now on, by either kind of import."""
    package, _, attribute = MODULE.rpartition(".")
    setattr(importlib.import_module(package), attribute, module)
    sys.modules[MODULE] = module

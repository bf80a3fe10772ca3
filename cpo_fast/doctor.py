"""Check this installation.

Prints versions, devices and the implementations of the loss op, with the obstacles of each, and
compares the working ones with the reference. A broken package is reported in one line and does not
stop the check. Paste the output into a bug report: it contains no data paths and no environment
variables.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path

from cpo_fast.command_line import Parser, program
from cpo_fast.console import run_command
from cpo_fast.version import __version__

MODULES = {"pillow": "PIL", "scikit-learn": "sklearn", "pyyaml": "yaml", "flash-attn": "flash_attn"}
"""Package -> module, where the names differ."""
FOR_DEVELOPERS = ("dev", "bench", "docs")
TOLERANCE = {"cpu": 1e-4, "cuda": 5e-2}  # log-probs near -6 in float32; in bfloat16


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 when everything that is required works, else 1."""
    parser = Parser(prog=program("doctor"), description=__doc__)
    parser.parse_args(argv)
    faults = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # faults are printed as lines
        for title, look in SECTIONS.items():
            print(title)
            for line, fault in catch_errors(look):
                print(f"  {line}", flush=True)
                if fault:
                    faults.append(fault)
    print("verdict")
    print("  " + (f"not usable: {'; '.join(faults)}" if faults else "everything required works"))
    return 1 if faults else 0


Lines = Iterator[tuple[str, str | None]]  # (printed line, fault or None)


def catch_errors(look: Callable[[], Lines]) -> Lines:
    """The lines of `look`; if it raises, the error is the last line."""
    try:
        yield from look()
    except (Exception, SystemExit) as error:
        yield f"broken   {reason(error)}", reason(error)


def reason(error: BaseException) -> str:
    first = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def system() -> Lines:
    yield f"cpo_fast {__version__} in {Path(__file__).parent}", None
    yield f"python   {platform.python_version()}, {platform.platform()}", None
    yield f"cpu      {processor()}, {os.cpu_count()} logical cores", None


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def packages() -> Lines:
    """Every dependency in the installed metadata: its version, and whether it imports."""
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(text) for text in metadata.requires("cpo_fast") or ()]
    except metadata.PackageNotFoundError:
        yield (
            "unknown  cpo_fast is not installed, so its dependencies are unknown",
            None,
        )
        return
    extras = metadata.metadata("cpo_fast").get_all("Provides-Extra") or []
    for need in declared:
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            state, line = package(need.name, str(need.specifier), need.specifier.contains)
            yield f"{state:8} {line}", None if state == "ok" else f"{need.name} is {state}"
    for extra in extras:
        for need in declared:
            if (
                extra in FOR_DEVELOPERS
                or need.marker is None
                or need.marker.evaluate({"extra": ""})
            ):
                continue
            if need.marker.evaluate({"extra": extra}):
                state, line = package(need.name, str(need.specifier), need.specifier.contains)
                yield f"{state:8} {line} (optional: cpo_fast[{extra}])", None


def package(name: str, asked: str, fits: Callable[..., bool]) -> tuple[str, str]:
    """("ok" | "missing" | "outside" | "broken", line)."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing", f"{name}, asked for: {asked}"
    line = f"{name} {version}"
    if not fits(version, prereleases=True):
        return "outside", f"{line}, asked for: {asked}"
    try:
        importlib.import_module(MODULES.get(name.lower(), name))
    except (Exception, SystemExit) as error:
        return "broken", f"{line}: {reason(error)}"
    return "ok", line


def devices() -> Lines:
    import torch

    from cpo_fast.loss.processor import fast_bfloat16

    products = "" if fast_bfloat16() else ", bfloat16 much slower than float32 (leave out --bf16)"
    capability = torch.backends.cpu.get_cpu_capability()
    yield f"cpu      {torch.get_num_threads()} threads, {capability}{products}", None
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            memory = f"{about.total_memory / 2**30:.0f} GiB"
            yield f"cuda:{index}   {about.name}, {about.major}.{about.minor}, {memory}", None
    elif torch.version.cuda is None:
        yield "no cuda  this torch is built without CUDA", None
    else:
        yield f"no cuda  torch is built for CUDA {torch.version.cuda}, but finds no device", None


def native() -> Lines:
    """The compiled parts, which are optional and faster."""
    for name, builder in (("_cpu", "a C++ compiler"), ("_cuda", "nvcc")):
        try:
            module = importlib.import_module(f"cpo_fast.{name}")
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError)
            why = f"not built: {builder} is needed at install time" if missing else reason(error)
            yield f"{'missing' if missing else 'broken':8} cpo_fast.{name}, {why}", None
        else:
            best = f", row kernels: {module.isa('')}" if hasattr(module, "isa") else ""
            if hasattr(module, "fused_available"):
                engines = [e for e in ("amx", "avx512_bf16") if module.fused_available(e)]
                best += f", fused kernel: {engines[0] if engines else 'none'}"
            yield f"ok       cpo_fast.{name}{best}", None


def implementations() -> Lines:
    """Per device: implementations that run, their error now, and the obstacles of the others."""
    import torch

    from cpo_fast.loss.api import impl_obstacles

    for device in ("cpu", "cuda"):
        for name, obstacle in reversed(impl_obstacles(device).items()):
            label = f"{name} on {device}"
            if obstacle is None and (device == "cpu" or torch.cuda.is_available()):
                yield from catch_errors(partial(try_implementation, device, name, label))
            elif obstacle is not None and not obstacle.startswith("for "):  # another device's
                yield f"no       {label}: {obstacle}", None


def try_implementation(device: str, name: str, label: str) -> Lines:
    error = deviation(device, name)
    if error <= TOLERANCE[device]:
        yield f"ok       {label}, off the reference by {error:.0e}", None
    else:
        yield f"wrong    {label}, off the reference by {error:.0e}", f"{label} is wrong"


def deviation(device: str, name: str) -> float:
    """Largest difference of log-probs and gradient to float64, for sizes that are not multiples of
    a block."""
    import torch

    from cpo_fast import linear_logprobs

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 48, generator=draw).to(dtype)
    weight = (torch.randn(301, 48, generator=draw) / 7).to(dtype)
    labels = torch.randint(0, 301, (37,), generator=draw)

    def outcome(place: str, dtype: torch.dtype, impl: str) -> torch.Tensor:
        states = hidden.to(place, dtype).requires_grad_()
        logps = linear_logprobs(states, weight.to(place, dtype), labels.to(place), impl=impl)
        (gradient,) = torch.autograd.grad(logps.sum(), states)
        return torch.cat((logps.detach(), gradient.flatten())).double().cpu()

    error = outcome(device, dtype, name) - outcome("cpu", torch.float64, "reference")
    return float(error.abs().max())


SECTIONS = {
    "system": system,
    "packages": packages,
    "devices": devices,
    "native parts": native,
    "loss op": implementations,
}


if __name__ == "__main__":
    sys.exit(run_command(main))

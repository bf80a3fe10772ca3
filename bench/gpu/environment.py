"""Machine description: device, versions, commit, source hashes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.gpu.units import ROOT, Setting, Unit
from cpo_fast.doctor import processor

PACKAGES = ["torch", "triton", "transformers", "peft", "trl", "liger-kernel"]
PACKAGES += ["cut-cross-entropy", "flash-attn", "pytest"]
KERNELS = ("csrc/cuda", "kernels", "cpo_fast/loss")
SOURCES = (*KERNELS, "bench")


def capture(*command: str) -> str | None:
    """Output of a command; None if it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def find_version(package: str) -> str | None:
    """Version of an installed distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def hash_sources(folders: tuple[str, ...] = SOURCES, root: Path = ROOT) -> str:
    """Hash of the sources that the figures depend on; identifies a tree without git history."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cpp", ".h"):
                digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def describe_machine(device: str) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "device": processor(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "versions": {package: find_version(package) for package in PACKAGES},
        "cuda_of_torch": torch.version.cuda,
        "commit": capture("git", "rev-parse", "HEAD"),
        "changed_files": len(
            (capture("git", "status", "--porcelain", "--untracked-files=no") or "").splitlines()
        ),
        "source_hash": hash_sources(),
        "kernel_hash": hash_sources(KERNELS),
        "nvcc": (capture("nvcc", "--version") or "").rpartition("\n")[2] or None,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        query = "driver_version,power.limit,clocks.sm,clocks.mem,temperature.gpu"
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "devices": torch.cuda.device_count(),
            query: capture(
                "nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"
            ),
        }
    return found


def list_units(setting: Setting) -> list[Unit]:
    return [Unit("machine", lambda: describe_machine(setting.device))]

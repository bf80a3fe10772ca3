"""The environment of a run: package versions and hardware."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Any

PACKAGES = ("cpo_fast", "torch", "triton", "transformers", "peft", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed PACKAGES."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware(processes: int = 1) -> dict[str, Any]:
    """{"device": name of this process's GPU, else of the processor, "processes"}; without a GPU
    also "threads" of torch."""
    import torch

    from cpo_fast.doctor import processor

    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "processes": processes}
    return {"device": processor(), "processes": processes, "threads": torch.get_num_threads()}

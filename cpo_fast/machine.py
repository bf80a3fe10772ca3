"""What a run is computed on: the versions of its packages and the hardware."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Any

PACKAGES = ("cpo_fast", "torch", "triton", "transformers", "peft", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Python and those of PACKAGES that are installed."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware(processes: int = 1) -> dict[str, Any]:
    """{"device": the name of this process's GPU, else of the processor, "processes"}, and "threads"
    of torch without a GPU."""
    import torch

    from cpo_fast.doctor import processor

    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "processes": processes}
    return {"device": processor(), "processes": processes, "threads": torch.get_num_threads()}

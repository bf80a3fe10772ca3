"""Training steps of Qwen2.5-VL's 3B and 7B shapes with random weights, against trl where it is.

Ours and each peer are units of their own: what a peer takes or breaks costs none of our figures.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from bench.gpu.units import NotHere, Setting, Unit

NEEDED = {"trl": ("bench.step_sizes", "peft", "trl")}
ROOMY = 100e9  # bytes of device memory for packs of 8192 tokens: 7B keeps 60 GB for its backward


def missing(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:
        return True


def step(kind: str, size: str, device: str, options: dict[str, Any]) -> dict[str, Any]:
    """One kind of step, "ours" or a peer of bench.step_sizes."""
    for name in NEEDED.get(kind, ("bench.step_sizes", "peft")):
        if missing(name):
            raise NotHere(f"{name} is not installed")
    from bench.gpu.timing import release
    from bench.step_sizes import run

    release(device)  # of the model before, which may be part of a cycle
    peers = () if kind == "ours" else (kind,)
    found = run(size, device=device, peers=peers, with_ours=kind == "ours", **options)
    figures = found["steps"][kind]
    if "error" in figures:
        raise RuntimeError(figures["error"])
    loss = figures["loss"]
    if kind == "ours":
        # Attention with and without gradients may take other kernels, which round differently.
        assert abs(loss - 0.6931472) < 2e-2, f"an untrained loss is log 2, not {loss}"
    return found


def unit(kind: str, size: str, setting: Setting, limit: float, **options: Any) -> Unit:
    if setting.quick:
        options = {"studies": 1, "rounds": 1, "side": 56}
    else:
        import torch

        large = torch.cuda.get_device_properties(0).total_memory > ROOMY
        options = {"studies": 16, "packing_length": 8192 if large else 4096, **options}
    batch = f" in batches of {options['trl_batch']}" if "trl_batch" in options else ""
    run = functools.partial(step, kind, size, setting.device, options)
    return Unit(f"{size}: {kind}{batch}", run, limit, phase="steps")


def units(setting: Setting) -> list[Unit]:
    """Ours first, then trl in batches of two sizes, whose better one counts."""
    if setting.quick:
        return [unit(kind, "tiny", setting, 120) for kind in ("ours", "unshared")]
    at = functools.partial(unit, setting=setting, limit=100, rounds=3)
    return [
        *(at("ours", size) for size in ("7B", "3B")),
        *(at("trl", size, trl_batch=batch) for batch in (8, 4) for size in ("7B", "3B")),
        *(at("unshared", size) for size in ("7B", "3B")),
    ]


def plan_units(setting: Setting) -> list[Unit]:
    """7B, which has a target, then 3B; ours, then trl, whose vision tower attends window by window
    and takes seconds a step. A pair of trl's keeps 9 GB at 7B: eight do not fit 80 GB."""
    if setting.quick:
        return units(setting)[:1]
    import torch

    large = torch.cuda.get_device_properties(0).total_memory > ROOMY
    ours = functools.partial(unit, "ours", setting=setting, rounds=2, limit=70)
    trl = functools.partial(unit, "trl", setting=setting, rounds=1, limit=100)
    return [
        ours("7B"),
        trl("7B", trl_batch=8 if large else 4),
        ours("3B"),
        trl("3B", trl_batch=8),
    ]

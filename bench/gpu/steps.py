"""Training steps of Qwen2.5-VL's 3B and 7B shapes with random weights, against trl where it is."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from bench.gpu.units import NotHere, Setting, Unit

MEASURED = ("bench.step_sizes", "peft")
PEERS = {"trl": "trl"}


def missing(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:
        return True


def step(size: str, peers: tuple[str, ...], device: str, options: dict[str, Any]) -> dict[str, Any]:
    for name in MEASURED:
        if missing(name):
            raise NotHere(f"{name} is not there")
    from bench.step_sizes import run

    here = tuple(peer for peer in peers if not missing(PEERS.get(peer, "torch")))
    found = run(size, device=device, peers=here, **options)
    assert abs(found["steps"]["ours"]["loss"] - 0.6931472) < 1e-3, "an untrained loss is log 2"
    return {**found, "peers_missing": sorted(set(peers) - set(here))}


def units(setting: Setting) -> list[Unit]:
    if setting.quick:
        options = {"studies": 1, "rounds": 1, "side": 56}
        run = functools.partial(step, "tiny", ("unshared",), setting.device, options)
        return [Unit("step of tiny", run, limit=120)]
    import torch

    # Packs of 8192 tokens keep some 60 GB for the backward of 7B.
    large = torch.cuda.get_device_properties(0).total_memory > 100e9
    found = []
    for batch in (8, 4):  # trl's best is what counts
        for size in ("7B", "3B"):
            peers = ("trl", "unshared") if batch == 8 else ("trl",)
            options = {"studies": 16, "trl_batch": batch, "rounds": 3}
            options["packing_length"] = 8192 if large else 4096
            run = functools.partial(step, size, peers, setting.device, options)
            found.append(Unit(f"step of {size}, trl in batches of {batch}", run, limit=150))
    return found

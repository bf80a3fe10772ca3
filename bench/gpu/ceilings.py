"""What the device reaches at best: bytes of a large copy, FLOP of a large matrix product."""

from __future__ import annotations

from typing import Any

import torch

from bench.gpu.timing import in_turn
from bench.gpu.units import Setting, Unit


def copy(device: str, quick: bool) -> dict[str, Any]:
    """A copy from and to device memory, bytes read and written both counted."""
    values = 2**20 if quick else 2**31
    source = torch.randint(-128, 127, (values,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times = in_turn({"copy": lambda: target.copy_(source)}, device)["copy"]
    return {"bytes": 2 * values, "bytes_per_second": 2 * values / times["median"], "times": times}


def product(device: str, quick: bool, dtype: torch.dtype) -> dict[str, Any]:
    """A square product of random numbers (zeros run faster) into a preallocated output."""
    size = 256 if quick else 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    times = in_turn({"mm": lambda: torch.mm(left, right, out=out)}, device)["mm"]
    return {"size": size, "flops_per_second": 2 * size**3 / times["median"], "times": times}


def units(setting: Setting) -> list[Unit]:
    device, quick = setting.device, setting.quick
    return [
        Unit("copy", lambda: copy(device, quick)),
        Unit("bfloat16 product", lambda: product(device, quick, torch.bfloat16)),
        Unit("float16 product", lambda: product(device, quick, torch.float16)),
    ]

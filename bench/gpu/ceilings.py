"""Ceilings of the device: bandwidth of a large copy, rate of a large matrix product, and rates of
the two products with a head by rows per chunk."""

from __future__ import annotations

import functools
from typing import Any

import torch

from bench.gpu import environment
from bench.gpu.cases import HEADS
from bench.gpu.timing import apply_both_settings, release, time_in_turn
from bench.gpu.units import Setting, Unit
from cpo_fast.loss.chunked import logits_buffer

ROWS = (1024, 2048, 3072, 3328, 3584, 4096, 8192)


def measure_copy(device: str, quick: bool) -> dict[str, Any]:
    """Copy within device memory; counts bytes read plus bytes written."""
    values = 2**20 if quick else 2**31
    source = torch.randint(-128, 127, (values,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times = time_in_turn({"copy": lambda: target.copy_(source)}, device)["copy"]
    return {"bytes": 2 * values, "bytes_per_second": 2 * values / times["median"], "times": times}


def measure_product(device: str, quick: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Square product of random matrices (zeros run faster) into a preallocated output."""
    size = 256 if quick else 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    times = time_in_turn({"mm": lambda: torch.mm(left, right, out=out)}, device)["mm"]
    return {"size": size, "flops_per_second": 2 * size**3 / times["median"], "times": times}


@functools.lru_cache(maxsize=1)
def make_head(device: str, quick: bool) -> torch.Tensor:
    D, V = (32, 1000) if quick else HEADS["7B"]
    return (torch.randn(V, D, device=device) / D**0.5).bfloat16()


def measure_head_products(device: str, quick: bool, rows: int) -> dict[str, Any]:
    """H W^T and P W of a chunk of `rows`, with the vendor library's default settings and with our
    op's, in buffers with our op's layout."""
    release(device)
    weight = make_head(device, quick)
    V, D = weight.shape
    hidden = torch.randn(rows, D, device=device).bfloat16()
    logits = logits_buffer(hidden, rows, V)[:, :V]
    out = torch.empty_like(hidden)

    def forward() -> None:
        torch.mm(hidden, weight.t(), out=logits)

    def backward() -> None:
        torch.mm(logits, weight, out=out)

    runs = apply_both_settings({"H W^T": forward, "P W": backward})
    forward()  # fills the logits that P W reads
    times = time_in_turn(runs, device, rounds=10)
    work = 2 * rows * D * V
    return {
        "rows": rows,
        "hidden": D,
        "vocabulary": V,
        "flops_per_second": {name: work / found["median"] for name, found in times.items()},
        "times": times,
    }


def list_head_units(setting: Setting) -> list[Unit]:
    device, quick = setting.device, setting.quick
    return [
        Unit(
            f"products with the head, {rows} rows",
            functools.partial(measure_head_products, device, quick, rows),
            limit=15,
            phase="products",
        )
        for rows in ((8, 16) if quick else ROWS)
    ]


def list_square_units(setting: Setting, *dtypes: torch.dtype) -> list[Unit]:
    device, quick = setting.device, setting.quick
    found = [Unit("copy", lambda: measure_copy(device, quick), limit=20, phase="ceilings")]
    for dtype in dtypes:
        name = f"{str(dtype).removeprefix('torch.')} product"
        run = functools.partial(measure_product, device, quick, dtype)
        found.append(Unit(name, run, limit=20, phase="ceilings"))
    return found


def list_units(setting: Setting) -> list[Unit]:
    return list_square_units(setting, torch.bfloat16, torch.float16) + list_head_units(setting)


def list_machine_units(setting: Setting) -> list[Unit]:
    """The machine's description and ceilings."""
    machine = [
        Unit("machine", unit.run, limit=20, phase="environment")
        for unit in environment.list_units(setting)
    ]
    return machine + list_square_units(setting, torch.bfloat16) + list_head_units(setting)

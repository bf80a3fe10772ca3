"""Non-default settings to time, each with an expectation written before any measurement.

Expectations are for a frozen head with an on-line reference at T = 8192, derived from the waves of
the vendor's GEMM (128 x 256 tiles on 132 multiprocessors) and the row kernels' machine code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from bench.gpu.units import NotHere, Setting, Unit


@dataclass(frozen=True)
class Tuning:
    name: str
    variant: str
    expected: str
    model: str = "7B"
    room_mib: int | None = None  # CPO_FAST_WORKSPACE_MIB
    tile: tuple[int, int] | None = None  # BR, num_warps of the lean row kernel
    build: str = ""  # a variant of the kit's CUDA kernels


ROOM = functools.partial(Tuning, variant="triton lean")
TUNINGS = (
    ROOM(
        "room 1024 MiB",
        room_mib=1024,
        expected="chunks of 3328 rows, P W in 8 waves instead of 7: 1.0 to 1.6 ms slower than 1190",
    ),
    ROOM(
        "room 1190 MiB",
        room_mib=1190,
        expected="chunks of 3584 rows, P W in 7 waves: 3 to 5 % of the floor less than 1024",
    ),
    ROOM(
        "room 2048 MiB",
        room_mib=2048,
        expected="as 1190 or up to 1 % less: fewer partial waves, twice the memory",
    ),
    ROOM(
        "room 4096 MiB",
        room_mib=4096,
        expected="one chunk, like the floor: at most 1 % less than 2048",
    ),
    ROOM(
        "room 1024 MiB",
        model="0.5B",
        room_mib=1024,
        expected="chunks below 4096 rows, P W in 3 waves instead of 2",
    ),
    ROOM(
        "room 1190 MiB",
        model="0.5B",
        room_mib=1190,
        expected="chunks of 4096 rows (1187 MiB), P W in 2 waves: faster than 1024",
    ),
    Tuning(
        "tile 512, 16 warps",
        "triton lean",
        tile=(512, 16),
        expected="two rows per multiprocessor, 80 MB in flight exceed the L2: second pass from "
        "memory, 0.5 to 1 ms slower; faster if the one-row form is bound by latency",
    ),
    Tuning(
        "tile 1024, 16 warps",
        "triton lean",
        tile=(1024, 16),
        expected="four loads in flight per thread instead of two: within 0.3 ms either way",
    ),
    Tuning(
        "tile 2048, 32 warps",
        "triton lean",
        tile=(2048, 32),
        expected="four loads in flight per thread at 55 registers, no spill, still one row per "
        "multiprocessor: within 0.3 ms either way",
    ),
    Tuning(
        "warpgroup lag of 3 steps",
        "cuda fused",
        build="lag3",
        expected="no stage left to prefetch for the first warpgroup: 1 to 3 % slower than 2",
    ),
    Tuning(
        "warpgroups together",
        "cuda fused",
        build="lag0",
        expected="both epilogues at the same time leave the tensor cores idle: up to 5 % slower",
    ),
    Tuning(
        "splits of 6 tiles, bands of 16",
        "cuda fused",
        build="split6",
        expected="W read twice from memory instead of four times, a third of the partial sums, but "
        "a less full last wave: within 2 % either way",
    ),
)
BUILDS = tuple(tuning.build for tuning in TUNINGS if tuning.build)


def measure(tuning: Tuning, variant: str, setting: Setting) -> dict[str, Any]:
    from bench.gpu import kit, loss
    from bench.gpu.workspace import limit_workspace

    model, shape = loss.list_shapes(setting.quick)[0]
    if not setting.quick and tuning.model != model:
        model, shape = tuning.model, (shape[0], *loss.HEADS[tuning.model])
    rounds = 3 if setting.quick else loss.ROUNDS
    with contextlib.ExitStack() as stack:
        if tuning.build:
            try:
                kit.load_variant(tuning.build)
            except ValueError as reason:
                raise NotHere(str(reason)) from None
        if tuning.room_mib:
            stack.enter_context(limit_workspace(tuning.room_mib))
        if tuning.tile:
            from cpo_fast.kernels.lean_rows import forced_tile

            stack.enter_context(forced_tile(*tuning.tile))
        figures = loss.measure(variant, model, shape, loss.FROZEN, setting.device, rounds)
    chosen = {k: v for k, v in dataclasses.asdict(tuning).items() if k != "name" and v}
    return {**figures, **chosen, "provider": variant, "model": model}


def choose_variant(tuning: Tuning, sound: list[str], setting: Setting) -> str | None:
    """The sound variant to time a setting with; workspace sizes apply to all variants that write
    logits in chunks."""
    if tuning.variant in sound:
        return tuning.variant
    if tuning.room_mib:
        others = ("cuda rows", *(("cpu",) if setting.device == "cpu" else ()))
        return next((name for name in others if name in sound), None)
    return None


def list_units(setting: Setting) -> list[Unit]:
    """Every sound variant with defaults, as the baseline; then workspace sizes and tiles."""
    from bench.gpu import loss

    model, shape = loss.list_shapes(setting.quick)[0]
    mine = loss.list_sound(setting)
    found = loss.list_case_units(setting, model, shape, loss.FROZEN, tuple(mine), limit=25)
    return found + list_tuning_units(setting, mine, with_builds=False)


def list_build_units(setting: Setting) -> list[Unit]:
    """The kit's builds of the CUDA kernels, each in a separate process."""
    from bench.gpu import loss

    return list_tuning_units(setting, loss.list_sound(setting), with_builds=True)


def list_tuning_units(setting: Setting, sound: list[str], *, with_builds: bool) -> list[Unit]:
    found = []
    for tuning in TUNINGS:
        variant = choose_variant(tuning, sound, setting)
        if variant is None or variant in setting.hung or bool(tuning.build) != with_builds:
            continue
        run = functools.partial(measure, tuning, variant, setting)
        key = f"{tuning.model}, {tuning.name}: {variant}"
        owner = tuning.build or variant
        found.append(Unit(key, run, limit=20, variant=owner, phase="tuning"))
    return found

"""Training steps at Qwen2.5-VL's 3B and 7B shapes with random weights, against trl if installed.

Each of our variants and each peer is a separate unit, so that a failure loses one figure only. Our
step is profiled by kernel directly after its timing, with the same model.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from bench.gpu.cases import LOG_2, LOSS_ERROR, STEPS
from bench.gpu.units import NotHere, Setting, Unit

NEEDED = {"trl": ("bench.step_sizes", "peft", "trl")}
HELD = 1e9  # bytes a unit may leave allocated; above, the next unit gets a new process
ROOMY = 100e9  # bytes of device memory for packs of 8192 tokens: 7B keeps 60 GB for its backward


def is_missing(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:
        return True


_measured: dict[tuple[str, str], tuple[Callable[[], float], float]] = {}
"""(kind, size): step and seconds of this process's previous unit. Only one is kept: a 7B model
takes 15 GB."""


def measure_step(
    kind: str, size: str, device: str, options: dict[str, Any], profiled: bool = False
) -> dict[str, Any]:
    """Figures of a step of STEPS or of a peer in bench.step_sizes. With `profiled` the step is kept
    for the next unit."""
    for name in NEEDED.get(kind, ("bench.step_sizes", "peft")):
        if is_missing(name):
            raise NotHere(f"{name} is not installed")
    from bench.step_sizes import run

    release(device)
    mine = kind in STEPS
    made: list[Callable[[], float]] = []
    found = run(
        size,
        device=device,
        peers=() if mine else (kind,),
        with_ours=mine,
        on_measured=(lambda name, step: made.append(step)) if profiled else None,
        **options,
    )
    figures = found["steps"]["ours" if mine else kind]
    if "error" in figures:
        raise RuntimeError(figures["error"])
    found["steps"] = {kind: figures}
    if kind == "trl":
        found["attention"] = "its own"
    loss = figures["loss"]
    if mine:
        # Attention kernels with and without gradients can differ in rounding.
        assert abs(loss - LOG_2) < LOSS_ERROR, f"untrained loss is {loss}, expected log 2"
    if profiled:
        _measured[kind, size] = made[0], figures["seconds"]
    else:
        found["fresh_process"] = release(device) > HELD
    return found


def profile_step(kind: str, size: str, device: str) -> dict[str, Any]:
    """Profile one call of the previous unit's step."""
    if (kind, size) not in _measured:
        raise NotHere("the step was not timed in this process")
    from bench.gpu.kernel_times import profile

    run, seconds = _measured.pop((kind, size))
    figures = profile(run, device, calls=1, warm=False, host=False)
    del run
    figures["fresh_process"] = release(device) > HELD
    return {"provider": kind, "model": size, "wall_seconds": seconds, **figures}


def make_unit(
    kind: str, size: str, setting: Setting, limit: float, profiled: bool = False, **options: Any
) -> Unit:
    batch = f" in batches of {options['trl_batch']}" if "trl_batch" in options else ""
    if setting.quick:
        options = {"studies": 1, "rounds": 1, "side": 56}
    else:
        length = 8192 if has_room() else 4096
        options = {"studies": 16, "packing_length": length, **options}
    options |= STEPS[kind][1] if kind in STEPS else {}
    run = functools.partial(measure_step, kind, size, setting.device, options, profiled)
    return Unit(f"{size}: {kind}{batch}", run, limit, phase="steps")


def make_profile_unit(kind: str, size: str, setting: Setting) -> Unit:
    run = functools.partial(profile_step, kind, size, setting.device)
    key = f"profile of the step of {size}: {kind}"
    return Unit(key, run, limit=30, variant="profiler", phase="profile")


def has_room() -> bool:
    import torch

    return torch.cuda.get_device_properties(0).total_memory > ROOMY


def select_sound(setting: Setting, kinds: tuple[str, ...]) -> list[str]:
    """The kinds whose attention check neither failed nor hung."""
    bad = {*setting.red, *setting.hung}
    return [kind for kind in kinds if name_check(kind) not in bad]


def name_check(kind: str) -> str:
    """The variant of bench/gpu/attention.py that checks the attention of our step."""
    return f"attention {STEPS[kind][0]}"


def import_modules() -> dict[str, Any]:
    """Import slow modules; units that need a missing module report it."""
    with contextlib.suppress(Exception):
        import peft  # noqa: F401
        from transformers import Qwen2_5_VLForConditionalGeneration  # noqa: F401

        import bench.step_sizes  # noqa: F401
    return {}


IMPORTS = Unit("imports", import_modules, limit=60, phase="imports")
"""First unit, so that a cold disk adds neither to the process start nor to another unit's time."""


def release(device: str) -> int:
    """Free the previous model, which a reference cycle or torch.compile's caches can keep alive.
    Returns the bytes of device memory still in use."""
    import torch

    from bench.gpu import timing

    _measured.clear()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    timing.release(device)
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def list_units(setting: Setting) -> list[Unit]:
    """Ours first, then trl with two batch sizes; the better one counts."""
    if setting.quick:
        return [*list_quick_units(setting), make_unit("unshared", "tiny", setting, 120)]
    at = functools.partial(make_unit, setting=setting, limit=100, rounds=3)
    return [
        IMPORTS,
        at("ours", "7B", profiled=True),
        make_profile_unit("ours", "7B", setting),
        at("ours, fused", "7B"),
        at("ours", "3B"),
        at("ours, fused", "3B"),
        *(at("trl", size, trl_batch=batch) for batch in (8, 4) for size in ("7B", "3B")),
        *(at("unshared", size) for size in ("7B", "3B")),
        make_unit("ours, compiled", "7B", setting, 300, rounds=3),
    ]


def list_quick_units(setting: Setting) -> list[Unit]:
    others = select_sound(setting, ("ours, gathered",))
    return [
        IMPORTS,
        make_unit("ours", "tiny", setting, 120, profiled=True),
        make_profile_unit("ours", "tiny", setting),
        *(make_unit(name, "tiny", setting, 120) for name in others),
    ]


def list_plan_units(setting: Setting) -> list[Unit]:
    """7B, which has a target: ours with fused layers and with defaults, each followed by its
    profile, and trl; then 3B, and 7B with other attentions. No compiled step: it took longer than
    90 s on an H200. trl keeps 9 GB per pair at 7B: eight pairs do not fit 80 GB.

    If the default attention failed its check, "gathered" replaces it; after a timeout it is timed.
    """
    if setting.quick:
        return list_quick_units(setting)
    at = functools.partial(make_unit, setting=setting)
    wrong = {kind for kind in STEPS if name_check(kind) in {*setting.red} - {*setting.hung}}
    main = "ours, gathered" if "ours" in wrong and "ours, gathered" not in wrong else "ours"
    others = select_sound(setting, ("ours, gathered", "ours, flex"))
    kinds = [main]
    if main == "ours" and "ours, fused" not in wrong:
        kinds = ["ours, fused", main]
    first = []
    for kind in kinds:
        first.append(at(kind, "7B", limit=60, rounds=2, profiled=True))
        first.append(make_profile_unit(kind, "7B", setting))
    return [
        IMPORTS,
        *first,
        at("trl", "7B", limit=70, rounds=1, trl_batch=8 if has_room() else 4),
        *(at(kind, "3B", limit=50, rounds=2) for kind in kinds),
        at("trl", "3B", limit=50, rounds=1, trl_batch=8),
        *(at(name, "7B", limit=50, rounds=2) for name in others if name != main),
    ]

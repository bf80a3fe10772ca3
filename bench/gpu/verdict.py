"""What a plan found out about the variants, for the plan behind it: `verdict.json`.

device, kernel_hash   what it holds for: the card's name and the hash of the loss op's sources
quick                 whether it was found with tiny shapes
sound, red, hung      variants that passed the smoke check, broke a rule, took too long
fastest               by "model T=tokens, case": the fastest sound variant
ceilings              bytes and FLOP per second that the device reached
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.gpu import report
from bench.gpu.variants import IMPLEMENTATIONS, OURS

NAMES = ("sound", "red", "hung")


def passed_smoke(data: dict[str, Any]) -> list[str]:
    found = {
        r["key"].partition(": ")[0]
        for r in data["records"]
        if r["key"].endswith(": smoke") and r["status"] == "ok"
    }
    return [name for name in OURS if name in found]


def sound(data: dict[str, Any]) -> list[str]:
    """Variants that passed the smoke check, here or by the verdict that was read, and have neither
    broken a rule nor hung since; in order of preference."""
    passed = {*passed_smoke(data), *data.get("known", {}).get("sound", ())}
    bad = report.red(data["records"]) | set(data["hung"])
    return [name for name in OURS if name in passed - bad]


def ranking(data: dict[str, Any]) -> list[str]:
    """Sound variants, those timed at the headline first and by their time; then the one that the
    verdict calls the fastest there, then the others in order of preference. What is not an
    implementation of the whole op is left out."""
    names = [name for name in sound(data) if name in IMPLEMENTATIONS]
    times = {
        r["provider"]: r["seconds"] for r in report.timed(data["records"]) if report.is_headline(r)
    }
    fastest = data.get("known", {}).get("fastest", {})
    known = [fastest[key] for key in fastest if report.is_headline_name(key)]
    return sorted(names, key=lambda name: (times.get(name, float("inf")), name not in known))


def make(data: dict[str, Any]) -> dict[str, Any]:
    machine = report.machine(data["records"])
    good = sound(data)
    fastest: dict[str, tuple[float, str]] = {}
    for r in report.timed(data["records"]):
        if r["provider"] in good:
            key = report.case_name(r)
            fastest[key] = min(fastest.get(key, (float("inf"), "")), (r["seconds"], r["provider"]))
    ceilings = {
        r["key"]: r.get("bytes_per_second") or r["flops_per_second"]
        for r in data["records"]
        if r["phase"] == "ceilings" and r["status"] == "ok"
    }
    return {
        "device": machine.get("device"),
        "quick": data.get("quick", False),
        "kernel_hash": machine.get("kernel_hash"),
        "sound": good,
        "red": sorted(report.red(data["records"])),
        "hung": sorted(data["hung"]),
        "fastest": {key: name for key, (_, name) in fastest.items()},
        "ceilings": ceilings,
    }


def dumps(data: dict[str, Any]) -> str:
    return json.dumps(make(data), indent=1)


def read(
    path: Path, machine: dict[str, Any], quick: bool = False
) -> tuple[dict[str, Any] | None, str]:
    """The verdict in `path` if it holds for this machine and these sources, else None; and a
    sentence that says which, for the report. Tiny shapes (`quick`) go with tiny shapes only."""
    instead = "the smoke check decides"
    try:
        found = json.loads(path.read_text())
        assert all(isinstance(found[key], list) for key in NAMES)
        assert all(isinstance(name, str) for key in NAMES for name in found[key])
        assert set(found["sound"]) <= set(OURS)
        assert all(isinstance(name, str) for name in found["fastest"].values())
        held = found["device"], found["kernel_hash"]
    except FileNotFoundError:
        return None, f"No verdict of the first plan: {instead}."
    except (OSError, ValueError, TypeError, LookupError, AttributeError, AssertionError):
        return None, f"The verdict of the first plan is damaged: {instead}."
    here = machine.get("device"), machine.get("kernel_hash")
    if None in here or held != here:
        there, this = (f"{device} with kernels {kernels}" for device, kernels in (held, here))
        return None, f"The verdict of the first plan is of {there}, this is {this}: {instead}."
    if found.get("quick", False) != quick:
        return None, f"The verdict of the first plan is of other shapes: {instead}."
    if not found["sound"]:
        return None, f"The verdict of the first plan calls no variant sound: {instead}."
    return found, f"By the verdict of the first plan sound: {', '.join(found['sound'])}."

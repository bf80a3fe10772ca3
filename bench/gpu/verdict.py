"""A plan's results about the variants, for the next plan: `verdict.json`.

device, kernel_hash   card and hash of the loss op's sources to which it applies
quick                 whether shapes were tiny
sound, red, hung      variants that passed the smoke check, failed a check, timed out
fastest               fastest sound variant by "model T=tokens, case"
ceilings              bytes and FLOP per second that the device reached
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.gpu import report
from bench.gpu.variants import IMPLEMENTATIONS, REPORTED

NAMES = ("sound", "red", "hung")


def list_passed_smoke(data: dict[str, Any]) -> list[str]:
    found = {
        r["key"].partition(": ")[0]
        for r in data["records"]
        if r["key"].endswith(": smoke") and r["status"] == "ok"
    }
    return [name for name in IMPLEMENTATIONS if name in found]


def list_sound(data: dict[str, Any]) -> list[str]:
    """Variants that passed the smoke check, in this plan or by the verdict read, and did not fail a
    check or hang since; in order of priority."""
    passed = {*list_passed_smoke(data), *data.get("known", {}).get("sound", ())}
    bad = report.find_red(data["records"]) | set(data["hung"])
    return [name for name in IMPLEMENTATIONS if name in passed - bad]


def rank_sound(data: dict[str, Any]) -> list[str]:
    """Sound variants: by time at the headline if measured, then the fastest by the verdict read,
    then the others in order of priority."""
    names = list_sound(data)
    times = {
        r["provider"]: r["seconds"]
        for r in report.select_timed(data["records"])
        if report.is_headline(r)
    }
    fastest = data.get("known", {}).get("fastest", {})
    known = [fastest[key] for key in fastest if report.is_headline_name(key)]
    return sorted(names, key=lambda name: (times.get(name, float("inf")), name not in known))


def make_verdict(data: dict[str, Any]) -> dict[str, Any]:
    machine = report.find_machine(data["records"])
    good = list_sound(data)
    fastest: dict[str, tuple[float, str]] = {}
    for r in report.select_timed(data["records"]):
        if r["provider"] in good:
            key = report.name_case(r)
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
        "red": sorted(report.find_red(data["records"])),
        "hung": sorted(data["hung"]),
        "fastest": {key: name for key, (_, name) in fastest.items()},
        "ceilings": ceilings,
    }


def dumps(data: dict[str, Any]) -> str:
    return json.dumps(make_verdict(data), indent=1)


def read(
    path: Path, machine: dict[str, Any], quick: bool = False
) -> tuple[dict[str, Any] | None, str]:
    """(verdict in `path` if it applies to this machine, these sources and `quick`, else None;
    sentence about it for the report)."""
    instead = "the smoke check decides"
    try:
        found = json.loads(path.read_text())
        assert all(isinstance(found[key], list) for key in NAMES)
        assert all(isinstance(name, str) for key in NAMES for name in found[key])
        assert set(found["sound"]) <= set(REPORTED)
        assert all(isinstance(name, str) for name in found["fastest"].values())
        held = found["device"], found["kernel_hash"]
    except FileNotFoundError:
        return None, f"No verdict of the first plan: {instead}."
    except (OSError, ValueError, TypeError, LookupError, AttributeError, AssertionError):
        return None, f"The verdict of the first plan is damaged: {instead}."
    here = machine.get("device"), machine.get("kernel_hash")
    if None in here or held != here:
        there, this = (f"{device} with kernels {kernels}" for device, kernels in (held, here))
        return None, f"The verdict of the first plan is for {there}, not for {this}: {instead}."
    if found.get("quick", False) != quick:
        return None, f"The verdict of the first plan is for other shapes: {instead}."
    if not found["sound"]:
        return None, f"The verdict of the first plan lists no sound variant: {instead}."
    return found, f"Sound by the verdict of the first plan: {', '.join(found['sound'])}."

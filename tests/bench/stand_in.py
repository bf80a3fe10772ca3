"""GPU check plans with units that do not need torch, to test how plans run."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import plans, run, units
from bench.gpu.plans import Plan, Step

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = """
import os, time
from pathlib import Path
from bench.gpu.units import Unit

DEVICE = {"device": "Stand-in 1", "kernel_hash": "abc", "source_hash": "d"}
MORE = {"versions": {}, "commit": None, "changed_files": 0}

def throw(error):
    raise error

def list_machine(setting):
    return [Unit("machine", lambda: {**DEVICE, **MORE}, phase="environment")]

def list_kit(setting):
    return [Unit("kit", lambda: {"environment": {"FROM_THE_KIT": "yes"}, "notes": []})]

def list_pids(setting):
    figures = lambda: {"pid": os.getpid(), "kit": os.environ.get("FROM_THE_KIT")}
    return [Unit(f"{name}: pid", figures, variant=name) for name in ("one", "two")]

def list_smoke(setting):
    return [Unit(f"{v}: smoke", lambda: {}, variant=v) for v in ("cpu", "reference")]

def list_smoke_with_red(setting):
    wrong = lambda: throw(AssertionError("wrong"))
    return [
        Unit("cpu: smoke", wrong, variant="cpu"),
        Unit("reference: smoke", lambda: {}, variant="reference"),
    ]

def list_smoke_that_waits(setting):
    # Each waits for the other: they must run concurrently.
    def wait(mine, other):
        (Path(setting.out) / mine).touch()
        end = time.monotonic() + 20
        while not (Path(setting.out) / other).exists():
            assert time.monotonic() < end, "the other unit does not run"
            time.sleep(0.01)
        return {}
    return [
        Unit("cpu: smoke", lambda: wait("a", "b"), variant="cpu"),
        Unit("reference: smoke", lambda: wait("b", "a"), variant="reference"),
    ]

def make_timing(key, seconds):
    provider = key.rpartition(": ")[2]
    return {
        "provider": provider, "model": "tiny", "case": "frozen head, reference on-line",
        "tokens": 64, "hidden": 32, "vocabulary": 1000, "seconds": seconds, "ratio_to_floor": 1.1,
        "floor_seconds": 1.0, "floor_flops_per_second": 1e9, "errors": {"loss": 0.0},
        "times": {"op": {"least": seconds, "most": seconds}},
    }

def list_timings(setting, runs):
    found = []
    for name, seconds in (("cpu", 2.0), ("reference", 1.0), ("eager", 4.0)):
        if name not in setting.red:
            key = f"tiny T=64, frozen head, reference on-line: {name}"
            run = runs.get(name, lambda key=key, seconds=seconds: make_timing(key, seconds))
            found.append(Unit(key, run, limit=1.0, variant=name))
    return found

def list_headline(setting):
    return list_timings(setting, {})

def list_headline_hangs(setting):
    return list_timings(setting, {"cpu": lambda: time.sleep(60)})

def list_headline_crashes(setting):
    return list_timings(setting, {"cpu": lambda: os._exit(7)})

def list_headline_is_killed(setting):
    return list_timings(setting, {"reference": lambda: os.kill(os.getpid(), 9)})

def list_setting(setting):
    return [Unit("setting", lambda: {"best": list(setting.best), "red": list(setting.red)})]

def list_again(setting):
    return [Unit(f"{v}: again", lambda: {}, variant=v) for v in ("cpu", "reference")]
"""
MACHINE = {"device": "Stand-in 1", "kernel_hash": "abc"}


def make_step(name: str, function: str = "", limit: float = 30, **options: Any) -> Step:
    return Step(name, f"stand_in:list_{function or name}", limit, **options)


SMOKE = make_step("smoke", phase="correctness", side_by_side=True, judges=True)


class StandIn:
    """A call runs a plan with units of STAND_IN and returns its results."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.modules = folder / "path" / "bench" / "gpu"
        self.modules.mkdir(parents=True)
        (self.modules / "stand_in.py").write_text(STAND_IN)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(folder / "path")]))

    def __call__(
        self,
        *steps: Step,
        answers: bool = True,
        kept: Path | None = None,
        seconds: float = 200,
        **options: Any,
    ) -> dict[str, Any]:
        out = self.folder / "out"
        out.mkdir(exist_ok=True)
        setting = units.Setting("cpu", True, str(out))
        session = run.Session(setting, run.Results(out), probe=lambda device, limit: answers)
        keeps = not options.get("reads_verdict", False)
        plan = Plan("first", seconds, 0, steps, margin=0, keeps_verdict=keeps, **options)
        kept = kept or self.folder / "kept" / "verdict.json"
        plans.run(plan, session, kept, time.monotonic())
        data = json.loads((out / "results.json").read_text())
        assert "making this file failed" not in (out / "report.md").read_text()
        assert json.loads((out / "verdict.json").read_text())["hung"] == sorted(data["hung"])
        return data


def get_statuses(data: dict[str, Any], name: str) -> dict[str, str]:
    """Statuses of a step's records by the last part of the key."""
    return {
        r["key"].rpartition(": ")[2] if r["phase"] == "loss" else r["key"]: r["status"]
        for r in data["records"]
        if r.get("step", r["phase"]) == name
    }

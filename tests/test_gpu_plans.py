"""The two short plans of the GPU check without a GPU: their order and their times, what they bear
(units that hang, crash or are killed, a device that is gone, no kit, no verdict), and both of them
whole on a CPU with tiny shapes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_check
from bench.gpu import build, environment, plans, report, run, units, verdict
from bench.gpu.plans import Plan, Step
from bench.gpu.variants import CHECKED, LSE, OURS

pytestmark = pytest.mark.test_bed

ROOT = Path(__file__).resolve().parents[1]
STAND_IN = """
import os, time
from pathlib import Path
from bench.gpu.units import Unit

DEVICE = {"device": "Stand-in 1", "kernel_hash": "abc", "source_hash": "d", "versions": {}, "commit": None}

def raising(error):
    raise error

def machine(setting):
    return [Unit("machine", lambda: {**DEVICE, "changed_files": 0}, phase="environment")]

def kit(setting):
    return [Unit("kit", lambda: {"environment": {"FROM_THE_KIT": "yes"}, "notes": []})]

def pids(setting):
    figures = lambda: {"pid": os.getpid(), "kit": os.environ.get("FROM_THE_KIT")}
    return [Unit(f"{name}: pid", figures, variant=name) for name in ("one", "two")]

def smoke(setting):
    return [Unit(f"{v}: smoke", lambda: {}, variant=v) for v in ("cpu", "reference")]

def smoke_with_red(setting):
    wrong = lambda: raising(AssertionError("wrong"))
    return [
        Unit("cpu: smoke", wrong, variant="cpu"),
        Unit("reference: smoke", lambda: {}, variant="reference"),
    ]

def smoke_that_waits(setting):
    # Each waits for the other: they must run at the same time.
    def meet(mine, other):
        (Path(setting.out) / mine).touch()
        end = time.monotonic() + 20
        while not (Path(setting.out) / other).exists():
            assert time.monotonic() < end, "the other one does not run"
            time.sleep(0.01)
        return {}
    return [
        Unit("cpu: smoke", lambda: meet("a", "b"), variant="cpu"),
        Unit("reference: smoke", lambda: meet("b", "a"), variant="reference"),
    ]

def timing(key, seconds):
    provider = key.rpartition(": ")[2]
    return {
        "provider": provider, "model": "tiny", "case": "frozen head, reference on-line",
        "tokens": 64, "hidden": 32, "vocabulary": 1000, "seconds": seconds, "ratio_to_floor": 1.1,
        "floor_seconds": 1.0, "floor_flops_per_second": 1e9, "errors": {"loss": 0.0},
        "times": {"op": {"least": seconds, "most": seconds}},
    }

def timed(setting, runs):
    found = []
    for name, seconds in (("cpu", 2.0), ("reference", 1.0), ("eager", 4.0)):
        if name not in setting.red:
            key = f"tiny T=64, frozen head, reference on-line: {name}"
            run = runs.get(name, lambda key=key, seconds=seconds: timing(key, seconds))
            found.append(Unit(key, run, limit=1.0, variant=name))
    return found

def headline(setting):
    return timed(setting, {})

def headline_hangs(setting):
    return timed(setting, {"cpu": lambda: time.sleep(60)})

def headline_crashes(setting):
    return timed(setting, {"cpu": lambda: os._exit(7)})

def headline_is_killed(setting):
    return timed(setting, {"reference": lambda: os.kill(os.getpid(), 9)})

def told(setting):
    return [Unit("told", lambda: {"best": list(setting.best), "red": list(setting.red)})]

def again(setting):
    return [Unit(f"{v}: again", lambda: {}, variant=v) for v in ("cpu", "reference")]
"""
MACHINE = {"device": "Stand-in 1", "kernel_hash": "abc"}


def step(name: str, function: str = "", limit: float = 30, **options: Any) -> Step:
    return Step(name, f"stand_in:{function or name}", limit, **options)


SMOKE = step("smoke", phase="correctness", side_by_side=True, judges=True)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs a plan of units without torch; the data that it left."""
    folder = tmp_path / "path" / "bench" / "gpu"
    folder.mkdir(parents=True)
    (folder / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path / "path")]))

    def run_plan(
        *steps: Step,
        answers: bool = True,
        kept: Path = tmp_path / "kept" / "verdict.json",
        seconds: float = 200,
        **options: Any,
    ) -> dict[str, Any]:
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        setting = units.Setting("cpu", True, str(out))
        session = run.Session(setting, run.Results(out), probe=lambda device, limit: answers)
        plan = Plan("first", seconds, 0, steps, margin=0, **options)
        plans.run(plan, session, kept, time.monotonic())
        data = json.loads((out / "results.json").read_text())
        assert "could not be made" not in (out / "report.md").read_text()
        assert json.loads((out / "verdict.json").read_text())["hung"] == sorted(data["hung"])
        return data

    return run_plan


def statuses(data: dict[str, Any], name: str) -> dict[str, str]:
    """Status by the last part of the key, of a step's records."""
    return {
        r["key"].rpartition(": ")[2] if r["phase"] == "loss" else r["key"]: r["status"]
        for r in data["records"]
        if r.get("step", r["phase"]) == name
    }


# --- the plans themselves -------------------------------------------------------------------------


@pytest.mark.parametrize(("plan", "most"), [(plans.FIRST, 400), (plans.SECOND, 300)])
def test_the_time_limits_of_the_steps_add_up(plan: Plan, most: float) -> None:
    assert plan.seconds <= most and plan.margin >= 2 * run.DEATH_SECONDS + 5
    limits = [step.limit for step in plan.steps]
    assert plan.first_answer + sum(limits) + plan.margin <= plan.seconds
    assert all(limit > 0 for limit in limits)


def test_the_order_of_the_plans() -> None:
    first = [step.name for step in plans.FIRST.steps]
    assert first == ["kit", "machine", "smoke", "headline", "heads", "peers", "rules"]
    second = [step.name for step in plans.SECOND.steps]
    assert second[:3] == ["kit", "machine", "smoke"]
    assert second[3:] == ["tuning", "builds", "winner", "steps", "sanitizer"]


def test_every_step_names_a_function_that_is_there() -> None:
    import importlib

    for step in plans.FIRST.steps + plans.SECOND.steps:
        module, _, function = step.units.partition(":")
        assert callable(getattr(importlib.import_module(f"bench.gpu.{module}"), function))


# --- what a plan bears ----------------------------------------------------------------------------


def test_each_step_knows_what_those_before_it_found(stand_in: Callable[..., Any]) -> None:
    data = stand_in(
        step("kit", phase="build"), step("machine"), SMOKE, step("headline", phase="loss"),
        step("told"), step("pids"),
    )  # fmt: skip
    assert data["not_run"] == [] and data["hung"] == []
    told = next(r for r in data["records"] if r["key"] == "told")
    assert told["best"] == ["reference", "cpu"], "the fastest first"
    assert told["red"] == []
    kit = next(r for r in data["records"] if r["key"] == "kit")
    assert "environment" not in kit, "no path of the machine is recorded"
    assert {r["kit"] for r in data["records"] if r["key"].endswith("pid")} == {"yes"}


def test_a_kept_verdict_says_what_was_found(stand_in: Callable[..., Any], tmp_path: Path) -> None:
    stand_in(step("machine"), SMOKE, step("headline", phase="loss"))
    kept = json.loads((tmp_path / "kept" / "verdict.json").read_text())
    assert kept == json.loads((tmp_path / "out" / "verdict.json").read_text())
    name = "tiny T=64, frozen head, reference on-line"
    assert kept == {
        **MACHINE,
        "sound": ["cpu", "reference"],
        "red": [],
        "hung": [],
        "fastest": {name: "reference"},
        "ceilings": {},
    }


def test_the_smoke_check_runs_side_by_side(stand_in: Callable[..., Any]) -> None:
    data = stand_in(dataclasses.replace(SMOKE, units="stand_in:smoke_that_waits"))
    assert statuses(data, "smoke") == {"cpu: smoke": "ok", "reference: smoke": "ok"}


def test_builds_run_in_processes_of_their_own(stand_in: Callable[..., Any]) -> None:
    data = stand_in(step("pids", in_turn=("one", "two")))
    assert len({r["pid"] for r in data["records"]}) == 2 == len(data["records"])
    data = stand_in(SMOKE, step("pids", in_turn=("one",), needs="cuda fused"))
    (entry,) = data["not_run"]
    assert entry["key"] == "pids: all of it" and "not sound" in entry["reason"]


def test_a_red_variant_is_not_timed(stand_in: Callable[..., Any]) -> None:
    red = dataclasses.replace(SMOKE, units="stand_in:smoke_with_red")
    data = stand_in(step("machine"), red, step("headline", phase="loss"), step("told"))
    assert statuses(data, "smoke") == {"cpu: smoke": "failed", "reference: smoke": "ok"}
    assert statuses(data, "headline") == {"reference": "ok", "eager": "ok"}
    assert verdict.make(data)["red"] == ["cpu"] and verdict.sound(data) == ["reference"]
    assert gpu_check.exit_status(data) == 1
    assert data["records"][-1]["red"] == ["cpu"]


def test_what_was_not_checked_is_not_timed(stand_in: Callable[..., Any]) -> None:
    short = dataclasses.replace(SMOKE, limit=0)
    data = stand_in(step("machine", limit=0), short, step("headline", phase="loss"))
    assert statuses(data, "headline") == {"eager": "ok"}


def test_a_variant_that_hangs_is_left_out_from_there_on(stand_in: Callable[..., Any]) -> None:
    data = stand_in(SMOKE, step("headline", "headline_hangs", phase="loss"), step("again"))
    assert statuses(data, "headline") == {"cpu": "timeout", "reference": "ok", "eager": "ok"}
    assert statuses(data, "again") == {"reference: again": "ok"}
    assert data["hung"] == ["cpu"] and verdict.sound(data) == ["reference"]
    assert verdict.make(data)["hung"] == ["cpu"]
    assert "cpu" in report.short(data).partition("left out")[2]


@pytest.mark.parametrize(
    ("function", "crashed"), [("headline_crashes", "cpu"), ("headline_is_killed", "reference")]
)
def test_the_figures_of_others_survive_a_crash(
    stand_in: Callable[..., Any], function: str, crashed: str
) -> None:
    data = stand_in(SMOKE, step("headline", function, phase="loss"), step("told"))
    want = {"cpu": "ok", "reference": "ok", "eager": "ok"} | {crashed: "crashed"}
    assert statuses(data, "headline") == want
    assert report.red(data["records"]) == {crashed}
    assert data["records"][-1]["best"] == [name for name in ("reference", "cpu") if name != crashed]


def test_when_the_device_is_gone_the_rest_is_named_and_the_plan_ends(
    stand_in: Callable[..., Any],
) -> None:
    data = stand_in(
        SMOKE,
        step("headline", "headline_hangs", phase="loss"),
        step("again"),
        answers=False,
    )
    assert statuses(data, "smoke") == {"cpu: smoke": "ok", "reference: smoke": "ok"}
    assert statuses(data, "headline") == {"cpu": "timeout"}
    left = {entry["key"].rpartition(": ")[2]: entry for entry in data["not_run"]}
    assert list(left) == ["reference", "eager", "all of it"]
    assert left["all of it"]["key"] == "again: all of it"
    assert "no longer answers" in left["all of it"]["reason"]
    assert statuses(data, "again") == {}


def test_a_step_without_time_does_not_run_and_a_later_one_cannot_be_late(
    stand_in: Callable[..., Any],
) -> None:
    slow = step("headline", "headline_hangs", limit=0.2, phase="loss")
    data = stand_in(SMOKE, slow, seconds=0)
    assert data["records"] == []
    assert [entry["key"] for entry in data["not_run"]] == [
        *["all of it: no time was left"] * 2,  # the smoke check's two processes
        "all of it: no time was left",
    ]


def test_no_question_to_the_device_outlasts_the_plan(tmp_path: Path) -> None:
    asked: list[float] = []

    def probe(device: str, limit: float) -> bool:
        asked.append(limit)
        return True

    session = run.Session(units.Setting("cpu", True, ""), run.Results(tmp_path), probe=probe)
    for left in (100, 15, 3, -1):
        session.end = time.monotonic() + left
        session.check_device()
    assert asked == [run.PROBE_SECONDS, pytest.approx(15, abs=1)]


def test_the_probe_asks_a_real_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stand_in_for_torch(text: str) -> bool:
        (tmp_path / "torch.py").write_text(text)
        return run.device_answers("cuda", 3)

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answer = "class ones:\n    def __init__(self, *a, **k): pass\n    sum = item = lambda s: s\n"
    assert stand_in_for_torch(answer)
    assert not stand_in_for_torch("raise RuntimeError('no device')")
    assert not stand_in_for_torch("import time; time.sleep(60)")


def test_a_process_that_never_tells_its_plan_is_given_up(
    stand_in: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sleeping = tmp_path / "path" / "bench" / "gpu" / "sleeping.py"
    sleeping.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(run, "START_SECONDS", 0.5)
    data = stand_in(Step("stuck", "sleeping:units", 30), step("told"), answers=False)
    assert data["records"] == []
    assert [entry["key"] for entry in data["not_run"]] == [
        "all of it: the device no longer answers",
        "told: all of it",
    ]


def test_a_report_that_cannot_be_made_ends_nothing(tmp_path: Path) -> None:
    results = run.Results(tmp_path)
    results.add({"phase": "loss", "key": "a", "status": "ok", "unit_seconds": 1.0})
    assert "could not be made" in (tmp_path / "report.md").read_text(), "figures are missing"
    assert len(json.loads((tmp_path / "results.json").read_text())["records"]) == 1


def test_the_last_table_fits_what_one_sees_of_the_output() -> None:
    key = "7B T=8192, frozen head, reference on-line: triton lean"
    spread = {"least": 0.036, "most": 0.037}
    one = {
        "phase": "loss", "key": key, "status": "ok", "provider": "triton lean", "model": "7B",
        "case": "frozen head, reference on-line", "tokens": 8192, "hidden": 3584,
        "vocabulary": 152064, "seconds": 0.036, "ratio_to_floor": 1.06, "floor_seconds": 0.034,
        "floor_flops_per_second": 7.9e14, "extra_bytes": 2**30, "errors": {},
        "times": {"op": spread},
    }  # fmt: skip
    data = {"started": "now", "records": [one] * 300, "not_run": [], "hung": []}
    text = report.short(data)
    assert len(text) < 12000 and text.endswith("the rest is in report.md")
    assert "1.060" in text


# --- the kit and the verdict ----------------------------------------------------------------------


def test_an_absent_kit_is_said_and_changes_nothing(tmp_path: Path) -> None:
    kit = units.Setting("cpu", True, "", kit=str(tmp_path / "none"), scratch=str(tmp_path / "s"))
    unpack, native = build.kit_units(kit)
    figures = unpack.run()
    assert figures["environment"] == {} and figures["cuda"] is False
    assert "no GPU kit" in figures["notes"][0]
    with pytest.raises(units.NotHere):
        native.run()
    record = {"phase": "build", "key": "kit", "status": "ok", "unit_seconds": 0.1, **figures}
    data = {"started": "now", "records": [record], "not_run": []}
    assert "Kit: no GPU kit" in report.short(data) and "Kit: no GPU kit" in report.render(data)


def test_without_a_kit_the_cuda_kernels_are_built_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import gpu_kit

    class Builder:
        def __init__(self, target: gpu_kit.Target, cache: Path) -> None:
            assert (Path(target.include) / "Python.h").exists() and tmp_path in cache.parents
            self.suffix = target.suffix

        def build(self, flags: tuple[str, ...], place: Path) -> None:
            assert flags == () and place.name.endswith(f"{self.suffix}.new")
            place.write_text("binary")

    def without_nvcc(*_: Any) -> None:
        raise gpu_kit.Missing("nvcc is not on the PATH")

    (tmp_path / "cpo_fast").mkdir()
    setting = units.Setting("cuda", False, "")
    monkeypatch.setattr(gpu_kit, "Builder", Builder)
    assert build.build_cuda(tmp_path) == {"built": ["_cuda"]}
    (made,) = (tmp_path / "cpo_fast").iterdir()
    assert made.name.startswith("_cuda.") and made.read_text() == "binary"
    monkeypatch.setattr(gpu_kit, "Builder", without_nvcc)
    with pytest.raises(units.NotHere, match="nvcc"):
        build.build_unless_placed(setting)
    monkeypatch.setattr(build, "_placed", True)
    with pytest.raises(units.NotHere, match="in place"):
        build.build_unless_placed(setting)


GOOD = {
    **MACHINE,
    "sound": ["reference"],
    "red": [],
    "hung": ["cpu"],
    "fastest": {"tiny T=64, frozen head, reference on-line": "reference"},
    "ceilings": {},
}


def test_the_second_plan_goes_by_a_verdict_that_fits(
    stand_in: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "verdict.json"
    path.write_text(json.dumps(GOOD))
    data = stand_in(
        step("machine"), SMOKE, step("told"), step("again"),
        kept=path, reads_verdict=True,
    )  # fmt: skip
    assert data["verdict"] == "By the verdict of the first plan sound: reference."
    assert statuses(data, "smoke") == {}, "what is known is not checked again"
    told = next(r for r in data["records"] if r["key"] == "told")
    assert told["best"] == ["reference"] and told["red"] == ["cpu"]
    assert statuses(data, "again") == {"reference: again": "ok"}, "what hung is left out"
    assert json.loads(path.read_text()) == GOOD, "the second plan leaves it as it is"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No verdict"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ("null", "damaged"),
        (json.dumps({**MACHINE, "sound": []}), "damaged"),
        (json.dumps({**GOOD, "sound": "cpu"}), "damaged"),
        (json.dumps({**GOOD, "hung": [1]}), "damaged"),
        (json.dumps({**GOOD, "fastest": None}), "damaged"),
        (json.dumps({**GOOD, "sound": []}), "no variant sound"),
        (json.dumps({**GOOD, "device": "Stand-in 2"}), "Stand-in 2"),
        (json.dumps({**GOOD, "kernel_hash": "def"}), "def"),
    ],
)
def test_a_verdict_that_does_not_hold_is_not_used(
    tmp_path: Path, text: str | None, words: str
) -> None:
    path = tmp_path / "verdict.json"
    if text is not None:
        path.write_text(text)
    found, said = verdict.read(path, MACHINE)
    assert found is None and words in said and "the smoke check decides" in said
    path.write_text(json.dumps(GOOD))
    assert verdict.read(path, MACHINE)[0] == GOOD
    assert verdict.read(path, {})[0] is None, "nothing is known of this machine"


def test_a_verdict_outlives_a_change_of_the_check_but_not_of_the_kernels() -> None:
    assert "bench" in environment.SOURCES and "bench" not in environment.KERNELS
    assert environment.source_hash(environment.KERNELS) != environment.source_hash()
    assert {"csrc/cuda", "kernels", "cpo_fast/loss"} == set(environment.KERNELS)


def test_without_a_verdict_the_second_plan_checks_first(
    stand_in: Callable[..., Any], tmp_path: Path
) -> None:
    data = stand_in(
        step("machine"), SMOKE, step("headline", phase="loss"),
        kept=tmp_path / "none.json", reads_verdict=True,
    )  # fmt: skip
    assert "No verdict" in data["verdict"] and "No verdict" in report.short(data)
    assert statuses(data, "smoke") == {"cpu: smoke": "ok", "reference: smoke": "ok"}
    assert statuses(data, "headline") == {"cpu": "ok", "reference": "ok", "eager": "ok"}


# --- the command ----------------------------------------------------------------------------------


def command(folder: Path, plan: str, kept: Path) -> list[str]:
    options = ["--plan", plan, "--device", "cpu", "--quick", "--out", str(folder)]
    options += ["--verdict", str(kept), "--kit", str(folder / "no-kit")]
    return [sys.executable, "-m", "bench.gpu_check", *options]


def test_results_are_whole_when_the_command_is_killed(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(tmp_path, "first", tmp_path / "verdict.json"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    file = tmp_path / "results.json"

    def records() -> list[dict[str, Any]]:
        return json.loads(file.read_text())["records"] if file.exists() else []

    try:
        while len(records()) < 3 and process.poll() is None:  # the machine is known
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    found = records()
    assert [r["key"] for r in found[:3]] == ["kit", "native parts", "machine"]
    assert "the run is not finished" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "verdict.json").read_text())["sound"] == []


@pytest.mark.slow
def test_both_plans_on_the_cpu(tmp_path: Path) -> None:
    kept = tmp_path / "kept" / "verdict.json"
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(tmp_path / "1", "first", kept),
        cwd=ROOT, capture_output=True, text=True, check=False, env=environ,
    )  # fmt: skip
    data = json.loads((tmp_path / "1" / "results.json").read_text())
    bad = [record for record in data["records"] if record["status"] in report.BAD]
    assert (done.returncode, bad, data["not_run"]) == (0, [], []), done.stderr
    phases = {r["phase"] for r in data["records"]}
    assert phases == {
        *("build", "environment", "ceilings", "products", "correctness", "loss", "profile")
    }
    keys = [r["key"] for r in data["records"] if r["phase"] == "loss"]
    assert keys.index("tiny T=64, frozen head, reference on-line: cpu") == 0
    assert all(key.endswith("eager") for key in keys[-2:]), "peers come last"
    profile = next(r for r in data["records"] if r["phase"] == "profile")
    assert profile["seconds"] >= profile["kernels"][0]["seconds"] > 0
    assert done.stdout.rstrip().endswith("report.md") and "x floor" in done.stdout
    found = json.loads(kept.read_text())
    assert found["sound"] == list(CHECKED["cpu"]) and found["hung"] == []
    assert found["device"] == environment.processor() and len(found["kernel_hash"]) == 16

    done = subprocess.run(
        command(tmp_path / "2", "second", kept),
        cwd=ROOT, capture_output=True, text=True, check=False, env=environ,
    )  # fmt: skip
    data = json.loads((tmp_path / "2" / "results.json").read_text())
    bad = [record for record in data["records"] if record["status"] in report.BAD]
    assert (done.returncode, bad) == (0, []), done.stderr
    assert data["verdict"].startswith("By the verdict of the first plan sound: cpu")
    phases = {r["phase"] for r in data["records"]}
    assert {"tuning", "loss", "correctness", "steps", "sanitizer"} <= phases
    assert not statuses(data, "smoke")
    text = (tmp_path / "2" / "report.md").read_text()
    assert "## Settings" in text and "1190" in text and "## Step of tiny" in text


def test_the_names_of_variants_agree() -> None:
    assert set(CHECKED["cuda"]) | set(CHECKED["cpu"]) == set(OURS)
    assert CHECKED["cuda"][:3] == ("triton lean", "cuda rows", "cuda fused")
    assert LSE in CHECKED["cuda"]

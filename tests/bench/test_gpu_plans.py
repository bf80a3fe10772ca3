"""The two short plans of the GPU check without a GPU: their order and their times, what they bear
(units that hang, crash or are killed, a device that is gone), and both of them whole on a CPU with
tiny shapes."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_check
from bench.gpu import environment, plans, report, run, units, verdict
from bench.gpu.plans import Plan, Step
from bench.gpu.variants import CHECKED, IMPLEMENTATIONS
from tests.bench.stand_in import MACHINE, ROOT, SMOKE, StandIn, statuses, step

pytestmark = pytest.mark.complete


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


# --- the plans themselves -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "most"), [(plans.FIRST, 400), (plans.TRAINING, 280), (plans.QUACK, 240)]
)
def test_the_time_limits_of_the_steps_add_up(plan: Plan, most: float) -> None:
    assert plan.seconds <= most and plan.margin >= 2 * run.DEATH_SECONDS + 5
    limits = [step.limit for step in plan.steps]
    assert plan.first_answer + sum(limits) + plan.margin <= plan.seconds
    assert all(limit > 0 for limit in limits)


@pytest.mark.parametrize(("left_out", "last"), [("smoke", "tuning"), ("", "winner")])
def test_what_has_its_time_in_the_second_plan_with_a_verdict_and_without(
    left_out: str, last: str
) -> None:
    plan = plans.SECOND
    assert plan.seconds == 330 and plan.margin == 15
    names = [step.name for step in plan.steps]
    certain = [s for s in plan.steps[: names.index(last) + 1] if s.name != left_out]
    limits = [step.limit for step in certain]
    assert plan.first_answer + sum(limits) + plan.margin <= plan.seconds


def test_the_order_of_the_plans() -> None:
    first = [step.name for step in plans.FIRST.steps]
    assert first == ["kit", "machine", "smoke", "headline", "heads", "peers", "rules"]
    assert [(step.name, step.limit) for step in plans.SECOND.steps] == [
        *(("kit", 20), ("machine", 10), ("smoke", 45), ("attention", 35), ("steps", 150)),
        *(("winner", 30), ("tuning", 50), ("sanitizer", 15), ("builds", 20)),
    ]


def test_the_two_plans_and_a_start_fit_a_quarter_of_an_hour() -> None:
    assert plans.FIRST.seconds + plans.SECOND.seconds == 12 * 60 + 10
    assert "The plans take 12:10 of 15 minutes at most" in (ROOT / "docs" / "gpu.md").read_text()


def test_every_step_names_a_function_that_is_there() -> None:
    for one in (one for plan in plans.PLANS.values() for one in plan.steps):
        module, _, function = one.units.partition(":")
        assert callable(getattr(importlib.import_module(f"bench.gpu.{module}"), function))


# --- what a plan bears ----------------------------------------------------------------------------


def test_each_step_knows_what_those_before_it_found(stand_in: StandIn) -> None:
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


def test_a_plan_leaves_few_files(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in(step("machine"), SMOKE, step("headline", phase="loss"), step("told"))
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"results.json", "report.md", "verdict.json", "plan.log"}


def test_a_late_first_answer_does_not_cost_the_kit(tmp_path: Path, stand_in: StandIn) -> None:
    out = tmp_path / "out"
    out.mkdir()
    session = run.Session(units.Setting("cpu", True, str(out)), run.Results(out))
    plan = Plan("first", 100, 5, (step("kit", phase="build", limit=20),), margin=0)
    plans.run(plan, session, tmp_path / "kept.json", time.monotonic() - 40)
    assert [r["key"] for r in session.results.records] == ["kit"]


def test_a_kept_verdict_says_what_was_found(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in(step("machine"), SMOKE, step("headline", phase="loss"))
    kept = json.loads((tmp_path / "kept" / "verdict.json").read_text())
    assert kept == json.loads((tmp_path / "out" / "verdict.json").read_text())
    name = "tiny T=64, frozen head, reference on-line"
    assert kept == {
        **MACHINE,
        "quick": False,
        "sound": ["cpu", "reference"],
        "red": [],
        "hung": [],
        "fastest": {name: "reference"},
        "ceilings": {},
    }


def test_the_smoke_check_runs_side_by_side(stand_in: StandIn) -> None:
    data = stand_in(dataclasses.replace(SMOKE, units="stand_in:smoke_that_waits"))
    assert statuses(data, "smoke") == {"cpu: smoke": "ok", "reference: smoke": "ok"}


def test_builds_run_in_processes_of_their_own(stand_in: StandIn) -> None:
    data = stand_in(step("pids", in_turn=("one", "two")))
    assert len({r["pid"] for r in data["records"]}) == 2 == len(data["records"])
    data = stand_in(SMOKE, step("pids", in_turn=("one",), needs="cuda fused"))
    (entry,) = data["not_run"]
    assert entry["key"] == "pids: all units" and "not passed" in entry["reason"]


def test_a_red_variant_is_not_timed(stand_in: StandIn) -> None:
    red = dataclasses.replace(SMOKE, units="stand_in:smoke_with_red")
    data = stand_in(step("machine"), red, step("headline", phase="loss"), step("told"))
    assert statuses(data, "smoke") == {"cpu: smoke": "failed", "reference: smoke": "ok"}
    assert statuses(data, "headline") == {"reference": "ok", "eager": "ok"}
    assert verdict.make(data)["red"] == ["cpu"] and verdict.sound(data) == ["reference"]
    assert gpu_check.exit_status(data) == 1
    assert data["records"][-1]["red"] == ["cpu"]


def test_what_was_not_checked_is_not_timed(stand_in: StandIn) -> None:
    short = dataclasses.replace(SMOKE, limit=0)
    data = stand_in(step("machine", limit=0), short, step("headline", phase="loss"))
    assert statuses(data, "headline") == {"eager": "ok"}


def test_a_variant_that_hangs_is_left_out_from_there_on(stand_in: StandIn) -> None:
    data = stand_in(SMOKE, step("headline", "headline_hangs", phase="loss"), step("again"))
    assert statuses(data, "headline") == {"cpu": "timeout", "reference": "ok", "eager": "ok"}
    assert statuses(data, "again") == {"reference: again": "ok"}
    assert data["hung"] == ["cpu"] and verdict.sound(data) == ["reference"]
    assert verdict.make(data)["hung"] == ["cpu"]
    assert "cpu" in report.short(data).partition("skipped afterwards")[2]


@pytest.mark.parametrize(
    ("function", "crashed"), [("headline_crashes", "cpu"), ("headline_is_killed", "reference")]
)
def test_the_figures_of_others_survive_a_crash(
    stand_in: StandIn, function: str, crashed: str
) -> None:
    data = stand_in(SMOKE, step("headline", function, phase="loss"), step("told"))
    want = {"cpu": "ok", "reference": "ok", "eager": "ok"} | {crashed: "crashed"}
    assert statuses(data, "headline") == want
    assert report.red(data["records"]) == {crashed}
    assert data["records"][-1]["best"] == [name for name in ("reference", "cpu") if name != crashed]


def test_when_the_device_is_gone_the_rest_is_named_and_the_plan_ends(
    stand_in: StandIn,
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
    assert list(left) == ["reference", "eager", "all units"]
    assert left["all units"]["key"] == "again: all units"
    assert "no longer answers" in left["all units"]["reason"]
    assert statuses(data, "again") == {}


def test_a_step_without_time_does_not_run_and_a_later_one_cannot_be_late(
    stand_in: StandIn,
) -> None:
    slow = step("headline", "headline_hangs", limit=0.2, phase="loss")
    data = stand_in(SMOKE, slow, seconds=0)
    assert data["records"] == []
    assert [entry["key"] for entry in data["not_run"]] == [
        *["all units: no time was left"] * 2,  # the smoke check's two processes
        "all units: no time was left",
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
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sleeping = stand_in.modules / "sleeping.py"
    sleeping.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(run, "START_SECONDS", 0.5)
    data = stand_in(Step("stuck", "sleeping:units", 30), step("told"), answers=False)
    assert data["records"] == []
    assert [entry["key"] for entry in data["not_run"]] == [
        "all units: the device no longer answers",
        "told: all units",
    ]


def test_a_report_that_cannot_be_made_ends_nothing(tmp_path: Path) -> None:
    results = run.Results(tmp_path)
    results.add({"phase": "loss", "key": "a", "status": "ok", "unit_seconds": 1.0})
    assert "making this file failed" in (tmp_path / "report.md").read_text(), "figures are missing"
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


# --- the command ----------------------------------------------------------------------------------


def command(folder: Path, plan: str, kept: Path) -> list[str]:
    options = ["--plan", plan, "--device", "cpu", "--quick", "--out", str(folder)]
    options += ["--verdict", str(kept), "--kit", str(folder / "no-kit")]
    return [sys.executable, "-m", "bench.gpu_check", *options]


def test_a_plan_takes_no_options_of_the_full_check(tmp_path: Path) -> None:
    for more in (["--resume"], ["--only", "loss"]):
        with pytest.raises(SystemExit):
            gpu_check.main(["--plan", "first", "--out", str(tmp_path), *more])


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


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A plain copy of what the check needs of the tree."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("bench", "cpo_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, symlinks=True, ignore=ignored)

    return tmp_path / "tree"


@pytest.mark.slow
def test_both_plans_on_the_cpu(tmp_path: Path, copy: Path) -> None:
    kept = tmp_path / "kept" / "verdict.json"
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(tmp_path / "1", "first", kept),
        cwd=copy, capture_output=True, text=True, check=False, env=environ,
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
        cwd=copy, capture_output=True, text=True, check=False, env=environ,
    )  # fmt: skip
    data = json.loads((tmp_path / "2" / "results.json").read_text())
    bad = [record for record in data["records"] if record["status"] in report.BAD]
    assert (done.returncode, bad) == (0, []), done.stderr
    assert data["verdict"].startswith("Sound by the verdict of the first plan: cpu")
    phases = {r["phase"] for r in data["records"]}
    assert {"tuning", "loss", "correctness", "steps", "sanitizer"} <= phases
    assert not statuses(data, "smoke")
    text = (tmp_path / "2" / "report.md").read_text()
    assert "## Settings" in text and "1190" in text and "## Steps of tiny" in text
    assert "| ours, gathered | gathered |" in text and "| tiny: ours |" in text
    checked = statuses(data, "attention")
    assert checked["attention auto: against float32"] == "ok"
    assert checked["attention auto, fused: against float32"] == "skipped"  # needs CUDA
    assert checked["attention gathered: against float32"] == "ok" and len(checked) == 6


def test_the_names_of_variants_agree() -> None:
    assert set(CHECKED["cuda"]) | set(CHECKED["cpu"]) == set(IMPLEMENTATIONS)
    assert CHECKED["cuda"][:3] == ("triton lean", "cuda rows", "cuda fused")


def test_a_slow_first_answer_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Torch comes from a cold disk: a check that gave up at once would have checked nothing."""
    waited: list[float] = []

    def answers(device: str, limit: float) -> bool:
        waited.append(limit)
        return False

    monkeypatch.setattr(gpu_check, "device_answers", answers)
    for plan in plans.PLANS.values():
        status = gpu_check.main(["--plan", plan.name, "--out", str(tmp_path)])
        assert status == gpu_check.NO_GPU and waited.pop() >= 90 > plan.first_answer
    assert "does not answer" in capsys.readouterr().err

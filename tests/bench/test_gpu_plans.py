"""The short plans of the GPU check without a GPU: order, time limits, units that hang, crash or are
killed, a device that stops answering, and two complete plans on a CPU with tiny shapes."""

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
from bench.gpu import plans, report, run, units, verdict
from bench.gpu.plans import Plan, Step
from bench.gpu.variants import CHECKED, IMPLEMENTATIONS
from cpo_fast.doctor import processor
from tests.bench.records import make_timing
from tests.bench.stand_in import MACHINE, ROOT, SMOKE, StandIn, get_statuses, make_step

pytestmark = pytest.mark.complete


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


# --- steps and limits -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "most"), [(plans.FIRST, 400), (plans.TRAINING, 280), (plans.QUACK, 240)]
)
def test_step_limits_fit_the_plan(plan: Plan, most: float) -> None:
    assert plan.seconds <= most and plan.margin >= 2 * run.DEATH_SECONDS + 5
    limits = [step.limit for step in plan.steps]
    assert plan.first_answer + sum(limits) + plan.margin <= plan.seconds
    assert all(limit > 0 for limit in limits)


@pytest.mark.parametrize(("left_out", "last"), [("smoke", "tuning"), ("", "winner")])
def test_steps_that_fit_the_second_plan_with_and_without_verdict(left_out: str, last: str) -> None:
    plan = plans.SECOND
    assert plan.seconds == 330 and plan.margin == 15
    names = [step.name for step in plan.steps]
    certain = [s for s in plan.steps[: names.index(last) + 1] if s.name != left_out]
    limits = [step.limit for step in certain]
    assert plan.first_answer + sum(limits) + plan.margin <= plan.seconds


def test_the_order_of_steps() -> None:
    first = [step.name for step in plans.FIRST.steps]
    assert first == ["kit", "machine", "smoke", "headline", "heads", "peers", "rules"]
    assert [(step.name, step.limit) for step in plans.SECOND.steps] == [
        *(("kit", 20), ("machine", 10), ("smoke", 45), ("attention", 35), ("steps", 150)),
        *(("winner", 30), ("tuning", 50), ("sanitizer", 15), ("builds", 20)),
    ]


def test_the_two_plans_fit_15_minutes() -> None:
    assert plans.FIRST.seconds + plans.SECOND.seconds == 12 * 60 + 10
    assert "The plans take 12:10 of 15 minutes at most" in (ROOT / "docs" / "gpu.md").read_text()


def test_every_step_names_an_existing_function() -> None:
    for one in (one for plan in plans.PLANS.values() for one in plan.steps):
        module, _, function = one.units.partition(":")
        assert callable(getattr(importlib.import_module(f"bench.gpu.{module}"), function))


# --- failures -------------------------------------------------------------------------------------


def test_steps_get_the_results_of_earlier_steps(stand_in: StandIn) -> None:
    data = stand_in(
        make_step("kit", phase="build"), make_step("machine"), SMOKE,
        make_step("headline", phase="loss"), make_step("setting"), make_step("pids"),
    )  # fmt: skip
    assert data["not_run"] == [] and data["hung"] == []
    found = next(r for r in data["records"] if r["key"] == "setting")
    assert found["best"] == ["reference", "cpu"], "fastest first"
    assert found["red"] == []
    kit = next(r for r in data["records"] if r["key"] == "kit")
    assert "environment" not in kit, "no path is recorded"
    assert {r["kit"] for r in data["records"] if r["key"].endswith("pid")} == {"yes"}


def test_a_plan_leaves_few_files(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in(make_step("machine"), SMOKE, make_step("headline", phase="loss"), make_step("setting"))
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"results.json", "report.md", "verdict.json", "plan.log"}


def test_a_late_first_answer_does_not_shorten_the_kit_step(
    tmp_path: Path, stand_in: StandIn
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    session = run.Session(units.Setting("cpu", True, str(out)), run.Results(out))
    plan = Plan("first", 100, 5, (make_step("kit", phase="build", limit=20),), margin=0)
    plans.run(plan, session, tmp_path / "kept.json", time.monotonic() - 40)
    assert [r["key"] for r in session.results.records] == ["kit"]


def test_the_verdict_is_kept(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in(make_step("machine"), SMOKE, make_step("headline", phase="loss"))
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
    data = stand_in(dataclasses.replace(SMOKE, units="stand_in:list_smoke_that_waits"))
    assert get_statuses(data, "smoke") == {"cpu: smoke": "ok", "reference: smoke": "ok"}


def test_builds_run_in_separate_processes(stand_in: StandIn) -> None:
    data = stand_in(make_step("pids", in_turn=("one", "two")))
    assert len({r["pid"] for r in data["records"]}) == 2 == len(data["records"])
    data = stand_in(SMOKE, make_step("pids", in_turn=("one",), needs="cuda fused"))
    (entry,) = data["not_run"]
    assert entry["key"] == "pids: all units" and "not passed" in entry["reason"]


def test_a_red_variant_is_not_timed(stand_in: StandIn) -> None:
    red = dataclasses.replace(SMOKE, units="stand_in:list_smoke_with_red")
    data = stand_in(
        make_step("machine"), red, make_step("headline", phase="loss"), make_step("setting")
    )
    assert get_statuses(data, "smoke") == {"cpu: smoke": "failed", "reference: smoke": "ok"}
    assert get_statuses(data, "headline") == {"reference": "ok", "eager": "ok"}
    assert verdict.make_verdict(data)["red"] == ["cpu"] and verdict.list_sound(data) == [
        "reference"
    ]
    assert gpu_check.get_exit_status(data) == 1
    assert data["records"][-1]["red"] == ["cpu"]


def test_unchecked_variants_are_not_timed(stand_in: StandIn) -> None:
    short = dataclasses.replace(SMOKE, limit=0)
    data = stand_in(make_step("machine", limit=0), short, make_step("headline", phase="loss"))
    assert get_statuses(data, "headline") == {"eager": "ok"}


def test_a_variant_that_hangs_is_skipped_in_later_steps(stand_in: StandIn) -> None:
    data = stand_in(
        SMOKE, make_step("headline", "headline_hangs", phase="loss"), make_step("again")
    )
    assert get_statuses(data, "headline") == {"cpu": "timeout", "reference": "ok", "eager": "ok"}
    assert get_statuses(data, "again") == {"reference: again": "ok"}
    assert data["hung"] == ["cpu"] and verdict.list_sound(data) == ["reference"]
    assert verdict.make_verdict(data)["hung"] == ["cpu"]
    assert "cpu" in report.make_summary(data).partition("skipped afterwards")[2]


@pytest.mark.parametrize(
    ("function", "crashed"), [("headline_crashes", "cpu"), ("headline_is_killed", "reference")]
)
def test_other_figures_survive_a_crash(stand_in: StandIn, function: str, crashed: str) -> None:
    data = stand_in(SMOKE, make_step("headline", function, phase="loss"), make_step("setting"))
    want = {"cpu": "ok", "reference": "ok", "eager": "ok"} | {crashed: "crashed"}
    assert get_statuses(data, "headline") == want
    assert report.find_red(data["records"]) == {crashed}
    assert data["records"][-1]["best"] == [name for name in ("reference", "cpu") if name != crashed]


def test_the_plan_ends_when_the_device_stops_answering(
    stand_in: StandIn,
) -> None:
    data = stand_in(
        SMOKE,
        make_step("headline", "headline_hangs", phase="loss"),
        make_step("again"),
        answers=False,
    )
    assert get_statuses(data, "smoke") == {"cpu: smoke": "ok", "reference: smoke": "ok"}
    assert get_statuses(data, "headline") == {"cpu": "timeout"}
    left = {entry["key"].rpartition(": ")[2]: entry for entry in data["not_run"]}
    assert list(left) == ["reference", "eager", "all units"]
    assert left["all units"]["key"] == "again: all units"
    assert "no longer answers" in left["all units"]["reason"]
    assert get_statuses(data, "again") == {}


def test_steps_without_time_do_not_run(
    stand_in: StandIn,
) -> None:
    slow = make_step("headline", "headline_hangs", limit=0.2, phase="loss")
    data = stand_in(SMOKE, slow, seconds=0)
    assert data["records"] == []
    assert [entry["key"] for entry in data["not_run"]] == [
        *["all units: no time was left"] * 2,  # the smoke check's two processes
        "all units: no time was left",
    ]


def test_device_probes_end_with_the_plan(tmp_path: Path) -> None:
    asked: list[float] = []

    def probe(device: str, limit: float) -> bool:
        asked.append(limit)
        return True

    session = run.Session(units.Setting("cpu", True, ""), run.Results(tmp_path), probe=probe)
    for left in (100, 15, 3, -1):
        session.end = time.monotonic() + left
        session.check_device()
    assert asked == [run.PROBE_SECONDS, pytest.approx(15, abs=1)]


def test_the_probe_runs_a_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def probe_with_torch(text: str) -> bool:
        (tmp_path / "torch.py").write_text(text)
        return run.probe_device("cuda", 3)

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answer = "class ones:\n    def __init__(self, *a, **k): pass\n    sum = item = lambda s: s\n"
    assert probe_with_torch(answer)
    assert not probe_with_torch("raise RuntimeError('no device')")
    assert not probe_with_torch("import time; time.sleep(60)")


def test_a_process_that_sends_no_plan_is_killed(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sleeping = stand_in.modules / "sleeping.py"
    sleeping.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(run, "START_SECONDS", 0.5)
    data = stand_in(Step("stuck", "sleeping:list_units", 30), make_step("setting"), answers=False)
    assert data["records"] == []
    assert [entry["key"] for entry in data["not_run"]] == [
        "all units: the device no longer answers",
        "setting: all units",
    ]


def test_an_error_in_the_report_does_not_end_the_run(tmp_path: Path) -> None:
    results = run.Results(tmp_path)
    results.add({"phase": "loss", "key": "a", "status": "ok", "unit_seconds": 1.0})
    assert "making this file failed" in (tmp_path / "report.md").read_text(), "figures are missing"
    assert len(json.loads((tmp_path / "results.json").read_text())["records"]) == 1


def test_the_summary_is_short() -> None:
    one = make_timing("triton lean", 36, ratio_to_floor=1.06)
    data = {"started": "now", "records": [one] * 300, "not_run": [], "hung": []}
    text = report.make_summary(data)
    assert len(text) < 12000 and text.endswith("the rest is in report.md")
    assert "1.060" in text


# --- the command ----------------------------------------------------------------------------------


def build_command(folder: Path, plan: str, kept: Path) -> list[str]:
    options = ["--plan", plan, "--device", "cpu", "--quick", "--out", str(folder)]
    options += ["--verdict", str(kept), "--kit", str(folder / "no-kit")]
    return [sys.executable, "-m", "bench.gpu_check", *options]


def test_a_plan_rejects_options_of_the_full_check(tmp_path: Path) -> None:
    for more in (["--resume"], ["--only", "loss"]):
        with pytest.raises(SystemExit):
            gpu_check.main(["--plan", "first", "--out", str(tmp_path), *more])


def test_results_are_complete_when_the_command_is_killed(tmp_path: Path) -> None:
    process = subprocess.Popen(
        build_command(tmp_path, "first", tmp_path / "verdict.json"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    file = tmp_path / "results.json"

    def read_records() -> list[dict[str, Any]]:
        return json.loads(file.read_text())["records"] if file.exists() else []

    try:
        while len(read_records()) < 3 and process.poll() is None:  # until the machine is recorded
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    found = read_records()
    assert [r["key"] for r in found[:3]] == ["kit", "native parts", "machine"]
    assert "the run is not finished" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "verdict.json").read_text())["sound"] == []


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A plain copy of the folders that the check needs."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("bench", "cpo_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, symlinks=True, ignore=ignored)

    return tmp_path / "tree"


@pytest.mark.slow
def test_both_plans_on_the_cpu(tmp_path: Path, copy: Path) -> None:
    kept = tmp_path / "kept" / "verdict.json"
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        build_command(tmp_path / "1", "first", kept),
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
    assert all(key.endswith("eager") for key in keys[-2:]), "peers are last"
    profile = next(r for r in data["records"] if r["phase"] == "profile")
    assert profile["seconds"] >= profile["kernels"][0]["seconds"] > 0
    assert done.stdout.rstrip().endswith("report.md") and "x floor" in done.stdout
    found = json.loads(kept.read_text())
    assert found["sound"] == list(CHECKED["cpu"]) and found["hung"] == []
    assert found["device"] == processor() and len(found["kernel_hash"]) == 16

    done = subprocess.run(
        build_command(tmp_path / "2", "second", kept),
        cwd=copy, capture_output=True, text=True, check=False, env=environ,
    )  # fmt: skip
    data = json.loads((tmp_path / "2" / "results.json").read_text())
    bad = [record for record in data["records"] if record["status"] in report.BAD]
    assert (done.returncode, bad) == (0, []), done.stderr
    assert data["verdict"].startswith("Sound by the verdict of the first plan: cpu")
    phases = {r["phase"] for r in data["records"]}
    assert {"tuning", "loss", "correctness", "steps", "sanitizer"} <= phases
    assert not get_statuses(data, "smoke")
    text = (tmp_path / "2" / "report.md").read_text()
    assert "## Settings" in text and "1190" in text and "## Steps of tiny" in text
    assert "| ours, gathered | gathered |" in text and "| tiny: ours |" in text
    checked = get_statuses(data, "attention")
    assert checked["attention auto: against float32"] == "ok"
    assert checked["attention auto, fused: against float32"] == "skipped"  # needs CUDA
    assert checked["attention gathered: against float32"] == "ok" and len(checked) == 6


def test_the_names_of_variants_agree() -> None:
    assert set(CHECKED["cuda"]) | set(CHECKED["cpu"]) == set(IMPLEMENTATIONS)
    assert CHECKED["cuda"][:3] == ("triton lean", "cuda rows", "cuda fused")


def test_plans_wait_for_a_slow_first_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Importing torch from a cold disk can take longer than the planned first answer."""
    waited: list[float] = []

    def probe(device: str, limit: float) -> bool:
        waited.append(limit)
        return False

    monkeypatch.setattr(gpu_check, "probe_device", probe)
    for plan in plans.PLANS.values():
        status = gpu_check.main(["--plan", plan.name, "--out", str(tmp_path)])
        assert status == gpu_check.NO_GPU and waited.pop() >= 90 > plan.first_answer
    assert "does not answer" in capsys.readouterr().err

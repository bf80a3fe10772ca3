"""`make gpu-check` without a GPU: the very same code on a CPU with tiny shapes, and how it bears
units that fail, crash, hang or spoil their process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_check
from bench.gpu import report, run, worker
from bench.gpu import sanitizer as sanitizing
from bench.gpu.units import NotHere, Setting, Unit

pytestmark = pytest.mark.complete

ROOT = Path(__file__).resolve().parents[2]
GPU = Setting("cuda", False, "")
MISBEHAVING = """
import os, time
from bench.gpu.units import NotHere, Unit

def raising(error):
    raise error

def units(setting):
    return [
        Unit("fine", lambda: {"figure": 1.5}),
        Unit("wrong", lambda: raising(AssertionError("3 > 2"))),
        Unit("absent", lambda: raising(NotHere("no such thing here"))),
        Unit("crash", lambda: os._exit(7)),
        Unit("killed", lambda: os.kill(os.getpid(), 9)),
        Unit("hang", lambda: time.sleep(60), limit=0.5),
        Unit("spoilt", lambda: raising(RuntimeError("CUDA error: illegal memory access"))),
        Unit("pid", lambda: {"pid": os.getpid()}),
        Unit("last", lambda: {"pid": os.getpid()}),
    ]
"""


def check(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu_check", "--out", str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_phase_on_the_cpu(tmp_path: Path) -> None:
    done = check(tmp_path, "--device", "cpu", "--quick", "--minutes", "15")
    data = json.loads((tmp_path / "results.json").read_text())
    bad = [record for record in data["records"] if record["status"] in report.BAD]
    assert (done.returncode, bad, data["not_run"]) == (0, [], []), done.stderr
    phases = {record["phase"] for record in data["records"]}
    # The checks of attention count as correctness.
    assert phases == {*gpu_check.PHASES, "products", "profile", "imports"} - {"attention"}
    assert any(record.get("step") == "attention" for record in data["records"])
    timed = [r for r in data["records"] if r["phase"] == "loss" and r["status"] == "ok"]
    assert {"eager"} < {r["provider"] for r in timed}
    assert all(r["seconds"] > 0 and r["floor_seconds"] > 0 for r in timed)
    text = (tmp_path / "report.md").read_text()
    for words in ("## Machine", "## Checks", "## Ceilings", "## Loss op", "none failed"):
        assert words in text
    assert "none failed" in done.stdout and "x floor" in done.stdout
    # Nothing is done twice.
    before = len(data["records"])
    again = check(tmp_path, "--device", "cpu", "--quick", "--resume", "--only", "ceilings")
    after = json.loads((tmp_path / "results.json").read_text())["records"]
    assert (again.returncode, len(after)) == (0, before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = check(tmp_path)
    assert done.returncode == gpu_check.NO_GPU and "no CUDA device" in done.stderr


@pytest.fixture
def misbehaving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "path" / "bench" / "gpu"
    folder.mkdir(parents=True)
    (folder / "misbehaving.py").write_text(MISBEHAVING)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path / "path")]))
    return "misbehaving"


def run_phase(phase: str, folder: Path, seconds: float, resume: bool = False) -> dict[str, Any]:
    results = run.Results(folder, resume)
    setting = Setting("cpu", True, str(folder))
    session = run.Session(setting, results, probe=lambda device, limit: True)
    run.run_phase(phase, session, time.monotonic() + seconds)
    return json.loads((folder / "results.json").read_text())


def test_a_unit_that_fails_costs_itself_only(tmp_path: Path, misbehaving: str) -> None:
    data = run_phase(misbehaving, tmp_path, 60)
    found = {record["key"]: record for record in data["records"]}
    assert [(key, record["status"]) for key, record in found.items()] == [
        ("fine", "ok"),
        ("wrong", "failed"),
        ("absent", "skipped"),
        ("crash", "crashed"),
        ("killed", "crashed"),
        ("hang", "timeout"),
        ("spoilt", "error"),
        ("pid", "ok"),
        ("last", "ok"),
    ]
    assert found["fine"]["figure"] == 1.5 and found["wrong"]["reason"] == "3 > 2"
    assert "7" in found["crash"]["reason"] and "-9" in found["killed"]["reason"]
    assert found["pid"]["pid"] == found["last"]["pid"], "a process is kept while it is sound"
    assert data["not_run"] == []
    assert "Traceback" in (tmp_path / "misbehaving.log").read_text()


def test_the_time_is_kept_and_the_rest_is_named(tmp_path: Path, misbehaving: str) -> None:
    begun = time.monotonic()
    data = run_phase(misbehaving, tmp_path, -1)
    assert data["records"] == [] and len(data["not_run"]) == 1
    path = tmp_path / "path" / "bench" / "gpu" / "misbehaving.py"
    path.write_text(MISBEHAVING.replace("limit=0.5", "limit=600"))
    data = run_phase(misbehaving, tmp_path, 6)
    assert time.monotonic() - begun < 20
    assert [entry["key"] for entry in data["not_run"]] == ["hang", "spoilt", "pid", "last"]
    assert "Not reached in the time" in (tmp_path / "report.md").read_text()
    path.write_text(MISBEHAVING)
    data = run_phase(misbehaving, tmp_path, 60, resume=True)
    keys = [record["key"] for record in data["records"]]
    assert len(keys) == 9 == len(set(keys)) and data["not_run"] == []


HANGING = """
import time
from bench.gpu.units import Unit

def units(setting):
    hang = Unit("a: hang", lambda: time.sleep(60), limit=0.5, variant="a")
    return [hang, Unit("a: like it", lambda: {}, variant="a"), Unit("b: other", lambda: {})]
"""


def test_a_variant_whose_unit_hangs_takes_no_more_time(tmp_path: Path, misbehaving: str) -> None:
    path = tmp_path / "path" / "bench" / "gpu" / "misbehaving.py"
    path.write_text(HANGING)
    data = run_phase(misbehaving, tmp_path, 60)
    found = [(record["key"], record["status"]) for record in data["records"]]
    assert found == [("a: hang", "timeout"), ("b: other", "ok")]
    assert [entry["key"] for entry in data["not_run"]] == ["a: like it"]
    assert data["hung"] == ["a"] and "skipped afterwards: a" in report.verdict(data)


def test_a_fault_of_the_device_is_met_by_the_unit_that_caused_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def synchronize() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    def launcher() -> dict[str, Any]:
        raise RuntimeError("row kernel: an illegal memory access was encountered")

    unit, failing = Unit("a", lambda: {"figure": 1}), Unit("b", launcher)
    assert worker.outcome(unit) == ("ok", {"figure": 1}, False)
    assert worker.outcome(failing)[::2] == ("error", False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert worker.outcome(unit)[::2] == ("error", True)
    assert worker.outcome(failing)[::2] == ("error", True)


def sanitizer(monkeypatch: pytest.MonkeyPatch, *failing: str) -> list[list[str]]:
    """Stands in for compute-sanitizer, which finds something in the variants named; its calls."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        status = sanitizing.FAILED if command[-1] in failing else 0
        return subprocess.CompletedProcess(command, status, "========= ERROR SUMMARY: 1", "")

    monkeypatch.setattr(sanitizing.shutil, "which", lambda name: name)
    monkeypatch.setattr(sanitizing.subprocess, "run", run)
    return calls


def test_initcheck_is_believed_only_where_pytorch_passes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = sanitizer(monkeypatch, "cuda rows")
    with pytest.raises(AssertionError, match="SUMMARY"):
        sanitizing.run("initcheck", "cuda rows", "cuda")
    assert [call[-1] for call in calls] == ["cuda rows", "reference"]
    assert not any("--kernel-name" in call for call in calls)
    sanitizer(monkeypatch, "cuda rows", "reference")
    with pytest.raises(NotHere, match="initcheck"):
        sanitizing.run("initcheck", "cuda rows", "cuda")
    calls = sanitizer(monkeypatch, "cuda rows", "reference")
    with pytest.raises(AssertionError, match="SUMMARY"):
        sanitizing.run("racecheck", "cuda rows", "cuda")
    assert [call[-1] for call in calls] == ["cuda rows"] and "--kernel-name" in calls[0]


def test_a_tool_that_is_slow_or_breaks_is_no_fault_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    sanitizer(monkeypatch)

    def slow(command: list[str], timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(sanitizing.subprocess, "run", slow)
    with pytest.raises(NotHere, match="longer than 50 s"):
        sanitizing.run("memcheck", "cuda rows", "cuda")
    assert all(unit.limit > sanitizing.SECONDS for unit in sanitizing.plan_units(GPU))

    # initcheck asks twice: of ours, then of plain PyTorch.
    calls = iter([subprocess.CompletedProcess([], sanitizing.FAILED, "", "")])

    def slow_control(command: list[str], timeout: float, **_: Any) -> Any:
        for found in calls:
            return found
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(sanitizing.subprocess, "run", slow_control)
    with pytest.raises(NotHere, match="longer than 50 s"):
        sanitizing.run("initcheck", "cuda rows", "cuda")

    def raises(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(
            command, 1, "", "Traceback ...\nRuntimeError: row kernel"
        )

    monkeypatch.setattr(sanitizing.subprocess, "run", raises)
    with pytest.raises(AssertionError, match="row kernel"):
        sanitizing.run("racecheck", "cuda rows", "cuda")

    def broken(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 139, "", "the tool died")

    monkeypatch.setattr(sanitizing.subprocess, "run", broken)
    with pytest.raises(NotHere, match="ended with 139: the tool died"):
        sanitizing.run("racecheck", "cuda fused", "cuda")


def test_a_phase_that_cannot_start_is_named(tmp_path: Path) -> None:
    data = run_phase("no_such_phase", tmp_path, 60)
    assert data["records"] == [] and "its process fails" in data["not_run"][0]["key"]


def record(phase: str, key: str, status: str = "ok", **figures: Any) -> dict[str, Any]:
    reason = {} if status == "ok" else {"reason": "because"}
    return {"phase": phase, "key": key, "status": status, "unit_seconds": 1.0, **reason, **figures}


def timing(provider: str, ms: float, case: str = "frozen head", **figures: Any) -> dict[str, Any]:
    spread = {"least": ms / 1e3, "most": ms / 1e3}
    return record(
        "loss",
        f"{case}: {provider}",
        provider=provider,
        case=f"{case}, reference on-line",
        tokens=8192,
        hidden=3584,
        vocabulary=152064,
        seconds=ms / 1e3,
        ratio_to_floor=ms / 34,
        floor_seconds=0.034,
        floor_flops_per_second=7.9e14,
        extra_bytes=2**30,
        times={"op": spread},
        errors={"loss": 1e-3, "gradient": 2e-3},
        **figures,
    )


def data_of(*records: dict[str, Any]) -> dict[str, Any]:
    return {"started": "now", "finished": "later", "records": list(records), "not_run": []}


def test_no_speed_is_claimed_on_red_tests() -> None:
    timings = [timing("eager", 80), timing("triton lean", 36), timing("cuda rows", 35)]
    good = record("correctness", "triton lean: bfloat16 flat")
    bad = record("correctness", "cuda rows: bfloat16 flat", "failed")
    assert gpu_check.exit_status(data_of(good, *timings)) == 0
    data = data_of(good, bad, *timings)
    assert gpu_check.exit_status(data) == 1
    assert report.red(data["records"]) == {"cuda rows"}
    text = report.render(data) + report.short(data)
    assert "RED: 1 check failed" in text and "because" in text
    assert "35.000" not in text and "36.000" in text and "best of ours (triton lean)" in text
    for phase, key, names in (
        ("suite", "test_triton_loss.py", {"triton lean"}),
        ("suite", "test_cuda_kernels.py", {"cuda rows", "cuda fused"}),
        ("sanitizer", "racecheck: cuda fused", {"cuda fused"}),
    ):
        assert report.red([record(phase, key, "crashed")]) == names
    crashed = record("loss", "7B T=8192, frozen head: cuda rows", "crashed")
    assert report.red([crashed]) == {"cuda rows"}, "a crash of ours is red, too"
    # What a peer does wrong is not our failure; what was not reached is said.
    assert gpu_check.exit_status(data_of(record("loss", "x: trl chunked", "error"))) == 0
    unfinished = data_of(good) | {"not_run": [{"phase": "suite", "key": "a"}]}
    assert gpu_check.exit_status(unfinished) == gpu_check.UNFINISHED


def test_targets_and_the_table_of_winners() -> None:
    records = [
        timing("eager", 80),
        timing("trl chunked", 51),
        timing("triton lean", 36),
        timing("cuda rows", 35),
        timing("triton lean", 50, "trained head"),
        timing("cuda rows", 49, "trained head"),
    ]
    rows = {what: (wanted, measured) for what, wanted, measured in report.requirements(records)}
    assert rows["7B, T = 8192, frozen head, best of ours (cuda rows): x floor"][1] == "1.029"
    assert rows["7B, T = 8192, frozen head, best of ours (cuda rows) v trl chunked"][1] == "1.46 x"
    (line,) = report.winners(records)
    assert line.startswith('(152064, 3584): Measured("rows", ')
    records[-1] = timing("cuda rows", 51, "trained head")
    assert report.winners(records) == [], "it must win in every case"
    assert report.winners([r for r in records if r["provider"] != "triton lean"]) == []
    wrong = timing("triton lean", 30) | {"errors": {"loss": 1e-3, "gradient": 0.1}}
    assert report.within_rule(wrong, records) is False and report.within_rule(records[2], records)
    assert report.red([*records, wrong]) == {"triton lean"}, "an error beyond the rule is red, too"
    assert gpu_check.exit_status(data_of(*records, wrong)) == 1

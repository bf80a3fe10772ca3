"""`make gpu-check` without a GPU: the same code on a CPU with tiny shapes, and units that fail,
crash, hang or break their process."""

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
from tests.bench.records import GPU, make_record, make_timing

pytestmark = pytest.mark.complete

ROOT = Path(__file__).resolve().parents[2]
MISBEHAVING = """
import os, time
from bench.gpu.units import NotHere, Unit

def throw(error):
    raise error

def list_units(setting):
    return [
        Unit("fine", lambda: {"figure": 1.5}),
        Unit("wrong", lambda: throw(AssertionError("3 > 2"))),
        Unit("absent", lambda: throw(NotHere("not available"))),
        Unit("crash", lambda: os._exit(7)),
        Unit("killed", lambda: os.kill(os.getpid(), 9)),
        Unit("hang", lambda: time.sleep(60), limit=0.5),
        Unit("broken", lambda: throw(RuntimeError("CUDA error: illegal memory access"))),
        Unit("pid", lambda: {"pid": os.getpid()}),
        Unit("last", lambda: {"pid": os.getpid()}),
    ]
"""


def run_check(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu_check", "--out", str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_phase_on_the_cpu(tmp_path: Path) -> None:
    done = run_check(tmp_path, "--device", "cpu", "--quick", "--minutes", "15")
    data = json.loads((tmp_path / "results.json").read_text())
    bad = [record for record in data["records"] if record["status"] in report.BAD]
    assert (done.returncode, bad, data["not_run"]) == (0, [], []), done.stderr
    phases = {record["phase"] for record in data["records"]}
    # Attention checks count as correctness.
    assert phases == {*gpu_check.PHASES, "products", "profile", "imports"} - {"attention"}
    assert any(record.get("step") == "attention" for record in data["records"])
    timed = [r for r in data["records"] if r["phase"] == "loss" and r["status"] == "ok"]
    assert {"eager"} < {r["provider"] for r in timed}
    assert all(r["seconds"] > 0 and r["floor_seconds"] > 0 for r in timed)
    text = (tmp_path / "report.md").read_text()
    for words in ("## Machine", "## Checks", "## Ceilings", "## Loss op", "none failed"):
        assert words in text
    assert "none failed" in done.stdout and "x floor" in done.stdout
    # Resuming repeats no unit.
    before = len(data["records"])
    again = run_check(tmp_path, "--device", "cpu", "--quick", "--resume", "--only", "ceilings")
    after = json.loads((tmp_path / "results.json").read_text())["records"]
    assert (again.returncode, len(after)) == (0, before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported(tmp_path: Path) -> None:
    done = run_check(tmp_path)
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


def test_a_failing_unit_does_not_affect_others(tmp_path: Path, misbehaving: str) -> None:
    data = run_phase(misbehaving, tmp_path, 60)
    found = {record["key"]: record for record in data["records"]}
    assert [(key, record["status"]) for key, record in found.items()] == [
        ("fine", "ok"),
        ("wrong", "failed"),
        ("absent", "skipped"),
        ("crash", "crashed"),
        ("killed", "crashed"),
        ("hang", "timeout"),
        ("broken", "error"),
        ("pid", "ok"),
        ("last", "ok"),
    ]
    assert found["fine"]["figure"] == 1.5 and found["wrong"]["reason"] == "3 > 2"
    assert "7" in found["crash"]["reason"] and "-9" in found["killed"]["reason"]
    assert found["pid"]["pid"] == found["last"]["pid"], "a working process is kept"
    assert data["not_run"] == []
    assert "Traceback" in (tmp_path / "misbehaving.log").read_text()


def test_the_time_limit_holds_and_unreached_units_are_listed(
    tmp_path: Path, misbehaving: str
) -> None:
    begun = time.monotonic()
    data = run_phase(misbehaving, tmp_path, -1)
    assert data["records"] == [] and len(data["not_run"]) == 1
    path = tmp_path / "path" / "bench" / "gpu" / "misbehaving.py"
    path.write_text(MISBEHAVING.replace("limit=0.5", "limit=600"))
    data = run_phase(misbehaving, tmp_path, 6)
    assert time.monotonic() - begun < 20
    assert [entry["key"] for entry in data["not_run"]] == ["hang", "broken", "pid", "last"]
    assert "Not reached in the time" in (tmp_path / "report.md").read_text()
    path.write_text(MISBEHAVING)
    data = run_phase(misbehaving, tmp_path, 60, resume=True)
    keys = [record["key"] for record in data["records"]]
    assert len(keys) == 9 == len(set(keys)) and data["not_run"] == []


HANGING = """
import time
from bench.gpu.units import Unit

def list_units(setting):
    hang = Unit("a: hang", lambda: time.sleep(60), limit=0.5, variant="a")
    return [hang, Unit("a: later", lambda: {}, variant="a"), Unit("b: other", lambda: {})]
"""


def test_a_variant_that_hangs_is_skipped_afterwards(tmp_path: Path, misbehaving: str) -> None:
    path = tmp_path / "path" / "bench" / "gpu" / "misbehaving.py"
    path.write_text(HANGING)
    data = run_phase(misbehaving, tmp_path, 60)
    found = [(record["key"], record["status"]) for record in data["records"]]
    assert found == [("a: hang", "timeout"), ("b: other", "ok")]
    assert [entry["key"] for entry in data["not_run"]] == ["a: later"]
    assert data["hung"] == ["a"] and "skipped afterwards: a" in report.summarise(data)


def test_a_device_error_is_assigned_to_the_unit_that_caused_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def synchronize() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    def launch() -> dict[str, Any]:
        raise RuntimeError("row kernel: an illegal memory access was encountered")

    unit, failing = Unit("a", lambda: {"figure": 1}), Unit("b", launch)
    assert worker.run_unit(unit) == ("ok", {"figure": 1}, False)
    assert worker.run_unit(failing)[::2] == ("error", False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert worker.run_unit(unit)[::2] == ("error", True)
    assert worker.run_unit(failing)[::2] == ("error", True)


def replace_sanitizer(monkeypatch: pytest.MonkeyPatch, *failing: str) -> list[list[str]]:
    """Replace compute-sanitizer by one that fails for the variants `failing`; returns its calls."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        status = sanitizing.FAILED if command[-1] in failing else 0
        return subprocess.CompletedProcess(command, status, "========= ERROR SUMMARY: 1", "")

    monkeypatch.setattr(sanitizing.shutil, "which", lambda name: name)
    monkeypatch.setattr(sanitizing.subprocess, "run", run)
    return calls


def test_initcheck_counts_only_if_pytorch_passes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = replace_sanitizer(monkeypatch, "cuda rows")
    with pytest.raises(AssertionError, match="SUMMARY"):
        sanitizing.run("initcheck", "cuda rows", "cuda")
    assert [call[-1] for call in calls] == ["cuda rows", "reference"]
    assert not any("--kernel-name" in call for call in calls)
    replace_sanitizer(monkeypatch, "cuda rows", "reference")
    with pytest.raises(NotHere, match="initcheck"):
        sanitizing.run("initcheck", "cuda rows", "cuda")
    calls = replace_sanitizer(monkeypatch, "cuda rows", "reference")
    with pytest.raises(AssertionError, match="SUMMARY"):
        sanitizing.run("racecheck", "cuda rows", "cuda")
    assert [call[-1] for call in calls] == ["cuda rows"] and "--kernel-name" in calls[0]


def test_a_slow_or_broken_tool_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_sanitizer(monkeypatch)

    def time_out(command: list[str], timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(sanitizing.subprocess, "run", time_out)
    with pytest.raises(NotHere, match="longer than 50 s"):
        sanitizing.run("memcheck", "cuda rows", "cuda")
    assert all(unit.limit > sanitizing.SECONDS for unit in sanitizing.list_plan_units(GPU))

    # initcheck runs twice: with our kernels, then with plain PyTorch.
    calls = iter([subprocess.CompletedProcess([], sanitizing.FAILED, "", "")])

    def time_out_second(command: list[str], timeout: float, **_: Any) -> Any:
        for found in calls:
            return found
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(sanitizing.subprocess, "run", time_out_second)
    with pytest.raises(NotHere, match="longer than 50 s"):
        sanitizing.run("initcheck", "cuda rows", "cuda")

    def raise_error(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(
            command, 1, "", "Traceback ...\nRuntimeError: row kernel"
        )

    monkeypatch.setattr(sanitizing.subprocess, "run", raise_error)
    with pytest.raises(AssertionError, match="row kernel"):
        sanitizing.run("racecheck", "cuda rows", "cuda")

    def break_tool(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 139, "", "the tool died")

    monkeypatch.setattr(sanitizing.subprocess, "run", break_tool)
    with pytest.raises(NotHere, match="ended with 139: the tool died"):
        sanitizing.run("racecheck", "cuda fused", "cuda")


def test_a_phase_that_cannot_start_is_listed(tmp_path: Path) -> None:
    data = run_phase("no_such_phase", tmp_path, 60)
    assert data["records"] == [] and "its process fails" in data["not_run"][0]["key"]


def make_data(*records: dict[str, Any]) -> dict[str, Any]:
    return {"started": "now", "finished": "later", "records": list(records), "not_run": []}


def test_red_variants_have_no_times() -> None:
    timings = [
        make_timing("eager", 80),
        make_timing("triton lean", 36),
        make_timing("cuda rows", 35),
    ]
    good = make_record("correctness", "triton lean: bfloat16 flat")
    bad = make_record("correctness", "cuda rows: bfloat16 flat", "failed")
    assert gpu_check.get_exit_status(make_data(good, *timings)) == 0
    data = make_data(good, bad, *timings)
    assert gpu_check.get_exit_status(data) == 1
    assert report.find_red(data["records"]) == {"cuda rows"}
    text = report.render(data) + report.make_summary(data)
    assert "RED: 1 check failed" in text and "because" in text
    assert "35.000" not in text and "36.000" in text and "best of ours (triton lean)" in text
    for phase, key, names in (
        ("suite", "test_triton_loss.py", {"triton lean"}),
        ("suite", "test_cuda_kernels.py", {"cuda rows", "cuda fused"}),
        ("sanitizer", "racecheck: cuda fused", {"cuda fused"}),
    ):
        assert report.find_red([make_record(phase, key, "crashed")]) == names
    crashed = make_record("loss", "7B T=8192, frozen head: cuda rows", "crashed")
    assert report.find_red([crashed]) == {"cuda rows"}, "a crash of our variant is red"
    # A peer's error is not a failure; unreached checks change the exit status.
    assert gpu_check.get_exit_status(make_data(make_record("loss", "x: trl chunked", "error"))) == 0
    unfinished = make_data(good) | {"not_run": [{"phase": "suite", "key": "a"}]}
    assert gpu_check.get_exit_status(unfinished) == gpu_check.UNFINISHED


def test_targets_and_winners() -> None:
    records = [
        make_timing("eager", 80),
        make_timing("trl chunked", 51),
        make_timing("triton lean", 36),
        make_timing("cuda rows", 35),
        make_timing("triton lean", 50, "trained head"),
        make_timing("cuda rows", 49, "trained head"),
    ]
    rows = {what: (wanted, measured) for what, wanted, measured in report.list_targets(records)}
    assert rows["7B, T = 8192, frozen head, best of ours (cuda rows): x floor"][1] == "1.029"
    assert rows["7B, T = 8192, frozen head, best of ours (cuda rows) v trl chunked"][1] == "1.46 x"
    (line,) = report.find_winners(records)
    assert line.startswith('(152064, 3584): Measured("rows", ')
    records[-1] = make_timing("cuda rows", 51, "trained head")
    assert report.find_winners(records) == [], "it must be fastest in every case"
    assert report.find_winners([r for r in records if r["provider"] != "triton lean"]) == []
    wrong = make_timing("triton lean", 30) | {"errors": {"loss": 1e-3, "gradient": 0.1}}
    assert report.check_error_rule(wrong, records) is False and report.check_error_rule(
        records[2], records
    )
    assert report.find_red([*records, wrong]) == {"triton lean"}, "a violated error rule is red"
    assert gpu_check.get_exit_status(make_data(*records, wrong)) == 1

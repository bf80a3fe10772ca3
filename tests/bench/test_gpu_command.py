"""The command line of the GPU check: wrong options, folders that hold results, interruptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_check
from bench.gpu import environment, plans, report, run

pytestmark = pytest.mark.complete
QUICK = ("--device", "cpu", "--quick")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as status:
        gpu_check.main(list(arguments))
    assert status.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_wrong_options_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", str(tmp_path / "out"))
    (tmp_path / "file").touch()
    file = str(tmp_path / "file")
    assert "used with --plan" in refused(capsys, *out, "--plan", "first", "--minutes", "3")
    assert "--seconds needs a --plan" in refused(capsys, *out, "--seconds", "300")
    assert "at least 60" in refused(capsys, *out, "--plan", "first", "--seconds", "10")
    assert "--minutes must be above 0, got -1" in refused(capsys, *out, *QUICK, "--minutes", "-1")
    assert f"--out {file}: File exists" in refused(capsys, "--out", file, *QUICK)
    assert "add --quick" in refused(capsys, *out, "--device", "cpu")


def test_limits_of_a_plan_are_scaled_to_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(gpu_check, "device_answers", lambda *_: True)
    monkeypatch.setattr(
        gpu_check.plans, "run", lambda plan, session, *_: seen.append(session.setting.patience)
    )
    for seconds in ("165", "660"):
        gpu_check.main(["--out", str(tmp_path), "--plan", "second", "--seconds", seconds])
    assert seen == [0.5, 2.0]


def test_a_second_run_overwrites_no_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        run.Results(tmp_path).add(
            {"phase": "p", "key": str(number), "status": "ok", "unit_seconds": 0}
        )
    found = {
        path.name: json.loads(path.read_text())["records"][0]["key"]
        for path in tmp_path.glob("results*.json")
    }
    assert found == {"results-1.json": "0", "results-2.json": "1", "results.json": "2"}
    assert (tmp_path / "report-2.md").exists() and "results-2.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ("nonsense", "cannot be read"),
        ("[]", "cannot be read"),
        (json.dumps({"records": [], "plan": "first"}), "is of --plan first"),
        (None, "of other sources"),
    ],
)
def test_what_does_not_go_on_is_refused(
    tmp_path: Path, held: str | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = {"phase": "environment", "key": "machine", "status": "ok", "source_hash": "other"}
    text = json.dumps({"records": [machine]}) if held is None else held
    (tmp_path / "results.json").write_text(text)
    assert words in refused(capsys, "--out", str(tmp_path), *QUICK, "--resume")
    assert (tmp_path / "results.json").read_text() == text


def test_a_run_of_these_sources_goes_on(tmp_path: Path) -> None:
    hashed = environment.source_hash()
    machine = {"phase": "environment", "key": "machine", "status": "ok", "source_hash": hashed}
    (tmp_path / "results.json").write_text(json.dumps({"records": [machine], "started": "then"}))
    assert run.Results(tmp_path, resume=True).records == [machine]


def test_a_missing_kit_is_said_first_and_an_interruption_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(plan: Any, session: run.Session, *_: Any) -> None:
        session.results.add({"phase": "p", "key": "k", "status": "ok", "unit_seconds": 0.0})
        raise KeyboardInterrupt

    monkeypatch.setattr(plans, "run", interrupted)
    kit = str(tmp_path / "no-kit")
    out = tmp_path / "out"
    status = gpu_check.main(["--plan", "first", "--out", str(out), "--kit", kit, *QUICK])
    told = capsys.readouterr()
    assert status == gpu_check.INTERRUPTED == 130
    assert told.out.startswith(f"No kit at {kit}") and "copy it explicitly" in told.out
    assert "interrupted; " in told.err and "Traceback" not in told.err
    data = json.loads((out / "results.json").read_text())
    assert data["quick"] is True and [r["key"] for r in data["records"]] == ["k"]


def test_each_row_of_the_report_has_its_own_floor() -> None:
    def timing(provider: str, floor: float) -> dict[str, Any]:
        return {
            "phase": "loss", "key": provider, "status": "ok", "provider": provider,
            "case": "frozen head, reference on-line", "tokens": 8192, "hidden": 3584,
            "vocabulary": 152064, "seconds": 0.04, "floor_seconds": floor,
            "ratio_to_floor": 0.04 / floor, "floor_flops_per_second": 1.0,
            "times": {"op": {"least": 0.04, "most": 0.04}}, "errors": {},
        }  # fmt: skip

    text = "\n".join(report.loss_part([timing("eager", 0.032), timing("triton lean", 0.05)]))
    assert "| 32.000 | 1.250 |" in text and "| 50.000 | 0.800 |" in text

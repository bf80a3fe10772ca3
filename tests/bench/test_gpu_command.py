"""The GPU check's command line: wrong options, folders with earlier results, interruptions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_check
from bench.gpu import environment, plans, report, run
from tests.bench.records import make_machine, make_record, make_timing

pytestmark = pytest.mark.complete
QUICK = ("--device", "cpu", "--quick")
ROOT = Path(__file__).resolve().parents[2]


def read_refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as status:
        gpu_check.main(list(arguments))
    assert status.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_the_parent_process_does_not_import_torch() -> None:
    code = "import sys, bench.gpu_check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_wrong_options_give_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", str(tmp_path / "out"))
    (tmp_path / "file").touch()
    file = str(tmp_path / "file")
    assert "used with --plan" in read_refusal(capsys, *out, "--plan", "first", "--minutes", "3")
    assert "--seconds needs a --plan" in read_refusal(capsys, *out, "--seconds", "300")
    assert "at least 60" in read_refusal(capsys, *out, "--plan", "first", "--seconds", "10")
    assert "--minutes must be above 0, got -1" in read_refusal(
        capsys, *out, *QUICK, "--minutes", "-1"
    )
    assert f"--out {file}: File exists" in read_refusal(capsys, "--out", file, *QUICK)
    assert "add --quick" in read_refusal(capsys, *out, "--device", "cpu")


def test_plan_limits_scale_with_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(gpu_check, "probe_device", lambda *_: True)
    monkeypatch.setattr(
        gpu_check.plans, "run", lambda plan, session, *_: seen.append(session.setting.patience)
    )
    for seconds in ("165", "660"):
        gpu_check.main(["--out", str(tmp_path), "--plan", "second", "--seconds", seconds])
    assert seen == [0.5, 2.0]


def test_a_second_run_keeps_earlier_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        run.Results(tmp_path).add(make_record("p", str(number)))
    found = {
        path.name: json.loads(path.read_text())["records"][0]["key"]
        for path in tmp_path.glob("results*.json")
    }
    assert found == {"results-1.json": "0", "results-2.json": "1", "results.json": "2"}
    assert (tmp_path / "report-2.md").exists() and "results-2.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "cannot be read"),
        ("[]", "cannot be read"),
        (json.dumps({"records": [], "plan": "first"}), "is of --plan first"),
        (None, "of other sources"),
    ],
)
def test_results_that_cannot_be_resumed_are_refused(
    tmp_path: Path, text: str | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = text or json.dumps({"records": [make_machine(sources="other")]})
    (tmp_path / "results.json").write_text(text)
    assert words in read_refusal(capsys, "--out", str(tmp_path), *QUICK, "--resume")
    assert (tmp_path / "results.json").read_text() == text


def test_results_of_the_same_sources_are_resumed(tmp_path: Path) -> None:
    machine = make_machine(sources=environment.hash_sources())
    (tmp_path / "results.json").write_text(json.dumps({"records": [machine], "started": "then"}))
    assert run.Results(tmp_path, resume=True).records == [machine]


def test_a_missing_kit_is_reported_and_an_interruption_keeps_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(plan: Any, session: run.Session, *_: Any) -> None:
        session.results.add(make_record("p", "k"))
        raise KeyboardInterrupt

    monkeypatch.setattr(plans, "run", interrupt)
    kit = str(tmp_path / "no-kit")
    out = tmp_path / "out"
    status = gpu_check.main(["--plan", "first", "--out", str(out), "--kit", kit, *QUICK])
    output = capsys.readouterr()
    assert status == gpu_check.INTERRUPTED == 130
    assert output.out.startswith(f"No kit at {kit}") and "copy it explicitly" in output.out
    assert "interrupted; " in output.err and "Traceback" not in output.err
    data = json.loads((out / "results.json").read_text())
    assert data["quick"] is True and [r["key"] for r in data["records"]] == ["k"]


def test_each_row_of_the_report_has_its_own_floor() -> None:
    rows = [
        make_timing(name, 40, floor_seconds=floor, ratio_to_floor=0.04 / floor)
        for name, floor in (("eager", 0.032), ("triton lean", 0.05))
    ]
    text = "\n".join(report.make_loss_part(rows))
    assert "| 32.000 | 1.250 |" in text and "| 50.000 | 0.800 |" in text

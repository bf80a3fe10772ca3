"""Publishing of a GPU check: results made up here, into copies of the pages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_publish
from bench.gpu import publish, report
from bench.gpu.cases import CLASSES
from bench.gpu.predictions import Span

pytestmark = pytest.mark.complete
ROOT = Path(__file__).resolve().parents[2]
H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
PAGES = ("docs/gpu.md", "docs/performance.md")


def record(phase: str, key: str, status: str = "ok", **figures: Any) -> dict[str, Any]:
    reason = {} if status == "ok" else {"reason": "because of /home/someone/tree/kernel.log"}
    return {"phase": phase, "key": key, "status": status, "unit_seconds": 1.0, **reason, **figures}


def machine(device: str = H100, sources: str = "aaaa", **figures: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "device": device,
        "capability": "9.0",
        "executable": "/home/someone/venv/bin/python",
        "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        "commit": None,
        "changed_files": 0,
        "source_hash": sources,
    }
    return record("environment", "machine", **{**fields, **figures})


def timing(provider: str, ms: float, T: int = 8192, **figures: Any) -> dict[str, Any]:
    case = "frozen head, reference on-line"
    fields: dict[str, Any] = {
        "provider": provider,
        "model": "7B",
        "case": case,
        "tokens": T,
        "hidden": 3584,
        "vocabulary": 152064,
        "seconds": ms / 1e3,
        "ratio_to_floor": ms / 34,
        "floor_seconds": 0.034,
        "floor_flops_per_second": 7.9e14,
        "extra_bytes": 2**30,
        "times": {"op": {"least": ms / 1e3, "most": ms / 1e3}},
        "errors": {"loss": 1e-3, "gradient": 2e-3},
    }
    return record("loss", f"7B T={T}, {case}: {provider}", **{**fields, **figures})


def step(kind: str, rate: float) -> dict[str, Any]:
    figures = {"pairs_per_second": rate, "seconds": 1 / rate, "mfu": 0.4, "loss": 0.6931}
    memory = {"peak_memory_bytes": 60 * 2**30}
    extra = {"pairs": 32, "dtype": "bfloat16", "attention": "gathered", "device": H100}
    return record("steps", f"7B: {kind}", size="7B", steps={kind: figures | memory}, **extra)


def run(*records: dict[str, Any], day: int = 27, plan: str = "first", **more: Any) -> Any:
    data = {"started": f"2026-11-{day}T10:00:00+00:00", "finished": "later", "plan": plan}
    return {**data, "records": list(records), "not_run": [], "hung": [], **more}


FIRST = (
    machine(),
    record("ceilings", "copy", bytes_per_second=3.0e12),
    record("correctness", "triton lean: smoke"),
    timing("triton lean", 36.6),
    timing("eager", 80.0),
    timing("cut-cross-entropy", 60.0),
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tree with copies of the pages and no record."""
    for name in PAGES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    assert gpu_publish.main([], tmp_path) == 0
    return tmp_path


def publishing(root: Path, *runs: Any, force: bool = False) -> int:
    files = []
    for number, data in enumerate(runs):
        files.append(root / f"results{number}.json")
        files[-1].write_text(json.dumps(data))
    return gpu_publish.main([*map(str, files), *(["--force"] if force else [])], root)


def block(root: Path, page: int) -> str:
    text = (root / PAGES[page]).read_text()
    name = ("checks", "figures")[page]
    return text.split(f"gpu-report: {name} begin -->")[1].split("<!-- gpu-report:")[0].strip()


def test_the_pages_here_hold_what_the_records_here_say() -> None:
    for path, text in gpu_publish.pages(ROOT).items():
        assert path.read_text() == text, f"{path.name}: run make gpu-publish"


def test_before_anything_was_measured_the_blocks_say_so(root: Path) -> None:
    assert [block(root, page) for page in (0, 1)] == [publish.NOTHING] * 2


def test_a_run_becomes_a_record_and_two_blocks(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (root / PAGES[0]).read_text()
    assert publishing(root, run(*FIRST, step("ours", 8.0))) == 0
    path = root / "bench/results/gpu-h100-2026-11-27.json"
    text = path.read_text()
    assert "someone" not in text and "executable" not in text and "unit_seconds" not in text
    assert len(json.loads(text)["records"]) == 7
    checks, figures = block(root, 0), block(root, 1)
    for words in (H100, "torch 2.11.0", "--plan first", path.name, "3000 GB/s", "1 check passed"):
        assert words in checks
    assert "| 7B, T = 8192, frozen head, best of ours (triton lean): x floor | <= 1.1 |" in checks
    assert "| triton lean | 36.60 | 34.00 | 1.076 | 1024 | 1.0e-03 | 2.0e-03 | `python" in figures
    assert "| 7B | ours | gathered | 8 | 0.125 | 40.0% | 60.0 | `python" in figures
    rows = [
        line for line in figures.splitlines() if line.startswith(("| 7B", "| triton", "| eager"))
    ]
    assert len(rows) == 3
    assert all(row.endswith("| `python -m bench.gpu_check --plan first` |") for row in rows)
    titles = [line for line in figures.splitlines() if line.startswith("**")]
    assert len(titles) == 2 and all(title.endswith(f"{H100}:") for title in titles)
    head, tail = before.split(publish.NOTHING)
    after = (root / PAGES[0]).read_text()
    assert after.startswith(head) and after.endswith(tail), "nothing else of a page changes"
    assert "Entries for MEASURED" in capsys.readouterr().out


def test_variants_of_a_step_are_rows_and_their_time_is_shown_by_class(root: Path) -> None:
    classes = dict.fromkeys(CLASSES, 0.0) | {"products": 0.06, "attention": 0.02, "ours": 0.02}
    profile = record(
        "profile", "profile of the step of 7B: ours, compiled", provider="ours, compiled",
        model="7B", seconds=0.1, wall_seconds=0.125, classes=classes,
        kernels=[{"name": "nvjet_tst", "calls": 1, "seconds": 0.06}],
    )  # fmt: skip
    flex = record("correctness", "attention flex: against float32", "failed")
    steps = [step(name, rate) for name, rate in (("ours", 7.0), ("ours, compiled", 8.0))]
    assert publishing(root, run(*FIRST, *steps, step("ours, flex", 9.0), flex, profile)) == 0
    figures = block(root, 1)
    rows = [line for line in figures.splitlines() if line.startswith("| 7B | ours")]
    assert [row.split(" | ")[1] for row in rows] == ["ours", "ours, compiled"], "flex is wrong"
    shares = "48.0% | 16.0% | 0.0% | 0.0% | 0.0% | 16.0% | 0.0% | 20.0% |"
    assert f"| 7B: ours, compiled | 0.125 | 0.100 | {shares}" in figures
    assert "best of ours (ours, compiled): MFU | >= 45 % | 40%" in block(root, 0)


def test_publishing_again_gives_the_same_files(root: Path) -> None:
    def files() -> dict[str, str]:
        found = [*(root / "docs").iterdir(), *(root / "bench/results").iterdir()]
        return {path.name: path.read_text() for path in found}

    assert publishing(root, run(*FIRST)) == 0
    first = files()
    assert publishing(root, run(*FIRST)) == 0 and files() == first
    assert gpu_publish.main([], root) == 0 and files() == first


def test_measured_is_held_against_predicted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = {
        "triton lean": Span(30.0, 35.0),
        "cuda rows": Span(35.0, 40.0),
        "cuda fused": Span(50.0, 60.0),
    }

    def predicted(device: str, provider: str, case: str, model: str) -> Any:
        assert (device, model) == (H100, "7B")
        return spans.get(provider)

    monkeypatch.setattr(report, "predicted", predicted)
    ours = [timing("cuda rows", 37), timing("cuda fused", 41), timing("triton lean", 20, T=1024)]
    assert publishing(root, run(*FIRST, *ours)) == 0
    rows = [line.split(" | ")[1:] for line in block(root, 0).splitlines() if "8192, frozen" in line]
    assert [row for row in rows if len(row) == 4] == [
        ["triton lean", "30 to 35", "36.60", "slower |"],
        ["cuda rows", "35 to 40", "37.00", "as predicted |"],
        ["cuda fused", "50 to 60", "41.00", "faster |"],
    ]


def test_two_runs_are_one_record_and_the_later_one_wins(root: Path) -> None:
    second = run(
        machine(commit="cccc"),
        timing("triton lean", 35.5),
        record("loss", FIRST[-1]["key"], "skipped"),
        step("trl", 2.0),
        day=28,
        plan="second",
    )
    assert publishing(root, second, run(*FIRST)) == 0
    assert [p.name for p in (root / "bench/results").iterdir()] == ["gpu-h100-2026-11-27.json"]
    figures = block(root, 1)
    assert "35.50" in figures and "36.60" not in figures
    assert "| cut-cross-entropy | 60.00" in figures, "what was skipped replaces nothing"
    for start, plan in (("| triton", "second"), ("| eager", "first"), ("| 7B | trl", "second")):
        (row,) = (line for line in figures.splitlines() if line.startswith(start))
        assert row.endswith(f"--plan {plan}` |")


def test_what_failed_once_stays_failed(root: Path) -> None:
    failed = record("correctness", "triton lean: smoke", "failed")
    good = record("correctness", "triton lean: smoke")
    assert publishing(root, run(*FIRST, failed), run(machine(), good, day=28)) == 0
    assert "RED: 1 check failed" in block(root, 0)
    assert "triton lean |" not in block(root, 1), "no speed on red tests"
    assert "failed: triton lean: smoke: because of kernel.log" in block(root, 0)
    assert "| eager | 80.00" in block(root, 1)


def test_missing_phases_and_unfinished_runs_are_said(root: Path) -> None:
    data = run(machine(), plan="", not_run=[{"phase": "suite", "key": "test_a.py"}])
    del data["finished"]
    assert publishing(root, data) == 0
    assert "not reached: 1 of suite" in block(root, 0)
    assert "the run is not finished" in block(root, 0) and "`make gpu-check`" in block(root, 0)
    assert "Nothing that passed its checks was timed" in block(root, 1)
    # What the other run reached is not missing.
    reached = run(*FIRST, record("suite", "test_a.py"), day=28)
    assert publishing(root, data, reached) == 0
    assert "not reached" not in block(root, 0) and "not finished" in block(root, 0)


def test_what_does_not_belong_together_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (root / PAGES[0]).read_text()
    cpu = machine("AMD EPYC")
    del cpu["capability"]
    for runs, words in (
        ((run(*FIRST), run(machine(H200), day=28)), "runs on different cards"),
        ((run(*FIRST), run(machine(sources="bbbb"), day=28)), "different sources"),
        ((run(cpu),), "was not on a GPU"),
        ((run(timing("eager", 80)),), "does not name its machine"),
        (({"records": []},), "not a complete results.json"),
    ):
        assert publishing(root, *runs) == 2
        assert words in capsys.readouterr().err
    assert (root / PAGES[0]).read_text() == before
    assert not list((root / "bench/results").iterdir())
    runs = run(*FIRST), run(machine(sources="bbbb"), day=28)
    assert publishing(root, *runs, force=True) == 0
    assert "different sources: aaaa, bbbb" in block(root, 0)
    assert publishing(root, run(*FIRST), run(machine(H200)), force=True) == 2


def test_figures_of_one_card_do_not_replace_those_of_another(root: Path) -> None:
    assert publishing(root, run(*FIRST)) == 0
    assert publishing(root, run(machine(H200), timing("triton lean", 35.1), day=28)) == 0
    later = [machine(), *FIRST[1:3], timing("triton lean", 36.2), *FIRST[4:]]
    assert publishing(root, run(*later, day=29)) == 0
    figures = block(root, 1)
    assert figures.index(f"### {H100}") < figures.index(f"### {H200}")
    assert "36.20" in figures and "35.10" in figures and "36.60" not in figures


def test_figures_do_not_vanish_unasked(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publishing(root, run(*FIRST)) == 0
    before = {path: path.read_text() for path in root.rglob("*.*") if "results0" not in path.name}
    second = run(machine(), step("ours", 3.0), day=28, plan="second")
    assert publishing(root, second) == 2
    assert "gpu-h100-2026-11-27.json has 4 figures" in capsys.readouterr().err
    after = {path: path.read_text() for path in root.rglob("*.*") if "results0" not in path.name}
    assert after == before
    assert publishing(root, run(*FIRST), second) == 0 and "36.60" in block(root, 1)
    assert publishing(root, second, force=True) == 0 and "36.60" not in block(root, 1)


def test_tiny_shapes_are_not_published(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publishing(root, run(*FIRST, quick=True), force=True) == 2
    assert "tiny shapes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damaged", [{"records": 3}, {"records": [{"phase": "environment", "status": "ok", "key": ""}]}]
)
def test_damaged_results_leave_everything_as_it_was(
    root: Path, damaged: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert publishing(root, run() | damaged) == 2
    assert "not a complete results.json" in capsys.readouterr().err
    assert not list((root / "bench" / "results").iterdir())


def test_a_commit_is_a_hash(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_publish.main(["--commit", "hello"], root)
    assert "hexadecimal digits, got 'hello'" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["begin", "end", "order"])
def test_a_page_without_its_block_is_refused_and_nothing_written(
    root: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = root / PAGES[1]
    marks = [f"<!-- gpu-report: figures {which} -->" for which in ("begin", "end")]
    text = page.read_text()
    if damage == "order":
        text = text.replace(marks[0], "x").replace(marks[1], marks[0]).replace("x", marks[1])
    else:
        text = text.replace(marks[damage == "end"], "")
    page.write_text(text)
    assert publishing(root, run(*FIRST)) == 2
    message = capsys.readouterr().err
    assert PAGES[1] in message and marks[0] in message and marks[1] in message
    assert not list((root / "bench/results").iterdir())
    assert block(root, 0) == publish.NOTHING


def test_entries_for_the_table_of_defaults_are_printed(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = run(*FIRST, timing("cuda rows", 35.0))
    assert report.winners(data["records"])
    assert publishing(root, data) == 0
    assert '(152064, 3584): Measured("rows", "NVIDIA H100' in capsys.readouterr().out


def test_the_commit_of_the_copied_tree_can_be_told() -> None:
    def line(commit: str | None) -> str:
        return publish.origin(
            "x.json", publish.merged([run(machine(commit=commit))], commit="c0de")
        )

    assert "commit c0de, source hash aaaa" in line(None)
    assert "commit beef, source hash aaaa" in line("beef"), "what the machine knows comes first"


def test_names_of_cards() -> None:
    names = {H100: "h100", H200: "h200", "NVIDIA A100-SXM4-80GB": "a100-sxm4-80gb"}
    for device, name in names.items():
        assert publish.card({"records": [machine(device)]}) == name

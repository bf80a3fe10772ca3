"""Publishing of GPU checks: invented results, copies of the pages."""

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
from tests.bench.records import H100, make_machine, make_record, make_timing

pytestmark = pytest.mark.complete
ROOT = Path(__file__).resolve().parents[2]
H200 = "NVIDIA H200"
PAGES = ("docs/gpu.md", "docs/performance.md")


def make_step(kind: str, rate: float) -> dict[str, Any]:
    figures = {"pairs_per_second": rate, "seconds": 1 / rate, "mfu": 0.4, "loss": 0.6931}
    memory = {"peak_memory_bytes": 60 * 2**30}
    extra = {"pairs": 32, "dtype": "bfloat16", "attention": "gathered", "device": H100}
    return make_record("steps", f"7B: {kind}", size="7B", steps={kind: figures | memory}, **extra)


def make_run(*records: dict[str, Any], day: int = 27, plan: str = "first", **more: Any) -> Any:
    data = {"started": f"2026-11-{day}T10:00:00+00:00", "finished": "later", "plan": plan}
    return {**data, "records": list(records), "not_run": [], "hung": [], **more}


FIRST = (
    make_machine(),
    make_record("ceilings", "copy", bytes_per_second=3.0e12),
    make_record("correctness", "triton lean: smoke"),
    make_timing("triton lean", 36.6),
    make_timing("eager", 80.0),
    make_timing("cut-cross-entropy", 60.0),
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tree with copies of the pages and without records."""
    for name in PAGES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    assert gpu_publish.main([], tmp_path) == 0
    return tmp_path


def publish_runs(root: Path, *runs: Any, force: bool = False) -> int:
    files = []
    for number, data in enumerate(runs):
        files.append(root / f"results{number}.json")
        files[-1].write_text(json.dumps(data))
    return gpu_publish.main([*map(str, files), *(["--force"] if force else [])], root)


def read_block(root: Path, page: int) -> str:
    text = (root / PAGES[page]).read_text()
    name = ("checks", "figures")[page]
    return text.split(f"gpu-report: {name} begin -->")[1].split("<!-- gpu-report:")[0].strip()


def test_the_pages_match_the_records() -> None:
    for path, text in gpu_publish.rebuild_pages(ROOT).items():
        assert path.read_text() == text, f"{path.name}: run make gpu-publish"


def test_blocks_without_records(root: Path) -> None:
    assert [read_block(root, page) for page in (0, 1)] == [publish.NOTHING] * 2


def test_a_run_becomes_a_record_and_two_blocks(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (root / PAGES[0]).read_text()
    assert publish_runs(root, make_run(*FIRST, make_step("ours", 8.0))) == 0
    path = root / "bench/results/gpu-h100-2026-11-27.json"
    text = path.read_text()
    assert "someone" not in text and "executable" not in text and "unit_seconds" not in text
    assert len(json.loads(text)["records"]) == 7
    checks, figures = read_block(root, 0), read_block(root, 1)
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
    assert after.startswith(head) and after.endswith(tail), "the rest of a page does not change"
    assert "Entries for MEASURED" in capsys.readouterr().out


def test_variants_of_a_step_are_rows_and_their_time_is_shown_by_class(root: Path) -> None:
    classes = dict.fromkeys(CLASSES, 0.0) | {"products": 0.06, "attention": 0.02, "ours": 0.02}
    profile = make_record(
        "profile", "profile of the step of 7B: ours, compiled", provider="ours, compiled",
        model="7B", seconds=0.1, wall_seconds=0.125, classes=classes,
        kernels=[{"name": "nvjet_tst", "calls": 1, "seconds": 0.06}],
    )  # fmt: skip
    flex = make_record("correctness", "attention flex: against float32", "failed")
    steps = [make_step(name, rate) for name, rate in (("ours", 7.0), ("ours, compiled", 8.0))]
    assert (
        publish_runs(root, make_run(*FIRST, *steps, make_step("ours, flex", 9.0), flex, profile))
        == 0
    )
    figures = read_block(root, 1)
    rows = [line for line in figures.splitlines() if line.startswith("| 7B | ours")]
    assert [row.split(" | ")[1] for row in rows] == ["ours", "ours, compiled"], "flex is wrong"
    shares = "48.0% | 16.0% | 0.0% | 0.0% | 0.0% | 16.0% | 0.0% | 20.0% |"
    assert f"| 7B: ours, compiled | 0.125 | 0.100 | {shares}" in figures
    assert "best of ours (ours, compiled): MFU | >= 45 % | 40%" in read_block(root, 0)


def test_publishing_again_gives_the_same_files(root: Path) -> None:
    def read_files() -> dict[str, str]:
        found = [*(root / "docs").iterdir(), *(root / "bench/results").iterdir()]
        return {path.name: path.read_text() for path in found}

    assert publish_runs(root, make_run(*FIRST)) == 0
    first = read_files()
    assert publish_runs(root, make_run(*FIRST)) == 0 and read_files() == first
    assert gpu_publish.main([], root) == 0 and read_files() == first


def test_measurements_are_compared_with_predictions(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = {
        "triton lean": Span(30.0, 35.0),
        "cuda rows": Span(35.0, 40.0),
        "cuda fused": Span(50.0, 60.0),
    }

    def predict(device: str, provider: str, case: str, model: str) -> Any:
        assert (device, model) == (H100, "7B")
        return spans.get(provider)

    monkeypatch.setattr(report, "predict", predict)
    ours = [
        make_timing("cuda rows", 37),
        make_timing("cuda fused", 41),
        make_timing("triton lean", 20, T=1024),
    ]
    assert publish_runs(root, make_run(*FIRST, *ours)) == 0
    rows = [
        line.split(" | ")[1:] for line in read_block(root, 0).splitlines() if "8192, frozen" in line
    ]
    assert [row for row in rows if len(row) == 4] == [
        ["triton lean", "30 to 35", "36.60", "slower |"],
        ["cuda rows", "35 to 40", "37.00", "as predicted |"],
        ["cuda fused", "50 to 60", "41.00", "faster |"],
    ]


def test_two_runs_are_merged_and_the_later_one_wins(root: Path) -> None:
    second = make_run(
        make_machine(commit="cccc"),
        make_timing("triton lean", 35.5),
        make_record("loss", FIRST[-1]["key"], "skipped"),
        make_step("trl", 2.0),
        day=28,
        plan="second",
    )
    assert publish_runs(root, second, make_run(*FIRST)) == 0
    assert [p.name for p in (root / "bench/results").iterdir()] == ["gpu-h100-2026-11-27.json"]
    figures = read_block(root, 1)
    assert "35.50" in figures and "36.60" not in figures
    assert "| cut-cross-entropy | 60.00" in figures, "a skipped unit replaces no record"
    for start, plan in (("| triton", "second"), ("| eager", "first"), ("| 7B | trl", "second")):
        (row,) = (line for line in figures.splitlines() if line.startswith(start))
        assert row.endswith(f"--plan {plan}` |")


def test_a_failed_check_stays_failed(root: Path) -> None:
    failed = make_record("correctness", "triton lean: smoke", "failed")
    good = make_record("correctness", "triton lean: smoke")
    assert publish_runs(root, make_run(*FIRST, failed), make_run(make_machine(), good, day=28)) == 0
    assert "RED: 1 check failed" in read_block(root, 0)
    assert "triton lean |" not in read_block(root, 1), "red variants have no times"
    assert "failed: triton lean: smoke: because of kernel.log" in read_block(root, 0)
    assert "| eager | 80.00" in read_block(root, 1)


def test_missing_phases_and_unfinished_runs_are_reported(root: Path) -> None:
    data = make_run(make_machine(), plan="", not_run=[{"phase": "suite", "key": "test_a.py"}])
    del data["finished"]
    assert publish_runs(root, data) == 0
    assert "not reached: 1 of suite" in read_block(root, 0)
    assert "the run is not finished" in read_block(root, 0) and "`make gpu-check`" in read_block(
        root, 0
    )
    assert "Nothing that passed its checks was timed" in read_block(root, 1)
    # The other run reached it.
    reached = make_run(*FIRST, make_record("suite", "test_a.py"), day=28)
    assert publish_runs(root, data, reached) == 0
    assert "not reached" not in read_block(root, 0) and "not finished" in read_block(root, 0)


def test_runs_that_cannot_be_merged_are_refused(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (root / PAGES[0]).read_text()
    cpu = make_machine("AMD EPYC")
    del cpu["capability"]
    for runs, words in (
        ((make_run(*FIRST), make_run(make_machine(H200), day=28)), "runs on different cards"),
        ((make_run(*FIRST), make_run(make_machine(sources="bbbb"), day=28)), "different sources"),
        ((make_run(cpu),), "was not on a GPU"),
        ((make_run(make_timing("eager", 80)),), "does not name its machine"),
        (({"records": []},), "not a complete results.json"),
    ):
        assert publish_runs(root, *runs) == 2
        assert words in capsys.readouterr().err
    assert (root / PAGES[0]).read_text() == before
    assert not list((root / "bench/results").iterdir())
    runs = make_run(*FIRST), make_run(make_machine(sources="bbbb"), day=28)
    assert publish_runs(root, *runs, force=True) == 0
    assert "different sources: aaaa, bbbb" in read_block(root, 0)
    assert publish_runs(root, make_run(*FIRST), make_run(make_machine(H200)), force=True) == 2


def test_figures_of_another_card_are_kept(root: Path) -> None:
    assert publish_runs(root, make_run(*FIRST)) == 0
    assert (
        publish_runs(root, make_run(make_machine(H200), make_timing("triton lean", 35.1), day=28))
        == 0
    )
    later = [make_machine(), *FIRST[1:3], make_timing("triton lean", 36.2), *FIRST[4:]]
    assert publish_runs(root, make_run(*later, day=29)) == 0
    figures = read_block(root, 1)
    assert figures.index(f"### {H100}") < figures.index(f"### {H200}")
    assert "36.20" in figures and "35.10" in figures and "36.60" not in figures


def test_figures_are_removed_only_with_force(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish_runs(root, make_run(*FIRST)) == 0
    before = {path: path.read_text() for path in root.rglob("*.*") if "results0" not in path.name}
    second = make_run(make_machine(), make_step("ours", 3.0), day=28, plan="second")
    assert publish_runs(root, second) == 2
    assert "gpu-h100-2026-11-27.json has 4 figures" in capsys.readouterr().err
    after = {path: path.read_text() for path in root.rglob("*.*") if "results0" not in path.name}
    assert after == before
    assert publish_runs(root, make_run(*FIRST), second) == 0 and "36.60" in read_block(root, 1)
    assert publish_runs(root, second, force=True) == 0 and "36.60" not in read_block(root, 1)


def test_tiny_shapes_are_not_published(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish_runs(root, make_run(*FIRST, quick=True), force=True) == 2
    assert "tiny shapes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damaged", [{"records": 3}, {"records": [{"phase": "environment", "status": "ok", "key": ""}]}]
)
def test_damaged_results_change_nothing(
    root: Path, damaged: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish_runs(root, make_run() | damaged) == 2
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
    assert publish_runs(root, make_run(*FIRST)) == 2
    message = capsys.readouterr().err
    assert PAGES[1] in message and marks[0] in message and marks[1] in message
    assert not list((root / "bench/results").iterdir())
    assert read_block(root, 0) == publish.NOTHING


def test_entries_for_the_table_of_defaults_are_printed(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_run(*FIRST, make_timing("cuda rows", 35.0))
    assert report.find_winners(data["records"])
    assert publish_runs(root, data) == 0
    assert '(152064, 3584): Measured("rows", "NVIDIA H100' in capsys.readouterr().out


def test_the_commit_of_a_copied_tree_can_be_given() -> None:
    def describe(commit: str | None) -> str:
        return publish.describe_origin(
            "x.json", publish.merge([make_run(make_machine(commit=commit))], commit="c0de")
        )

    assert "commit c0de, source hash aaaa" in describe(None)
    assert "commit beef, source hash aaaa" in describe("beef"), "the machine's commit has priority"


def test_names_of_cards() -> None:
    names = {H100: "h100", H200: "h200", "NVIDIA A100-SXM4-80GB": "a100-sxm4-80gb"}
    for device, name in names.items():
        assert publish.name_card({"records": [make_machine(device)]}) == name

"""`python -m cpo_fast.counterfactual`: records, shards, resuming, formats and errors."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cpo_fast.counterfactual.__main__ import main
from cpo_fast.counterfactual.formats import FORMATS
from cpo_fast.types import Counterfactual, Report
from tests.counterfactual.samples import NORMAL, REPORTS, read_jsonl, write_open_i

FIELDS = set(Counterfactual.__dataclass_fields__)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_open_i(tmp_path / "reports", REPORTS)


def run(dataset: Path, output: Path, *more: str) -> int:
    return main(["--dataset", str(dataset), "--output", str(output), *more])


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


def test_records_have_the_documented_fields(dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "cf.jsonl"
    assert run(dataset, output) == 0
    rows = read_jsonl(output)
    assert len(rows) == 2 * len(REPORTS)
    for row in rows:
        assert set(row) == FIELDS - {"rejected_images"}  # only in perception records
        assert row["id"] == f"{row['study_id']}/{row['target']}"
        assert row["checks"] and all(row["checks"].values())
        assert row["target"] in row["counterfactual_labels"]
        assert (row["kind"], row["generator"], row["seed"]) == ("thinking", "graph", 42)
    assert read_lines(output.with_name("cf.jsonl.rejected.jsonl")) == []
    for path, mode in ((output, 0o600), (output.parent, 0o700)):
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_failing_records_are_written_apart_with_a_reason(dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "cf.jsonl"
    assert run(dataset, output, "--targets", "Atelectasis,Emphysema") == 0
    rejected = read_jsonl(tmp_path / "cf.jsonl.rejected.jsonl")
    assert {row["reason"] for row in rejected} == {"target_absent"}
    assert {row["target"] for row in rejected} == {"Atelectasis", "Emphysema"}
    assert not {row["id"] for row in rejected} & {row["id"] for row in read_jsonl(output)}


def test_shards_equal_the_whole_run(dataset: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    run(dataset, whole)
    parts: list[str] = []
    for index in range(3):
        run(dataset, tmp_path / f"{index}.jsonl", "--shard", f"{index}/3")
        parts += read_lines(tmp_path / f"{index}.jsonl")
    assert sorted(parts) == sorted(read_lines(whole))
    assert len(set(parts)) == len(parts)


def test_killed_run_continues_to_the_same_bytes(dataset: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    run(dataset, whole)
    text = whole.read_text()
    for length in (0, 10, len(text) // 3, len(text) // 2, len(text) - 1, len(text)):
        cut.write_text(text[:length])
        assert run(dataset, cut) == 0
        assert cut.read_text() == text
        cut.unlink()


def test_seed_changes_the_output(dataset: Path, tmp_path: Path) -> None:
    run(dataset, tmp_path / "a.jsonl")
    run(dataset, tmp_path / "b.jsonl", "--seed", "7")
    assert read_lines(tmp_path / "a.jsonl") != read_lines(tmp_path / "b.jsonl")


def test_another_process_writes_the_same_bytes(dataset: Path, tmp_path: Path) -> None:
    run(dataset, tmp_path / "here.jsonl")
    there = tmp_path / "there.jsonl"
    command = [sys.executable, "-m", "cpo_fast.counterfactual", "--dataset", str(dataset)]
    done = subprocess.run(
        [*command, "--output", str(there)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={"PYTHONHASHSEED": "77", "PATH": ""},
    )
    assert there.read_bytes() == (tmp_path / "here.jsonl").read_bytes()
    assert "14 of 14 counterfactuals pass" in done.stdout
    assert "clavicle" not in done.stdout + done.stderr


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_has_the_same_texts(form: str, dataset: Path, tmp_path: Path) -> None:
    run(dataset, tmp_path / "cf.jsonl")
    texts = [row["counterfactual"] for row in read_jsonl(tmp_path / "cf.jsonl")]
    output = tmp_path / form
    assert run(dataset, output, "--format", form) == 0
    if form == "ccf":
        items = json.loads(output.read_text())
        found = [text for item in items for text in item["counterfact"].values()]
        assert items[0]["diagnose"] == "The disease of this patient is Fracture."
    else:
        rows = read_jsonl(output)
        key = {"jsonl": "counterfactual", "trl": "rejected", "swift": "rejected_response"}[form]
        found = [row[key][0]["content"] if form == "trl" else row[key] for row in rows]
        if form != "jsonl":
            found = [text.split("<think> ")[1].split(" </think>")[0] for text in found]
    assert found == texts


def test_text_that_a_format_cannot_represent_is_set_aside(tmp_path: Path) -> None:
    tagged = Report(NORMAL.findings + " A stray <image> tag.", NORMAL.impression)
    dataset = write_open_i(tmp_path / "reports", (tagged, NORMAL))
    output = tmp_path / "cf.jsonl"
    assert run(dataset, output, "--format", "swift") == 0
    assert len(read_lines(output)) == 2
    rejected = read_jsonl(tmp_path / "cf.jsonl.rejected.jsonl")
    assert [row["reason"] for row in rejected] == ["image-tag-in-text"] * 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shard", "3/3"], "--shard 3/3"),
        (["--shard", "x"], "--shard x"),
        (["--targets", "Gout"], "target Gout is unknown"),
        (["--graph", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_flags_are_named(
    more: list[str], message: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(dataset, tmp_path / "cf.jsonl", *more) == 2
    assert message in capsys.readouterr().err


def test_missing_data_set_and_foreign_output_are_named(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "nowhere", tmp_path / "cf.jsonl") == 2
    assert "nowhere" in capsys.readouterr().err
    run(dataset, tmp_path / "cf.jsonl")
    assert run(dataset, tmp_path / "cf.jsonl", "--seed", "7") == 2
    assert "another seed" in capsys.readouterr().err
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    assert run(dataset, tmp_path / "other.jsonl") == 2
    assert "other.jsonl, line 1" in capsys.readouterr().err


def test_unknown_flag_has_status_2(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(dataset, tmp_path / "cf.jsonl", "--magic", "yes")
    assert stopped.value.code == 2

"""A dry run prints the plan of the run and writes nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from cpo_fast.run.dry_run import _format_plan
from cpo_fast.run.run_folder import RunFolder
from cpo_fast.testing.runs import parse_arguments, read_rows
from cpo_fast.train import main, run
from tests.samples import write_pairs


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs.jsonl", 30, short=True)


def everything(folder: Path) -> dict[str, bytes | None]:
    paths = sorted(folder.rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.mark.slow
def test_dry_run_plan_equals_the_run_and_writes_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "working"
    there.mkdir()
    monkeypatch.chdir(there)
    made: list[Path] = []
    directory = tempfile.TemporaryDirectory

    def temporary(**options: str) -> tempfile.TemporaryDirectory[str]:
        one = directory(prefix=options["prefix"], dir=tmp_path)
        made.append(Path(one.name))
        return one

    monkeypatch.setattr(tempfile, "TemporaryDirectory", temporary)
    flags = ["--dataset", str(data), "--output_dir", str(tmp_path / "out"), "--stages", "sft,cpo",
             "--sft_per_device_train_batch_size", "4", "--sft_gradient_accumulation_steps", "1",
             "--gradient_accumulation_steps", "1", "--packing_length", "60",
             "--precompute_ref_log_probs"]  # fmt: skip
    before = everything(tmp_path)
    plans = run(parse_arguments([*flags, "--dry_run"]))
    assert everything(tmp_path) == before and len(made) == 1
    out = capsys.readouterr().out
    assert "dry run: nothing was written" in out and "cpo: memory per process: weights" in out
    monkeypatch.undo()

    assert main(flags) == 0
    rows = read_rows(tmp_path / "out")
    for stage in ("sft", "cpo"):
        last = [row for row in rows if row["stage"] == stage and "num_tokens" in row][-1]
        assert last["step"] == plans[stage]["steps"]
        assert last["num_tokens"] == plans[stage]["physical_tokens"]
        assert plans[stage]["seconds"] > 0
        assert 0 < plans[stage]["memory"]["weights"] < plans[stage]["memory"]["peak"]
    assert plans["cpo"]["memory"]["optimizer"] > 2 * plans["cpo"]["memory"]["gradients"] > 0


def test_dry_run_does_not_change_an_earlier_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dataset", str(data), "--output_dir", str(tmp_path / "out"), "--stages", "sft",
             "--sft_max_steps", "1"]  # fmt: skip
    assert main(flags) == 0
    before = everything(tmp_path / "out")
    assert main([*flags, "--stages", "cpo", "--max_steps", "7", "--dry_run"]) == 0
    assert "cpo: 7 steps" in capsys.readouterr().out
    assert everything(tmp_path / "out") == before


def test_sizes_use_the_largest_fitting_unit() -> None:
    from cpo_fast.run.dry_run import _format_size

    shown = ["0 B", "900 B", "1.50 KiB", "3.00 MiB", "1023.00 MiB", "2.25 GiB"]
    counts = [0, 900, 1536, 3 << 20, 1023 << 20, 9 << 28]
    assert [_format_size(count) for count in counts] == shown


def test_plan_uses_singular_for_one() -> None:
    ones = dict.fromkeys(("steps", "steps_per_epoch", "samples", "packs", "physical_tokens",
                          "longest_pack", "timed_packs", "timed_tokens", "seconds"), 1)  # fmt: skip
    plan = ones | {"memory": dict.fromkeys(("weights", "gradients", "optimizer", "peak"), 1)}
    first, _, last = _format_plan(10, "cpo", plan)
    assert first == ("cpo: 1 step (1 an epoch), 1 pair, 1 pack, 1 token; on average 10% of "
                     "--packing_length 10 is filled, the longest pack has 1 token")  # fmt: skip
    assert "from 1 timed pack with 1 token;" in last
    assert (
        _format_plan(10, "sft", plan | {"samples": 2})[0]
        .split("; ")[0]
        .endswith("2 samples, 1 pack, 1 token")
    )


def test_dry_run_names_no_unwritten_file(tmp_path: Path) -> None:
    flags = ["--output_dir", str(tmp_path / "run"), "--dataset", "phantom"]
    assert "data check" in RunFolder(parse_arguments([*flags, "--dry_run"])).where_rejected
    assert "rejected_records.jsonl" in RunFolder(parse_arguments(flags)).where_rejected

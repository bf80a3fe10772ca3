"""Unusable data gives a message with the file and the remedy."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

from cpo_fast.phantom import write_phantom
from cpo_fast.train import main


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("data") / "d", num_studies=12, image_size=64)


@pytest.fixture
def data(phantom: Path, tmp_path: Path) -> Path:
    """A copy of the phantom, to be damaged."""
    return shutil.copytree(phantom, tmp_path / "data")


def run_and_fail(
    folder: Path,
    dataset: Path | str,
    capsys: pytest.CaptureFixture[str],
    *flags: str,
    status: int = 1,
) -> str:
    """Stderr of a run that must fail with `status` and without a traceback."""
    command = ["--dataset", str(dataset), "--output_dir", str(folder / "out"), *flags]
    assert main(command) == status
    error = capsys.readouterr().err
    assert error.startswith("cpo-fast train: error: "), error
    return error


def test_empty_folder_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    error = run_and_fail(tmp_path, tmp_path / "empty", capsys)
    assert "empty" in error and "folder is empty" in error


def test_csv_without_expected_columns_is_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data / "mimic-cxr-2.0.0-split.csv.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    path.write_bytes(gzip.compress("\n".join(["dicom,study,subject,part", *lines[1:]]).encode()))
    error = run_and_fail(tmp_path, data, capsys)
    assert path.name in error and "split" in error


def test_data_set_without_studies_is_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in data.glob("*.csv.gz"):
        header = gzip.decompress(path.read_bytes()).decode().splitlines()[0]
        path.write_bytes(gzip.compress((header + "\n").encode()))
    assert str(data) in run_and_fail(tmp_path, data, capsys)


def test_report_without_findings_is_listed(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = sorted(data.rglob("s*.txt"))[0]
    report.write_text(" FINAL REPORT\n EXAMINATION:  CHEST\n\n FINDINGS:\n\n IMPRESSION:\n")
    error = run_and_fail(tmp_path, data, capsys, "--max_bad_fraction", "0")
    assert "1 of 12 records" in error
    lines = (tmp_path / "out" / "rejected_records.jsonl").read_text().splitlines()
    record = json.loads(lines[0])
    assert record["reason"] == "no-findings-or-impression"
    assert Path(record["file"]).name == report.name


def test_missing_model_folder_is_named(
    phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--model_name_or_path", str(tmp_path / "no-model"))
    error = run_and_fail(tmp_path, phantom, capsys, *flags, status=2)
    assert "no-model" in error and "--model_name_or_path" in error


def test_unwritable_output_folder_is_named(
    phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("not a folder")
    assert "--output_dir" in run_and_fail(tmp_path, phantom, capsys, status=2)

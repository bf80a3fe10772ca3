"""The phantom's folder: layout of MIMIC-CXR-JPG, equal bytes, reuse, refusal, tables."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cpo_fast.data import open_studies
from cpo_fast.errors import UsageError
from cpo_fast.phantom import write_phantom
from cpo_fast.phantom.__main__ import main
from cpo_fast.types import FINDINGS

NUM_STUDIES = 80
SIZE = 96


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom") / "data"
    return write_phantom(folder, num_studies=NUM_STUDIES, seed=5, image_size=SIZE)


def read_table(root: Path, name: str) -> list[dict[str, str]]:
    with gzip.open(root / name, "rt", newline="") as file:
        return list(csv.DictReader(file))


def hash_all(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def test_layout_equals_mimic_cxr_jpg(root: Path) -> None:
    pictures = [str(path.relative_to(root)) for path in root.rglob("*.jpg")]
    shape = re.compile(r"files/p(1\d)/p\1\d{6}/s5\d{7}/[0-9a-f]{8}(-[0-9a-f]{8}){4}\.jpg")
    assert len(pictures) >= NUM_STUDIES
    assert all(shape.fullmatch(path) for path in pictures)

    studies = read_table(root, "cxr-study-list.csv.gz")
    assert len(studies) == NUM_STUDIES == len({row["study_id"] for row in studies})
    assert all((root / row["path"]).is_file() for row in studies)
    records = read_table(root, "cxr-record-list.csv.gz")
    assert sorted(row["path"].replace(".dcm", ".jpg") for row in records) == sorted(pictures)
    with Image.open(root / pictures[0]) as picture:
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "L", (SIZE, SIZE))


def test_tables_have_the_original_columns_and_values(root: Path) -> None:
    labels = read_table(root, "mimic-cxr-2.0.0-chexpert.csv.gz")
    assert tuple(labels[0]) == ("subject_id", "study_id", *FINDINGS)
    assert {row[name] for row in labels for name in FINDINGS} == {"1.0", "0.0", "-1.0", ""}
    metadata = read_table(root, "mimic-cxr-2.0.0-metadata.csv.gz")
    assert {row["ViewPosition"] for row in metadata} == {"AP", "PA", "LATERAL"}
    assert all(re.fullmatch(r"211\d[01]\d[0-3]\d", row["StudyDate"]) for row in metadata)
    assert {row["Rows"] for row in metadata} == {str(SIZE)}
    splits = read_table(root, "mimic-cxr-2.0.0-split.csv.gz")
    assert tuple(splits[0]) == ("dicom_id", "study_id", "subject_id", "split")
    assert [row["dicom_id"] for row in splits] == [row["dicom_id"] for row in metadata]


def test_splits_follow_patient_and_time(root: Path) -> None:
    when = {
        row["dicom_id"]: row["StudyDate"]
        for row in read_table(root, "mimic-cxr-2.0.0-metadata.csv.gz")
    }
    of_patient: dict[str, set[str]] = {}
    first: dict[str, str] = {}
    for row in read_table(root, "mimic-cxr-2.0.0-split.csv.gz"):
        patient = row["subject_id"]
        of_patient.setdefault(patient, set()).add(row["split"])
        first[patient] = min(first.get(patient, "99999999"), when[row["dicom_id"]])
    assert all(len(splits) == 1 for splits in of_patient.values())
    dates = {
        split: [first[p] for p, splits in of_patient.items() if split in splits]
        for split in ("train", "validate", "test")
    }
    assert max(dates["train"]) <= min(dates["validate"])
    assert max(dates["validate"]) <= min(dates["test"])
    assert 0.72 < len(dates["train"]) / len(first) < 0.88


def test_reports_have_the_original_format(root: Path) -> None:
    reports = [path.read_text() for path in root.glob("files/*/*/s*.txt")]
    assert len(reports) == NUM_STUDIES
    for report in reports:
        lines = report.splitlines()
        assert lines[0].strip() == "FINAL REPORT"
        assert all(line.startswith(" ") and len(line) <= 79 for line in lines)
        headers = re.findall(r"^ ([A-Z]+):", report, re.MULTILINE)
        assert headers == ["EXAMINATION", "INDICATION", "COMPARISON", "FINDINGS", "IMPRESSION"]
        assert "___" in report
        assert "{" not in report


def test_same_settings_give_the_same_bytes(root: Path, tmp_path: Path) -> None:
    """In a separate process with another hash seed, through the command line."""
    command = [sys.executable, "-m", "cpo_fast.phantom", "--output_dir", str(tmp_path / "again")]
    command += ["--num_studies", str(NUM_STUDIES), "--seed", "5", "--image_size", str(SIZE)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "123"})
    assert hash_all(tmp_path / "again") == hash_all(root)


def test_another_seed_gives_other_studies(root: Path, tmp_path: Path) -> None:
    other = write_phantom(tmp_path / "other", num_studies=3, seed=6, image_size=SIZE)
    assert not set(hash_all(other)) & {name for name in hash_all(root) if name.startswith("files/")}


def test_rerun_does_not_change_the_files(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert write_phantom(root, num_studies=NUM_STUDIES, seed=5, image_size=SIZE) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_interrupted_phantom_is_completed(root: Path, tmp_path: Path) -> None:
    settings = {"num_studies": 4, "seed": 1, "image_size": 64}
    whole = hash_all(write_phantom(tmp_path / "p", **settings))
    marker = json.loads((tmp_path / "p" / "phantom.json").read_text())
    (tmp_path / "p" / "phantom.json").write_text(json.dumps(marker | {"complete": False}))
    (tmp_path / "p" / "phantom_truth.jsonl").unlink()
    next((tmp_path / "p").rglob("*.jpg")).unlink()
    assert hash_all(write_phantom(tmp_path / "p", **settings)) == whole


def test_other_folders_and_settings_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="other settings"):
        write_phantom(root, num_studies=NUM_STUDIES, seed=7, image_size=SIZE)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        write_phantom(tmp_path, num_studies=4)
    with pytest.raises(UsageError, match="not a folder"):
        write_phantom(tmp_path / "notes.txt", num_studies=4)
    for wrong in ({"num_studies": 0}, {"num_studies": 4, "image_size": 8}):
        with pytest.raises(UsageError):
            write_phantom(tmp_path / "new", **wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_command_names_the_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["--output_dir", str(tmp_path), "--num_studies", "4"]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_files_are_private(root: Path) -> None:
    assert root.stat().st_mode & 0o077 == 0
    assert all(p.stat().st_mode & 0o077 == 0 for p in root.rglob("*") if p.is_file())


def test_truth_equals_labels_and_readme_denies_patients(root: Path) -> None:
    assert "No patient" in (root / "README.txt").read_text()
    truth = [json.loads(line) for line in (root / "phantom_truth.jsonl").read_text().splitlines()]
    assert len(truth) == NUM_STUDIES
    labels = {row["study_id"]: row for row in read_table(root, "mimic-cxr-2.0.0-chexpert.csv.gz")}
    for study in truth:
        for sign in study["findings"]:
            if sign["finding"] != "Emphysema":
                value = labels[study["study_id"]][sign["finding"]]
                assert value == ("1.0" if sign["certain"] else "-1.0")
                assert not sign["certain"] or sign["strength"] >= 0.65
    drifts = json.loads((root / "phantom.json").read_text())["drift"]
    assert {drift["name"] for drift in drifts} == {"density", "opacity"}


def test_mimic_reader_reads_the_phantom(root: Path) -> None:
    source = open_studies(str(root))
    studies = list(source)
    assert source.kind == "mimic-cxr"
    assert len(studies) == NUM_STUDIES
    assert not source.rejected
    assert all(s.report.findings and s.report.impression and s.images for s in studies)
    assert {s.split for s in studies} == {"train", "validate", "test"}
    present = np.mean([s.labels.get("No Finding") == 1 for s in studies])
    assert 0.15 < present < 0.55

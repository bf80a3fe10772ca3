"""Synthetic data sets, without patient data, for the tests of cpo_fast.data."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cpo_fast.data.json_files import records
from cpo_fast.errors import RecordError
from cpo_fast.types import FINDINGS

SECRET = "Zebra-striped granuloma of the seventh left rib"
"""Report text that must not appear in messages, logs or rejected records."""

REPORT = """                                 FINAL REPORT
 INDICATION:  ___-year-old man with cough.

 FINDINGS:

 The lungs are clear. {body}

 IMPRESSION:

 No acute process.
"""


def dicom(number: int) -> str:
    return "-".join([f"{number:08x}"] * 5)


def image_bytes(mode: str = "L", size: tuple[int, int] = (8, 6), format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 100).save(buffer, format)
    return buffer.getvalue()


def read_all(path: Path) -> list[Any]:
    """The records of a file; the reason in place of an invalid record."""
    return [row.reason if isinstance(row, RecordError) else row for _, row in records(str(path))]


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def write_mimic(
    root: Path,
    studies: Sequence[Mapping[str, object]],
    *,
    labeller: str = "chexpert",
    columns: Sequence[str] = FINDINGS,
) -> Path:
    """Write a MIMIC-CXR-JPG tree. Keys of a study: `patient`, `study`, `views` (names), `date`,
    `labels`, `report` (None: no file) and `split`; all but `study` have defaults.
    """
    root.mkdir(parents=True, exist_ok=True)
    split, metadata, labels = [], [], []
    number = 0
    for one in studies:
        patient, study = str(one.get("patient", "10000032")), str(one["study"])
        folder = root / f"files/p{patient[:2]}/p{patient}"
        (folder / f"s{study}").mkdir(parents=True, exist_ok=True)
        text = one.get("report", REPORT.format(body=""))
        if text is not None:
            data = text if isinstance(text, bytes) else str(text).encode()
            (folder / f"s{study}.txt").write_bytes(data)
        for view in one.get("views", ("PA", "LATERAL")):  # type: ignore[attr-defined]
            number += 1
            name = dicom(number)
            (folder / f"s{study}" / f"{name}.jpg").write_bytes(image_bytes())
            split.append((name, study, patient, one.get("split", "train")))
            when = (one.get("date", "21800101"), one.get("time", "90000.5"))
            metadata.append((name, patient, study, view, 6, 8, *when))
        given = one.get("labels", {"No Finding": "1.0"})
        if given is not None:
            values = [given.get(name, "") for name in columns]  # type: ignore[attr-defined]
            labels.append((patient, study, *values))
    # Not PhysioNet's column order: columns are read by name.
    write_csv(
        root / "mimic-cxr-2.0.0-split.csv.gz",
        ("dicom_id", "study_id", "subject_id", "split"),
        split,
    )
    write_csv(
        root / "mimic-cxr-2.0.0-metadata.csv.gz",
        ("dicom_id", "subject_id", "study_id", "ViewPosition", "Rows", "Columns", "StudyDate",
         "StudyTime"),
        metadata,
    )  # fmt: skip
    write_csv(
        root / f"mimic-cxr-2.0.0-{labeller}.csv.gz", ("subject_id", "study_id", *columns), labels
    )
    return root

"""Write the phantom's folder; the same settings give the same bytes."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from cpo_fast.errors import UsageError
from cpo_fast.flags import SEED, whole
from cpo_fast.folders import write_json, write_private
from cpo_fast.phantom.cases import Exam, draw_exams
from cpo_fast.phantom.radiograph import draw_frontal, draw_lateral
from cpo_fast.phantom.reports import DRIFTS, Written, write_study_report
from cpo_fast.types import FINDINGS

MARKER = "phantom.json"
NUM_STUDIES = whole(1, 1_000_000)
IMAGE_SIZE = whole(64, 2048)
TRUTH = "phantom_truth.jsonl"
GENERATION = 1  # increase if the same settings give other bytes
_JPEG_QUALITY = 88

_README = """\
This folder is a PHANTOM: a drawn and written test bed in the layout of MIMIC-CXR-JPG 2.x.
No patient, radiograph or report in it is real, and nothing about medicine can be learned from it.

It was made by cpo_fast.phantom with the settings in phantom.json; the same settings give the same
bytes again. phantom_truth.jsonl has one line per study with what its picture shows (finding, side,
place, strength from 0, not drawn, to 1; certain: asserted rather than hedged) and which drifting
near-synonyms its report uses. These two files and this one have no counterpart in the real
MIMIC-CXR-JPG. Pictures are JPEG files; cxr-record-list.csv.gz says .dcm as the original does. The
lateral views are schematic: only a wide heart, pleural fluid, hyperinflation and a pacemaker show.
"""


def write_phantom(
    output_dir: str | Path, *, num_studies: int, seed: int = 42, image_size: int = 256
) -> Path:
    """Write a phantom data set of `num_studies` studies and return its folder.

    A complete phantom with the same settings is left unchanged, an incomplete one is completed.
    Raises UsageError for a setting out of range and if `output_dir` has other content.
    """
    _check_settings(num_studies, seed, image_size)
    root = Path(output_dir)
    marker = {
        "phantom": "drawn pictures and written reports; a test bed, not medicine",
        "settings": {
            "generation": GENERATION,
            "num_studies": num_studies,
            "seed": seed,
            "image_size": image_size,
        },
        "drift": [asdict(drift) for drift in DRIFTS],
    }
    if _is_complete(root, marker):
        return root

    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_json(root / MARKER, marker | {"complete": False})
    write_private(root / "README.txt", _README.encode())
    found = draw_exams(num_studies, seed)
    reports = []
    for exam in tqdm(found, desc="phantom", unit="study", disable=None):
        report = write_study_report(exam, np.random.default_rng([seed, 2, exam.number]))
        folder = root / study_path(exam)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(folder.with_name(folder.name + ".txt"), report.text.encode())
        for dicom_id, picture in zip(
            exam.dicom_ids, _draw_images(exam, seed, image_size), strict=True
        ):
            write_private(folder / f"{dicom_id}.jpg", picture)
        reports.append(report)
    _write_tables(root, found, reports, image_size)
    lines = (json.dumps(_build_truth(*pair)) + "\n" for pair in zip(found, reports, strict=True))
    write_private(root / TRUTH, "".join(lines).encode())
    write_json(root / MARKER, marker | {"complete": True})
    return root


def study_path(exam: Exam) -> str:
    """Folder of a study relative to the root, e.g. files/p10/p10000032/s50414267."""
    return f"files/p{exam.patient_id[:2]}/p{exam.patient_id}/s{exam.study_id}"


def _check_settings(num_studies: int, seed: int, image_size: int) -> None:
    for name, value, allowed in (
        ("num_studies", num_studies, NUM_STUDIES),
        ("seed", seed, SEED),
        ("image_size", image_size, IMAGE_SIZE),
    ):
        if fault := allowed.fault(value):
            raise UsageError(f"{name} {value}: {fault}")


def _is_complete(root: Path, marker: dict[str, Any]) -> bool:
    """Whether the phantom is complete. Raises UsageError if it cannot be written to `root`."""
    if not root.exists():
        return False
    if not root.is_dir():
        raise UsageError(f"output_dir {root} is not a folder; give another path")
    if not any(root.iterdir()):
        return False
    try:
        found = json.loads((root / MARKER).read_text(encoding="utf-8"))
        settings, complete = found["settings"], found["complete"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"output_dir {root} is not empty and not a phantom data set; give a new or empty folder"
        ) from None
    if settings != marker["settings"]:
        raise UsageError(
            f"output_dir {root} holds a phantom with other settings ({settings} instead of "
            f"{marker['settings']}); give another folder or delete this one"
        )
    return complete is True


def _draw_images(exam: Exam, seed: int, size: int) -> Iterable[bytes]:
    for index in range(len(exam.dicom_ids)):
        rng = np.random.default_rng([seed, 3, exam.number, index])
        if index == 0:
            picture = draw_frontal(rng, exam.body, exam.signs, exam.view, size)
        else:
            picture = draw_lateral(rng, exam.body, exam.signs, size)
        yield _encode_jpeg(picture)


def _encode_jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def _write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    # No time or name in the gzip header, so that equal tables are equal bytes.
    write_private(path, gzip.compress(text.getvalue().encode(), mtime=0))


def _write_tables(root: Path, found: list[Exam], reports: list[Written], image_size: int) -> None:
    """Write the five tables of MIMIC-CXR(-JPG), sorted by patient, study and image id."""
    pairs = sorted(
        zip(found, reports, strict=True), key=lambda pair: (pair[0].patient_id, pair[0].study_id)
    )
    _write_table(
        root / "mimic-cxr-2.0.0-chexpert.csv.gz",
        ("subject_id", "study_id", *FINDINGS),
        (
            (exam.patient_id, exam.study_id, *(_format_label(report, name) for name in FINDINGS))
            for exam, report in pairs
        ),
    )
    _write_table(
        root / "cxr-study-list.csv.gz",
        ("subject_id", "study_id", "path"),
        ((e.patient_id, e.study_id, study_path(e) + ".txt") for e, _ in pairs),
    )

    images = [
        (exam, dicom_id, exam.view if dicom_id == exam.dicom_ids[0] else "LATERAL")
        for exam, _ in pairs
        for dicom_id in sorted(exam.dicom_ids)
    ]
    _write_table(
        root / "cxr-record-list.csv.gz",
        ("subject_id", "study_id", "dicom_id", "path"),
        ((e.patient_id, e.study_id, d, f"{study_path(e)}/{d}.dcm") for e, d, _ in images),
    )
    _write_table(
        root / "mimic-cxr-2.0.0-split.csv.gz",
        ("dicom_id", "study_id", "subject_id", "split"),
        ((d, e.study_id, e.patient_id, e.split) for e, d, _ in images),
    )
    _write_table(
        root / "mimic-cxr-2.0.0-metadata.csv.gz",
        (
            "dicom_id",
            "subject_id",
            "study_id",
            "PerformedProcedureStepDescription",
            "ViewPosition",
            "Rows",
            "Columns",
            "StudyDate",
            "StudyTime",
        ),
        (
            (
                dicom_id,
                exam.patient_id,
                exam.study_id,
                exam.procedure,
                view,
                image_size,
                image_size,
                exam.when.strftime("%Y%m%d"),
                exam.when.strftime("%H%M%S.000"),
            )
            for exam, dicom_id, view in images
        ),
    )


def _format_label(report: Written, finding: str) -> str:
    value = report.labels.get(finding)
    return "" if value is None else f"{value:.1f}"


def _build_truth(exam: Exam, report: Written) -> dict[str, Any]:
    return {
        "study_id": exam.study_id,
        "patient_id": exam.patient_id,
        "split": exam.split,
        "years": round(exam.years, 3),
        "findings": [asdict(sign) for sign in exam.signs],
        "drift": [asdict(word) for word in report.drifted],
    }

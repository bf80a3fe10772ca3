"""Labelled image sets as a CSV and a folder of images: ChestXray14, CheXpert, PadChest.

The columns tell the three apart. Findings keep the words of their set, because they become
candidate sentences for the model; only ChestXray14's "Effusion" becomes "Pleural Effusion". Blank
means absent; the caller decides whether CheXpert's uncertain -1 counts as present. A row that
cannot be used is set aside with its line and the reason.
"""

from __future__ import annotations

import ast
import csv
import gzip
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cpo_fast.errors import DataError, RecordError
from cpo_fast.types import FINDINGS, ImageRef, RejectedRecord

NORMAL = {"no finding", "normal"}
MAX_ROW = 1_000_000  # characters of one field
CHEXPERT_VALUES = {"": 0, "0": 0, "0.0": 0, "1": 1, "1.0": 1, "-1": -1, "-1.0": -1}

Row = Mapping[str, str]


@dataclass(frozen=True)
class LabelledImage:
    image: ImageRef
    patient: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class LabelledSet:
    """`kind` is the set's name; `findings` are all that can be present, in the file's order."""

    kind: str
    findings: tuple[str, ...]
    images: list[LabelledImage]
    rejected: list[RejectedRecord] = field(default_factory=list)


def read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a .csv or .csv.gz. Raises DataError for an unreadable file."""
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rb") as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="").read()
        csv.field_size_limit(MAX_ROW)
        reader = csv.DictReader(io.StringIO(text))
        rows = [{k: v or "" for k, v in row.items() if k} for row in reader]
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV ({type(error).__name__})") from None
    return list(reader.fieldnames or ()), rows


def read_labelled_csv(path: Path, images: Path, *, uncertain: str = "negative") -> LabelledSet:
    """The images that a CSV lists, all inside the folder `images`.

    `uncertain` is "negative" or "positive". Raises DataError if the columns are of no known set or
    no row can be used.
    """
    columns, rows = read_csv(path)
    read: Callable[[Row], LabelledImage]
    if {"Image Index", "Finding Labels"} <= set(columns):
        kind, known, read = "ChestXray14", None, lambda row: _chest_xray_14(row, images)
    elif "Path" in columns and (present := [name for name in columns if name in FINDINGS]):
        known = tuple(name for name in present if name.lower() not in NORMAL)
        kind, read = "CheXpert", lambda row: _chexpert(row, images, present, uncertain)
    elif {"ImageID", "Labels"} <= set(columns):
        kind, known, read = "PadChest", None, lambda row: _padchest(row, images)
    else:
        raise DataError(
            f"{path}: the columns ({', '.join(columns[:8])}) match none of ChestXray14 (Image "
            "Index, Finding Labels), CheXpert (Path and findings) and PadChest (ImageID, Labels)"
        )
    listed, rejected = [], []
    for line, row in enumerate(rows, start=2):
        try:
            listed.append(read(row))
        except RecordError as error:
            rejected.append(RejectedRecord(str(path), line, "", error.reason, error.detail))
    if not listed:
        raise DataError(f"{path} has no row that can be used ({len(rejected)} set aside)")
    seen = tuple(sorted({name for one in listed for name in one.names}))
    return LabelledSet(kind, seen if known is None else known, listed, rejected)


def _chest_xray_14(row: Row, images: Path) -> LabelledImage:
    names = [name.strip().replace("_", " ") for name in row["Finding Labels"].split("|")]
    if names == [""]:
        raise RecordError("no-labels", "the column Finding Labels is empty")
    names = ["Pleural Effusion" if name == "Effusion" else name for name in names]
    return _image(row["Image Index"], images, row.get("Patient ID", ""), names)


def _chexpert(row: Row, images: Path, findings: list[str], uncertain: str) -> LabelledImage:
    # Paths begin with the name of the archive; `images` usually is the folder of that name.
    path = re.sub(r"^CheXpert-v1\.0[^/]*/", "", row["Path"])
    patient = re.search(r"patient\d+", path)
    names = []
    for name in findings:
        if (value := CHEXPERT_VALUES.get(row[name].strip())) is None:
            raise RecordError("label-value", f"{name} is not 1, 0, -1 or blank")
        if value == 1 or (value == -1 and uncertain == "positive"):
            names.append(name)
    return _image(path, images, patient[0] if patient else "", names)


def _padchest(row: Row, images: Path) -> LabelledImage:
    try:
        names = ast.literal_eval(row["Labels"] or "[]")
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        names = None
    if not isinstance(names, list):  # the labels of a few rows of the set are cut off
        raise RecordError("labels-unreadable", "the column Labels is not a list")
    words = [str(name).strip().capitalize() for name in names if str(name).strip()]
    folder, path = row.get("ImageDir", ""), row["ImageID"]
    if folder and (images / folder / path).is_file():
        path = f"{folder}/{path}"
    return _image(path, images, row.get("PatientID", ""), words)


def _image(path: str, images: Path, patient: str, names: list[str]) -> LabelledImage:
    if not path.strip():
        raise RecordError("no-image", "the row names no image")
    known = tuple(dict.fromkeys(name for name in names if name.lower() not in NORMAL))
    return LabelledImage(ImageRef(path, str(images)), patient or path, known)

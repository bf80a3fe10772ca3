"""Labelled image sets as a CSV and a folder of images: ChestXray14, CheXpert, PadChest.

The three are told apart by their columns. Findings keep the words of their set (they become
candidate sentences for the model), except that ChestXray14's "Effusion" is "Pleural Effusion".
Blank means not present; CheXpert's uncertain -1 counts as the caller says.
"""

from __future__ import annotations

import ast
import csv
import gzip
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cpo_fast.errors import DataError
from cpo_fast.types import FINDINGS, ImageRef

NORMAL = {"no finding", "normal"}
MAX_ROW = 1_000_000  # characters of one field


@dataclass(frozen=True)
class LabelledImage:
    image: ImageRef
    patient: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class LabelledSet:
    """`kind` names the set; `findings` are all that may be present, in the file's order."""

    kind: str
    findings: tuple[str, ...]
    images: list[LabelledImage]


def rows(path: Path) -> tuple[list[str], Iterator[dict[str, str]]]:
    """Columns and rows of a .csv or .csv.gz; DataError when it is none."""
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rb") as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="").read()
        csv.field_size_limit(MAX_ROW)
        reader = csv.DictReader(io.StringIO(text))
        found = [{k: v or "" for k, v in row.items() if k} for row in reader]
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV ({type(error).__name__})") from None
    return list(reader.fieldnames or ()), iter(found)


def read_labelled_csv(path: Path, images: Path, *, uncertain: str = "negative") -> LabelledSet:
    """The images of a CSV below the folder `images`, which they may not leave.

    Raises DataError when the columns tell no known set or no row is left.
    """
    columns, found = rows(path)
    if {"Image Index", "Finding Labels"} <= set(columns):
        result = _chest_xray_14(found, images)
    elif "Path" in columns and (present := [name for name in columns if name in FINDINGS]):
        result = _chexpert(found, images, present, uncertain)
    elif {"ImageID", "Labels"} <= set(columns):
        result = _padchest(found, images)
    else:
        raise DataError(
            f"{path}: its columns ({', '.join(columns[:8])}) are neither those of ChestXray14 "
            "(Image Index, Finding Labels), CheXpert (Path and findings) nor PadChest (ImageID, "
            "Labels)"
        )
    if not result.images:
        raise DataError(f"{path} has no row")
    return result


def _chest_xray_14(found: Iterator[Mapping[str, str]], images: Path) -> LabelledSet:
    listed = []
    for row in found:
        names = [name.strip().replace("_", " ") for name in row["Finding Labels"].split("|")]
        names = ["Pleural Effusion" if name == "Effusion" else name for name in names]
        listed.append(_image(row["Image Index"], images, row.get("Patient ID", ""), names))
    return LabelledSet("ChestXray14", _seen(listed), listed)


def _chexpert(
    found: Iterator[Mapping[str, str]], images: Path, findings: list[str], uncertain: str
) -> LabelledSet:
    values = {"1", "1.0"} | ({"-1", "-1.0"} if uncertain == "positive" else set())
    listed = []
    for row in found:
        # Paths begin with the archive's own name, which the folder given usually is.
        path = re.sub(r"^CheXpert-v1\.0[^/]*/", "", row["Path"])
        patient = re.search(r"patient\d+", path)
        names = [name for name in findings if row[name].strip() in values]
        listed.append(_image(path, images, patient[0] if patient else "", names))
    kept = tuple(name for name in findings if name.lower() not in NORMAL)
    return LabelledSet("CheXpert", kept, listed)


def _padchest(found: Iterator[Mapping[str, str]], images: Path) -> LabelledSet:
    listed = []
    for row in found:
        try:
            names = ast.literal_eval(row["Labels"] or "[]")
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue  # the set holds a few rows whose labels are cut off
        if isinstance(names, list):
            words = [str(name).strip().capitalize() for name in names if str(name).strip()]
            folder = row.get("ImageDir", "")
            path = row["ImageID"]
            if folder and (images / folder / path).is_file():
                path = f"{folder}/{path}"
            listed.append(_image(path, images, row.get("PatientID", ""), words))
    return LabelledSet("PadChest", _seen(listed), listed)


def _image(path: str, images: Path, patient: str, names: list[str]) -> LabelledImage:
    known = tuple(dict.fromkeys(name for name in names if name.lower() not in NORMAL))
    return LabelledImage(ImageRef(path, str(images)), patient or path, known)


def _seen(listed: list[LabelledImage]) -> tuple[str, ...]:
    return tuple(sorted({name for one in listed for name in one.names}))

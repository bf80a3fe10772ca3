"""The three tables of MIMIC-CXR-JPG as arrays, ordered by study and cached between runs.

Reading the tables of the whole data set takes seconds. The index is cached in the user's cache
folder ($XDG_CACHE_HOME/cpo_fast, else ~/.cache/cpo_fast; folder 0700, file 0600, no pickle), keyed
by path, size and modification time of each table. It contains no reports or images, which are read
with each study.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from cpo_fast.data.files import csv_rows
from cpo_fast.errors import DataError
from cpo_fast.folders import replace_private
from cpo_fast.types import FINDINGS, SPLITS, RejectedRecord

if TYPE_CHECKING:  # the flags are parsed without numpy
    import numpy as np

FRONTAL_VIEWS = frozenset({"AP", "PA"})

OTHER, FRONTAL, BLANK = range(3)
"""Values of `MimicIndex.view`."""

NO_ROW, GOOD_ROW, BAD_ROW = range(3)
"""Values of `MimicIndex.labelled`."""

NOT_MENTIONED = 2
"""Value of `MimicIndex.labels` besides 1, 0 and -1."""

MIN_CACHED_BYTES = 1_000_000
"""Smaller tables (total size) are fast to read and not cached."""

_VERSION = 2
_REMEDY = "download the table again from PhysioNet (MIMIC-CXR-JPG 2.x) and leave it unedited"
_SUBJECT = re.compile(r"1\d{7}", re.ASCII)
_STUDY = re.compile(r"5\d{7}", re.ASCII)
_DICOM = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{8}){4}")
_WRAPPED = re.compile(r"""^[\s"'=]*[sp]?|(?:\.0*|\.jpg|\.dcm|\.png)?[\s"']*$""")
_VALUES = {"": NOT_MENTIONED, "1.0": 1, "1": 1, "0.0": 0, "0": 0, "-1.0": -1, "-1": -1}


@dataclass(frozen=True, slots=True)
class MimicIndex:
    """S studies in the order (patient, date, time, study), with their I images in the same order.

    The images of study i are `first[i]` to `first[i + 1]`. `bad` lists the rows set aside.
    """

    study: np.ndarray  # [S] int32
    patient: np.ndarray  # [S] int32
    split: np.ndarray  # [S] uint8 into SPLITS
    date: np.ndarray  # [S] bytes, YYYYMMDD
    first: np.ndarray  # [S + 1] int32
    dicom: np.ndarray  # [I] bytes
    view: np.ndarray  # [I] uint8: OTHER, FRONTAL or BLANK
    labels: np.ndarray  # [S, 14] int8 by FINDINGS
    labelled: np.ndarray  # [S] uint8: NO_ROW, GOOD_ROW or BAD_ROW
    bad: tuple[RejectedRecord, ...]

    def __len__(self) -> int:
        return len(self.study)


# --- tables --------------------------------------------------------------------------------------

_Studies = dict[str, tuple[str, str, list[str]]]  # study -> patient, split, dicom ids
_Metadata = dict[str, tuple[int, str, str]]  # dicom -> view, date, time
_Bad = list[RejectedRecord]


def _id(cell: str, pattern: re.Pattern[str]) -> str:
    """The id in `cell`, also in a spreadsheet's spelling (`51234567.0`, `s51234567`, `"51234567"`),
    or "": any other cell can contain patient text and is never repeated."""
    if pattern.fullmatch(cell):
        return cell
    bare = _WRAPPED.sub("", cell.lower())
    return bare if pattern.fullmatch(bare) else ""


def _read_rows(path: str, columns: Sequence[str], name: str) -> Iterable[tuple[int, list[str]]]:
    """`csv_rows` of the table, with a progress bar."""
    from tqdm import tqdm

    return tqdm(csv_rows(path, columns, _REMEDY), name, disable=None, leave=False)


def _read_split(path: str, bad: _Bad) -> _Studies:
    studies: _Studies = {}
    seen: set[str] = set()
    columns = ("dicom_id", "study_id", "subject_id", "split")
    for line, (*cells, split) in _read_rows(path, columns, "split"):
        # Paths are built from these ids, so anything else is refused.
        dicom, study, patient = map(_id, cells, (_DICOM, _STUDY, _SUBJECT))

        def note(reason: str, detail: str, line: int = line, study: str = study) -> None:
            bad.append(RejectedRecord(path, line, study, reason, detail))

        if not (dicom and study and patient):
            note("bad-id", "dicom_id, study_id or subject_id is malformed")
        elif split not in SPLITS:
            note("bad-split", f"split is none of {', '.join(SPLITS)}")
        elif dicom in seen:
            note("duplicate-id", f"dicom_id {dicom} is repeated")
        else:
            seen.add(dicom)
            known = studies.setdefault(study, (patient, split, []))
            if known[:2] == (patient, split):
                known[2].append(dicom)
            else:
                note("conflicting-row", "an earlier row has another subject_id or split")
    return studies


def _read_metadata(path: str, bad: _Bad) -> _Metadata:
    columns = ("dicom_id", "ViewPosition", "StudyDate", "StudyTime")
    known: _Metadata = {}
    for line, (cell, view, date, time) in _read_rows(path, columns, "metadata"):
        dicom = _id(cell, _DICOM)
        if not dicom:
            bad.append(RejectedRecord(path, line, "", "bad-id", "dicom_id is malformed"))
        elif dicom in known:
            detail = "dicom_id is repeated"
            bad.append(RejectedRecord(path, line, dicom, "duplicate-id", detail))
        else:
            seen = FRONTAL if view.upper() in FRONTAL_VIEWS else OTHER if view else BLANK
            known[dicom] = (seen, date.removesuffix(".0")[:16], time[:32])
    return known


def _read_labels(path: str, bad: _Bad) -> dict[str, tuple[int, ...]]:
    """Study id -> values in the order of FINDINGS; () for a row with any other value."""
    labels: dict[str, tuple[int, ...]] = {}
    for line, (cell, *values) in _read_rows(path, ("study_id", *FINDINGS), "labels"):
        study = _id(cell, _STUDY)
        if not study:
            bad.append(RejectedRecord(path, line, "", "bad-id", "study_id is malformed"))
            continue
        if study in labels:
            detail = "study_id is repeated"
            bad.append(RejectedRecord(path, line, study, "duplicate-id", detail))
            continue
        try:
            labels[study] = tuple(_VALUES[value] for value in values)
        except KeyError:
            detail = "a label is none of 1.0, 0.0, -1.0 and empty"
            bad.append(RejectedRecord(path, line, study, "bad-label", detail))
            labels[study] = ()
    return labels


def _seconds(time: str) -> float:
    """HHMMSS.fff without leading zeros as a sortable number; 0 for anything else."""
    try:
        value = float(time)
    except ValueError:
        return 0.0
    return value if value == value else 0.0


def _check_matched(path: str, named: Collection[str], wanted: Iterable[str], bad: _Bad) -> None:
    """Raises DataError if a table has rows, but none for the ids of the split table."""
    wanted = list(wanted)
    lines = [record.line for record in bad if record.file == path and record.reason == "bad-id"]
    if wanted and (named or lines) and not any(one in named for one in wanted):
        what = f"its ids are malformed from line {lines[0]} on" if lines else "its ids differ"
        raise DataError(
            f"{path}: no row matches a study of the split table ({what}); take all tables from one "
            "release of MIMIC-CXR-JPG"
        )


def build_index(split: str, metadata: str, labels: str) -> MimicIndex:
    """Read the three tables. Raises DataError as `csv_rows`, and for a table that matches no
    study."""
    import numpy as np

    bad: _Bad = []
    images = _read_metadata(metadata, bad)
    values = _read_labels(labels, bad)
    studies = _read_split(split, bad)
    _check_matched(labels, values, studies, bad)
    every = (dicom for _, _, dicoms in studies.values() for dicom in dicoms)
    _check_matched(metadata, images, every, bad)
    unknown = (BLANK, "", "")

    def when(study: str) -> tuple[str, float]:
        _, date, time = images.get(studies[study][2][0], unknown)
        return date, _seconds(time)

    order = sorted(studies, key=lambda study: (studies[study][0], *when(study), study))
    dicoms = [dicom for study in order for dicom in studies[study][2]]
    nothing = (NOT_MENTIONED,) * len(FINDINGS)
    rows = [values.get(study) for study in order]
    return MimicIndex(
        study=np.array([int(study) for study in order], dtype=np.int32),
        patient=np.array([int(studies[study][0]) for study in order], dtype=np.int32),
        split=np.array([SPLITS.index(studies[study][1]) for study in order], dtype=np.uint8),
        date=np.array([when(study)[0].encode() for study in order], dtype=np.bytes_),
        first=np.cumsum([0, *(len(studies[study][2]) for study in order)], dtype=np.int32),
        dicom=np.array([dicom.encode() for dicom in dicoms], dtype=np.bytes_),
        view=np.array([images.get(dicom, unknown)[0] for dicom in dicoms], dtype=np.uint8),
        labels=np.array([row or nothing for row in rows], dtype=np.int8).reshape(-1, len(FINDINGS)),
        labelled=np.array(
            [NO_ROW if row is None else GOOD_ROW if row else BAD_ROW for row in rows],
            dtype=np.uint8,
        ),
        bad=tuple(bad),
    )


# --- cache ---------------------------------------------------------------------------------------


def _key(paths: tuple[str, ...]) -> str:
    """Key of a valid cached index: version, and path, size and modification time of each table."""
    stats = [(str(Path(path).resolve()), Path(path).stat()) for path in paths]
    return json.dumps([_VERSION, *((path, s.st_size, s.st_mtime_ns) for path, s in stats)])


def cache_file(split: str) -> Path:
    """The cache file for the data set with this split table."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    name = hashlib.sha256(str(Path(split).resolve()).encode()).hexdigest()[:24]
    return Path(root) / "cpo_fast" / f"mimic-cxr-{name}.npz"


def _load_cached(file: Path, key: str) -> MimicIndex | None:
    """The index in `file` if its key matches and it is complete."""
    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as arrays:
            if str(arrays["key"]) != key:
                return None
            bad = tuple(RejectedRecord(**record) for record in json.loads(str(arrays["bad"])))
            found = {f.name: arrays[f.name] for f in fields(MimicIndex) if f.name != "bad"}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    index = MimicIndex(**found, bad=bad)
    images = int(index.first[-1]) if len(index.first) else -1
    whole = (
        len(index.first) == len(index) + 1
        and len(index.dicom) == len(index.view) == images
        and index.labels.shape == (len(index), len(FINDINGS))
        and len(index.patient) == len(index.split) == len(index.date) == len(index)
    )
    return index if whole else None


def _store(file: Path, key: str, index: MimicIndex) -> None:
    """Write the index for the next run; an unwritable cache is ignored."""
    import numpy as np

    arrays = {f.name: getattr(index, f.name) for f in fields(MimicIndex) if f.name != "bad"}
    bad = json.dumps([record.to_json() for record in index.bad])
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replace_private(file, binary=True) as out:
            np.savez(out, key=np.array(key), bad=np.array(bad), **arrays)


def load_index(split: str, metadata: str, labels: str) -> MimicIndex:
    """The index of the three tables, from the cache if they are unchanged, else built and cached.
    Raises DataError for a table that cannot be read.
    """
    paths = (split, metadata, labels)
    try:
        key = _key(paths)
        small = sum(Path(path).stat().st_size for path in paths) < MIN_CACHED_BYTES
    except OSError as error:
        raise DataError(
            f"{error.filename}: cannot be read ({error.strerror}); check the path and permissions"
        ) from None
    if small:
        return build_index(*paths)
    file = cache_file(split)
    index = _load_cached(file, key)
    if index is None:
        index = build_index(*paths)
        _store(file, key, index)
    return index

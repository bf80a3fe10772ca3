"""MIMIC-CXR-JPG 2.x as PhysioNet hands it out, with the reports of MIMIC-CXR beside the study
folders.

    files/p10/p10000032/s50414267/<dicom_id>.jpg     files/p10/p10000032/s50414267.txt
    mimic-cxr-2.0.0-{split,metadata,chexpert|negbio}.csv.gz

The three tables are read whole into small tuples (columns by name, order of columns free); reports
are read one by one while iterating. Studies come in the order (patient, date, time, study).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from cpo_fast.data.files import csv_rows, read_report
from cpo_fast.data.sections import indication, parse_report
from cpo_fast.data.source import StudySource
from cpo_fast.errors import DataError, RecordError
from cpo_fast.types import FINDINGS, ImageRef, RejectedRecord, Study

SPLITS = ("train", "validate", "test")
LABELLERS = ("chexpert", "negbio")
FRONTAL_VIEWS = frozenset({"AP", "PA"})

BLANK_VIEW_POLICIES = ("stand-in", "drop")
"""What images without a ViewPosition are good for: "stand-in" (default) takes them where a study
has no image that is named frontal, "drop" never. Lateral views are never taken."""

_REMEDY = "download the table again from PhysioNet (MIMIC-CXR-JPG 2.x) and leave it unedited"
_SUBJECT = re.compile(r"1\d{7}")
_STUDY = re.compile(r"5\d{7}")
_DICOM = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{8}){4}")
_VALUES: dict[str, int | None] = {
    "": None, "1.0": 1, "1": 1, "0.0": 0, "0": 0, "-1.0": -1, "-1": -1,
}  # fmt: skip

# study -> (patient, split, dicom ids); dicom -> (view, date, time); study -> label values by
# FINDINGS
_Studies = dict[str, tuple[str, str, list[str]]]
_Metadata = dict[str, tuple[str, str, str]]
_LabelTable = dict[str, tuple[int | None, ...]]


def table(folder: str, name: str) -> str | None:
    """The path of `mimic-cxr-2.x.x-{name}.csv[.gz]` in `folder`, or None."""
    found = sorted(Path(folder).glob(f"mimic-cxr-2.*-{name}.csv*"))
    return next((str(path) for path in found if path.name.endswith((".csv", ".csv.gz"))), None)


def looks_like(folder: str) -> bool:
    """Whether `folder` has any table of MIMIC-CXR-JPG."""
    return any(table(folder, name) for name in ("split", "metadata", *LABELLERS))


def _required(folder: str, *names: str) -> str:
    for name in names:
        if path := table(folder, name):
            return path
    listed = " or ".join(f"mimic-cxr-2.0.0-{name}.csv.gz" for name in names)
    raise DataError(f"{folder}: no {listed}; MIMIC-CXR-JPG puts it beside the folder files/")


class MimicSource(StudySource):
    """Studies of a MIMIC-CXR-JPG folder.

    `sections` names the rule of `parse_report`, `image_root` is where files/ lies if the images are
    elsewhere (made smaller, say), `blank_view` one of `BLANK_VIEW_POLICIES`. A study
    without a row of labels keeps empty labels. Rows that repeat or contradict another and studies
    that lack their report or a frontal view are rejected. Raises DataError for a missing folder,
    table or column.
    """

    def __init__(
        self,
        path: str,
        *,
        sections: str = "careful",
        image_root: str | None = None,
        blank_view: str = "stand-in",
    ) -> None:
        super().__init__("mimic-cxr", path)
        if blank_view not in BLANK_VIEW_POLICIES:
            raise ValueError(f"blank_view must be one of {BLANK_VIEW_POLICIES}, not {blank_view!r}")
        self.sections = sections
        self.image_root = path if image_root is None else image_root
        self.blank_view = blank_view
        self.labels_path = _required(path, *LABELLERS)
        self._bad_rows: list[RejectedRecord] = []
        self._metadata = self._read_metadata(_required(path, "metadata"))
        self._labels = self._read_labels(self.labels_path)
        self._studies = self._read_split(_required(path, "split"))
        self._order = self._in_order()

    def __len__(self) -> int:
        """Studies that the split table names, before any is set aside."""
        return len(self._order)

    def _bad(self, file: str, line: int, id: str, reason: str, detail: str = "") -> None:
        self._bad_rows.append(RejectedRecord(file, line, id, reason, detail))

    def _read_split(self, path: str) -> _Studies:
        studies: _Studies = {}
        seen: set[str] = set()
        columns = ("dicom_id", "study_id", "subject_id", "split")
        rows = tqdm(csv_rows(path, columns, _REMEDY), "split", disable=None, leave=False)
        for line, (dicom, study, patient, split) in rows:
            # Paths are made of these ids, so nothing but ids may pass.
            ids = (
                _DICOM.fullmatch(dicom) and _STUDY.fullmatch(study) and _SUBJECT.fullmatch(patient)
            )
            if not ids:
                self._bad(
                    path,
                    line,
                    study[:64],
                    "bad-id",
                    "dicom_id, study_id or subject_id is malformed",
                )
            elif split not in SPLITS:
                self._bad(path, line, study, "bad-split", f"split is none of {', '.join(SPLITS)}")
            elif dicom in seen:
                self._bad(path, line, study, "duplicate-id", f"dicom_id {dicom} stands twice")
            else:
                seen.add(dicom)
                known = studies.setdefault(study, (patient, split, []))
                if known[:2] == (patient, split):
                    known[2].append(dicom)
                else:
                    self._bad(
                        path, line, study, "conflicting-row", "another subject_id or split above"
                    )
        return studies

    def _read_metadata(self, path: str) -> _Metadata:
        columns = ("dicom_id", "ViewPosition", "StudyDate", "StudyTime")
        rows = tqdm(csv_rows(path, columns, _REMEDY), "metadata", disable=None, leave=False)
        views: _Metadata = {}
        for line, (dicom, view, date, time) in rows:
            if dicom in views:
                self._bad(path, line, dicom[:64], "duplicate-id", "dicom_id stands twice")
            else:
                views[dicom] = (view.upper(), date.removesuffix(".0"), time)
        return views

    def _read_labels(self, path: str) -> _LabelTable:
        rows = tqdm(
            csv_rows(path, ("study_id", *FINDINGS), _REMEDY), "labels", disable=None, leave=False
        )
        labels: _LabelTable = {}
        for line, (study, *values) in rows:
            if study in labels:
                self._bad(path, line, study[:64], "duplicate-id", "study_id stands twice")
            elif not all(value in _VALUES for value in values):
                self._bad(
                    path,
                    line,
                    study[:64],
                    "bad-label",
                    "a label is none of 1.0, 0.0, -1.0 and empty",
                )
                labels[study] = ()
            else:
                labels[study] = tuple(_VALUES[value] for value in values)
        return labels

    def _when(self, study: str) -> tuple[str, float]:
        """(date, time) of a study's first image; times are HHMMSS.fff with leading zeros
        missing."""
        _, date, time = self._metadata.get(self._studies[study][2][0], ("", "", ""))
        try:
            return date, float(time)
        except ValueError:
            return date, 0.0

    def _in_order(self) -> list[str]:
        return sorted(
            self._studies, key=lambda study: (self._studies[study][0], *self._when(study), study)
        )

    def _frontal(self, dicoms: list[str]) -> list[str]:
        views = {dicom: self._metadata.get(dicom, ("", "", ""))[0] for dicom in dicoms}
        frontal = [dicom for dicom in dicoms if views[dicom] in FRONTAL_VIEWS]
        if not frontal and self.blank_view == "stand-in":
            frontal = [dicom for dicom in dicoms if not views[dicom]]
        return frontal

    def _study(self, study: str) -> Study:
        patient, split, dicoms = self._studies[study]
        folder = f"files/p{patient[:2]}/p{patient}/s{study}"
        values = self._labels.get(study)
        if values == ():
            raise RecordError(
                "bad-label", f"see the row of the study in {Path(self.labels_path).name}"
            )
        frontal = self._frontal(dicoms)
        if not frontal:
            raise RecordError(
                "no-frontal-image", f"{len(dicoms)} image(s), none frontal by ViewPosition"
            )
        text = read_report(f"{self.path}/{folder}.txt")
        report = parse_report(text, self.sections)
        known = zip(FINDINGS, values or (), strict=bool(values))
        return Study(
            study_id=f"s{study}",
            patient_id=f"p{patient}",
            report=report,
            images=tuple(ImageRef(f"{folder}/{dicom}.jpg", self.image_root) for dicom in frontal),
            labels={name: value for name, value in known if value is not None},
            split=split,
            date=self._when(study)[0],
            indication=indication(text),
        )

    def _records(self) -> Iterator[Study]:
        self.rejected.extend(self._bad_rows)
        self.read = len(self._bad_rows)
        for study in self._order:
            self.read += 1
            try:
                record = self._study(study)
            except RecordError as error:
                patient = self._studies[study][0]
                file = f"{self.path}/files/p{patient[:2]}/p{patient}/s{study}.txt"
                self._reject(file, None, f"s{study}", error.reason, error.detail)
                continue
            yield record

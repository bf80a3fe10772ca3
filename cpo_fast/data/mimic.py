"""MIMIC-CXR-JPG 2.x in PhysioNet's layout, with the reports of MIMIC-CXR beside the study folders.

    files/p10/p10000032/s50414267/<dicom_id>.jpg     files/p10/p10000032/s50414267.txt
    mimic-cxr-2.0.0-{split,metadata,chexpert|negbio}.csv.gz

The three tables are read into an index (`mimic_index`), the reports one at a time while iterating.
Studies are ordered by (patient, date, time, study).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from cpo_fast.data.files import read_report
from cpo_fast.data.mimic_index import BAD_ROW, BLANK, FRONTAL, NOT_MENTIONED, load_index
from cpo_fast.data.sections import indication, parse_report
from cpo_fast.data.source import StudySource
from cpo_fast.errors import DataError, RecordError
from cpo_fast.types import FINDINGS, SPLITS, ImageRef, Origin, Study

LABELLERS = ("chexpert", "negbio")

IMAGE_SUFFIXES = (".jpg", ".png", ".dcm")
"""MIMIC-CXR-JPG's format, a common format of downscaled copies, and MIMIC-CXR's DICOM."""


def find_table(folder: str, name: str) -> str | None:
    """The path of `mimic-cxr-2.x.x-{name}.csv[.gz]` in `folder`, or None."""
    # An exact match: mimic-cxr-2.1.0-test-set-labeled.csv is a different table.
    wanted = re.compile(rf"mimic-cxr-2\.\d+\.\d+-{name}\.csv(\.gz)?")
    found = sorted(Path(folder).glob(f"mimic-cxr-2.*-{name}.csv*"))
    return next((str(path) for path in found if wanted.fullmatch(path.name)), None)


def looks_like(folder: str) -> bool:
    """Whether `folder` has any table of MIMIC-CXR-JPG."""
    return any(find_table(folder, name) for name in ("split", "metadata", *LABELLERS))


def _required(folder: str, *names: str) -> str:
    for name in names:
        if path := find_table(folder, name):
            return path
    listed = " or ".join(f"mimic-cxr-2.0.0-{name}.csv.gz" for name in names)
    raise DataError(f"{folder}: no {listed}; MIMIC-CXR-JPG puts it beside the folder files/")


class MimicSource(StudySource):
    """Studies of a MIMIC-CXR-JPG folder.

    `sections` names the rule of `parse_report`. `image_root` is the folder of files/ where the
    images are elsewhere (a downscaled copy, for example). A study without a row of labels has empty
    labels. Rows that repeat or contradict another and studies
    without a report or a frontal view are set aside. Raises DataError for a missing folder,
    table or column.
    """

    def __init__(
        self,
        path: str,
        *,
        sections: str = "careful",
        image_root: str | None = None,
    ) -> None:
        super().__init__("mimic-cxr", path)
        self.sections = sections
        self.image_root = path if image_root is None else image_root
        self.labels_path = _required(path, *LABELLERS)
        self._index = load_index(
            _required(path, "split"), _required(path, "metadata"), self.labels_path
        )
        self._suffix = self._image_suffix()

    def __len__(self) -> int:
        """Number of studies in the split table, including those set aside later."""
        return len(self._index)

    def _folder(self, place: int) -> str:
        patient = str(self._index.patient[place])
        return f"files/p{patient[:2]}/p{patient}/s{self._index.study[place]}"

    def _image_suffix(self) -> str:
        """The suffix of the first image found; all images are assumed to have it."""
        for place in range(min(len(self), 100)):
            image = f"{self._folder(place)}/{self._dicom(int(self._index.first[place]))}"
            for suffix in IMAGE_SUFFIXES:
                if Path(self.image_root, image + suffix).is_file():
                    return suffix
        return IMAGE_SUFFIXES[0]

    def _dicom(self, image: int) -> str:
        return bytes(self._index.dicom[image]).decode()

    def _frontal(self, place: int) -> list[int]:
        first, end = int(self._index.first[place]), int(self._index.first[place + 1])
        views = self._index.view[first:end].tolist()
        frontal = [first + i for i, view in enumerate(views) if view == FRONTAL]
        if not frontal:  # images without a ViewPosition stand in
            frontal = [first + i for i, view in enumerate(views) if view == BLANK]
        if not frontal:
            raise RecordError(
                "no-frontal-image", f"{len(views)} image(s), none frontal by ViewPosition"
            )
        return frontal

    def _study(self, place: int) -> Study:
        index, folder = self._index, self._folder(place)
        if index.labelled[place] == BAD_ROW:
            raise RecordError(
                "bad-label", f"see the row of the study in {Path(self.labels_path).name}"
            )
        frontal = self._frontal(place)
        report = f"{self.path}/{folder}.txt"
        text = read_report(report)
        known = zip(FINDINGS, index.labels[place].tolist(), strict=True)
        return Study(
            study_id=f"s{index.study[place]}",
            patient_id=f"p{index.patient[place]}",
            report=parse_report(text, self.sections),
            images=tuple(
                ImageRef(f"{folder}/{self._dicom(image)}{self._suffix}", self.image_root)
                for image in frontal
            ),
            labels={name: value for name, value in known if value != NOT_MENTIONED},
            split=SPLITS[index.split[place]],
            date=bytes(index.date[place]).decode(),
            indication=indication(text),
            origin=Origin(report),
        )

    def _records(self) -> Iterator[Study]:
        self.rejected.extend(self._index.bad)
        self.read = len(self._index.bad)
        for place in range(len(self)):
            self.read += 1
            try:
                record = self._study(place)
            except RecordError as error:
                folder = self._folder(place)
                id = folder.rpartition("/")[2]
                self._reject(f"{self.path}/{folder}.txt", None, id, error.reason, error.detail)
                continue
            yield record

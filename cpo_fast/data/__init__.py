"""Stage 1: files -> Study, or Preference from a preference file.

The format is detected automatically; files are streamed.
"""

from __future__ import annotations

from pathlib import Path

from cpo_fast.data import mimic, openi
from cpo_fast.data.mimic import MimicSource
from cpo_fast.data.openi import OpenISource
from cpo_fast.data.preferences import (
    PREFERENCE_FORMATS,
    PreferenceSource,
    is_preference_file,
    open_preferences,
)
from cpo_fast.data.sections import RULES
from cpo_fast.data.source import StudySource
from cpo_fast.errors import DataError, UsageError

STUDY_FORMATS = ("auto", "mimic-cxr", "open-i")
DATASET_FORMATS = tuple(dict.fromkeys((*STUDY_FORMATS, *PREFERENCE_FORMATS)))


def _holds_xml(folder: str) -> bool:
    return next(Path(folder).rglob("*.xml"), None) is not None


def study_format(dataset: str) -> str:
    """ "mimic-cxr" or "open-i". Raises UsageError when `dataset` is missing, DataError when it is
    empty or neither."""
    if dataset == "open-i":
        return "open-i"
    if not Path(dataset).exists():
        raise UsageError(
            f"--dataset {dataset}: no such file or folder; give a preference file, a "
            "MIMIC-CXR-JPG folder or the name open-i"
        )
    if Path(dataset).is_file():
        if dataset.endswith((".tgz", ".tar.gz")):
            return "open-i"
        raise DataError(
            f"{dataset}: not a data set of studies; give a MIMIC-CXR-JPG folder or open-i"
        )
    if not Path(dataset).is_dir():
        raise DataError(f"{dataset}: is a device or pipe; give a folder")
    if not any(Path(dataset).iterdir()):
        raise DataError(
            f"{dataset}: the folder is empty; put the data set there or give another folder"
        )
    if mimic.looks_like(dataset):
        return "mimic-cxr"
    if _holds_xml(dataset):
        return "open-i"
    raise DataError(
        f"{dataset}: unknown format; a MIMIC-CXR-JPG folder holds mimic-cxr-2.0.0-split.csv.gz and "
        f"files/, an Open-I folder holds the XML reports"
    )


def study_kind(dataset: str, dataset_format: str = "auto") -> str:
    """As `study_format`; an explicit format is only checked for an existing path."""
    if dataset_format == "auto":
        return study_format(dataset)
    if dataset_format == "open-i" and dataset != "open-i" and not Path(dataset).exists():
        raise UsageError(
            f"{dataset}: no such file or folder; give Open-I's .tgz or folder, or the name open-i"
        )
    if dataset_format == "mimic-cxr" and not Path(dataset).is_dir():
        raise UsageError(
            f"{dataset}: no such folder; give the folder that holds mimic-cxr-2.0.0-split.csv.gz"
        )
    return dataset_format


def open_studies(
    dataset: str,
    *,
    dataset_format: str = "auto",
    sections: str = "careful",
    image_root: str | None = None,
) -> StudySource:
    """The studies of `dataset`: a MIMIC-CXR-JPG folder, "open-i", or Open-I's .tgz or folder of XML
    files.

    `dataset_format` sets the format, `sections` is the rule of `sections.parse_report`,
    `image_root` is the folder of Open-I's PNG files, or the folder of MIMIC-CXR-JPG's files/ if the
    images are not in the data set.
    Returns an iterable of Study with `kind`, `path`, `read` and `rejected`. Raises UsageError for
    an unknown name or a missing path, and DataError for an unreadable data set, possibly while
    iterating.
    """
    if dataset_format not in STUDY_FORMATS:
        raise UsageError(
            f"--dataset_format must be one of {', '.join(STUDY_FORMATS)}, not {dataset_format!r}"
        )
    if sections not in RULES:
        raise UsageError(f"--sections must be one of {', '.join(RULES)}, not {sections!r}")
    if image_root is not None and not Path(image_root).is_dir():
        raise DataError(
            f"{image_root}: --image_root is not a folder; give the one that holds the images"
        )
    if study_kind(dataset, dataset_format) == "open-i":
        path = "" if dataset == "open-i" else dataset
        return openi.OpenISource(path, sections=sections, image_root=image_root)
    return mimic.MimicSource(dataset, sections=sections, image_root=image_root)


__all__ = [
    "DATASET_FORMATS",
    "STUDY_FORMATS",
    "MimicSource",
    "OpenISource",
    "PreferenceSource",
    "StudySource",
    "is_preference_file",
    "open_preferences",
    "open_studies",
    "study_format",
    "study_kind",
]

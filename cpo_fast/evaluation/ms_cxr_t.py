"""MS-CXR-T (temporal image classification): its reader and both protocols of top-1 accuracy.

Protocol A: whether the right class is chosen out of improving, stable and worsening. Micro is the
share of right cases; macro is the mean of the per-class shares over the classes that occur.
Protocol B: whether the generated diagnosis names a finding that has a progression label and so is
present. The paper (arXiv 2505.13081) does not say which one it used; every figure here names its
protocol.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpo_fast.counting import counted
from cpo_fast.errors import DataError, RecordError, UsageError
from cpo_fast.evaluation.bootstrap import estimate, group_weights
from cpo_fast.evaluation.csv_sets import read_csv
from cpo_fast.types import RejectedRecord

FINDINGS = {
    "consolidation": "Consolidation",
    "edema": "Edema",
    "pleural_effusion": "Pleural Effusion",
    "pneumonia": "Pneumonia",
    "pneumothorax": "Pneumothorax",
}
CLASSES = ("improving", "stable", "worsening")
PROTOCOL_A = "A: improving, stable or worsening, by the likelihood of three sentences"
PROTOCOL_B = "B: the finding is named by the generated diagnosis; only labelled, so present, cases"
IDS = ("subject_id", "study_id", "dicom_id", "previous_study_id", "previous_dicom_id")


@dataclass(frozen=True)
class TemporalCase:
    """One pair of images; `progression` maps each labelled finding to one of CLASSES."""

    subject_id: str
    study_id: str
    dicom_id: str
    previous_study_id: str
    previous_dicom_id: str
    progression: Mapping[str, str]


def is_ms_cxr_t(columns: Sequence[str]) -> bool:
    return {"dicom_id", "previous_dicom_id"} <= set(columns)


def read_ms_cxr_t(path: Path) -> tuple[list[TemporalCase], list[RejectedRecord]]:
    """Usable rows of MS_CXR_T_temporal_image_classification_v1.0.0.csv in order, and rejected rows.

    A row is rejected if a progression is not one of CLASSES, or if it has none. Raises DataError
    for a missing column or no usable row.
    """
    columns, rows = read_csv(path)
    wanted = [*IDS, *(f"{name}_progression" for name in FINDINGS)]
    if missing := [name for name in wanted if name not in columns]:
        raise DataError(
            f"{path} lacks the columns {', '.join(missing)} of MS-CXR-T; check that it is its table"
        )
    cases: list[TemporalCase] = []
    rejected: list[RejectedRecord] = []
    for line, row in enumerate(rows, start=2):
        ids = {name: row[name].strip() for name in IDS}
        try:
            cases.append(TemporalCase(**ids, progression=_progression(row)))
        except RecordError as error:
            rejected.append(
                RejectedRecord(str(path), line, ids["study_id"], error.reason, error.detail)
            )
    if not cases:
        raise DataError(
            f"{path} has no usable row with a progression label ({len(rejected)} set aside)"
        )
    return cases, rejected


def _progression(row: Mapping[str, str]) -> dict[str, str]:
    labels = {}
    for column, name in FINDINGS.items():
        value = row[f"{column}_progression"].strip().lower()
        if value and value not in CLASSES:
            raise RecordError(
                "progression-value", f"{column}_progression is not {', '.join(CLASSES)} or blank"
            )
        if value:
            labels[name] = value
    if not labels:
        raise RecordError("no-progression-label")
    return labels


def progression_accuracy(
    cases: Sequence[TemporalCase],
    predicted: Sequence[Mapping[str, str]],
    *,
    bootstrap: int = 1000,
    seed: int = 42,
) -> dict[str, Any]:
    """Protocol A: {"protocol", "micro" and "macro" (means over findings), "findings" {name:
    {"cases", "micro", "macro"}}}; intervals by bootstrap over patients.

    `predicted[i]` maps the labelled findings of case i to one of CLASSES. Raises UsageError for
    unequal lengths or no case.
    """
    weights = _weights(cases, predicted, bootstrap, seed)
    table = {}
    for name in FINDINGS.values():
        truth = np.array([case.progression.get(name, "") for case in cases])
        right = truth == np.array([one.get(name, "-") for one in predicted])
        micro = _share(right, truth != "", weights)
        classes = [_share(right, truth == c, weights) for c in CLASSES if (truth == c).any()]
        masked = np.ma.masked_invalid(classes or [np.full(len(weights), np.nan)])
        macro = masked.mean(axis=0).filled(np.nan)  # over the classes in the resample
        table[name] = (int((truth != "").sum()), micro, macro)
    return _summary(PROTOCOL_A, table, ("micro", "macro"))


def presence_accuracy(
    cases: Sequence[TemporalCase],
    parsed: Sequence[Sequence[str] | None],
    *,
    bootstrap: int = 1000,
    seed: int = 42,
) -> dict[str, Any]:
    """Protocol B: {"protocol", "top_1" (mean over findings), "findings" {name: {"cases", "top_1"}}}

    An answer that cannot be parsed (None) names no finding. Intervals and errors as protocol A.
    """
    weights = _weights(cases, parsed, bootstrap, seed)
    table = {}
    for name in FINDINGS.values():
        labelled = np.array([name in case.progression for case in cases])
        named = np.array([name in (names or ()) for names in parsed])
        table[name] = (int(labelled.sum()), _share(named, labelled, weights))
    return _summary(PROTOCOL_B, table, ("top_1",))


def _weights(
    cases: Sequence[TemporalCase], answers: Sequence[Any], bootstrap: int, seed: int
) -> np.ndarray:
    """[1 + bootstrap, N]: ones for the point estimate, then weights of resampled patients."""
    if len(cases) != len(answers):
        raise UsageError(f"{counted(len(cases), 'case')}, but {counted(len(answers), 'answer')}")
    if not cases:
        raise UsageError("no case to evaluate")
    drawn = group_weights([case.subject_id for case in cases], bootstrap, seed)
    return np.vstack([np.ones(len(cases)), drawn])


def _share(right: np.ndarray, among: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted share of `right` in `among` for each row of `weights`; NaN if `among` is empty."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((weights @ (right & among)) / (weights @ among))


def _summary(
    protocol: str, table: Mapping[str, tuple[Any, ...]], names: Sequence[str]
) -> dict[str, Any]:
    known = [values for cases, *values in table.values() if cases]
    result: dict[str, Any] = {"protocol": protocol}
    for k, name in enumerate(names):
        means = np.mean([values[k] for values in known], axis=0)
        result[name] = estimate(means[0], means[1:])
    result["findings"] = {
        finding: {"cases": cases}
        | {name: estimate(v[0], v[1:]) for name, v in zip(names, values, strict=True)}
        for finding, (cases, *values) in table.items()
    }
    return result

"""Accuracy of the diagnosis per finding, with bootstrap intervals, from finding names.

Protocol B: whether the *presence* of each finding, parsed from the generated answer, is right. An
answer that cannot be parsed (None) is wrong on every finding: a false negative where the finding is
present, not a true negative where it is absent. The number of such answers is reported. Macro
figures average over the findings that occur; micro figures pool all findings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cpo_fast.counting import counted
from cpo_fast.data.labels import LABEL_NAMES
from cpo_fast.errors import UsageError
from cpo_fast.evaluation.bootstrap import estimate, group_weights, study_weights

PROTOCOL = (
    "B: presence of each finding, parsed from the generated diagnosis; an answer that cannot be "
    "parsed is wrong on every finding; macro means over the findings that occur in these studies; "
    "95 % intervals by bootstrap over studies"
)
METRICS = ("accuracy", "sensitivity", "specificity", "precision", "f1")

Names = Sequence[str]
Counts = dict[str, np.ndarray]


def classification(
    truth: Sequence[Names],
    predicted: Sequence[Names | None],
    *,
    findings: Names = LABEL_NAMES,
    bootstrap: int = 1000,
    seed: int = 42,
) -> dict[str, Any]:
    """Figures of N studies: finding names in `truth[i]` and `predicted[i]` (None: unparsable).

    Returns {"studies", "unparsable", "exact_match", "macro", "micro", "findings"}. A figure is
    {"value": x, "interval": [low, high]}, both None where undefined (sensitivity without a case,
    precision without a prediction). "macro" and "micro" map the METRICS to figures. "findings" maps
    every name to "support" (true cases), "predicted" (times named), "true_positives" and its own
    METRICS.

    Raises UsageError for unequal lengths, no study, or names outside `findings`.
    """
    cells = _confusion(truth, predicted, findings)
    counts = _count(cells, np.ones((1, len(truth))))
    point, draws = _metrics(counts, _occurring(cells)), _resample(cells, bootstrap, seed)
    per_finding = {}
    for column, name in enumerate(findings):
        per_finding[name] = {
            "support": int(cells["positive"][:, column].sum()),
            "predicted": int((counts["tp"] + counts["fp"])[0, column]),
            "true_positives": int(counts["tp"][0, column]),
        } | {m: estimate(point[m][0, column], draws[m][:, column]) for m in METRICS}
    return {
        "studies": len(truth),
        "unparsable": sum(names is None for names in predicted),
        "exact_match": estimate(point["exact_match"][0], draws["exact_match"]),
        "macro": {m: estimate(point[f"macro_{m}"][0], draws[f"macro_{m}"]) for m in METRICS},
        "micro": {m: estimate(point[f"micro_{m}"][0], draws[f"micro_{m}"]) for m in METRICS},
        "findings": per_finding,
    }


def difference(
    truth: Sequence[Names],
    first: Sequence[Names | None],
    second: Sequence[Names | None],
    *,
    findings: Names = LABEL_NAMES,
    bootstrap: int = 1000,
    seed: int = 42,
) -> dict[str, Any]:
    """Figures of `second` minus those of `first` on the same studies; bootstrap paired by study.

    Returns {"exact_match", "accuracy", "sensitivity", ..., "f1"} (macro means), "micro_f1" (pooled)
    and "findings" {name: {"accuracy", "f1"}}, all as figures.
    """
    sides = []
    for predicted in (first, second):
        cells = _confusion(truth, predicted, findings)
        point = _metrics(_count(cells, np.ones((1, len(truth)))), _occurring(cells))
        sides.append((point, _resample(cells, bootstrap, seed)))
    (before, before_draws), (after, after_draws) = sides
    keys = {"exact_match": "exact_match"} | {m: f"macro_{m}" for m in METRICS}
    keys["micro_f1"] = "micro_f1"
    figures: dict[str, Any] = {
        name: estimate(after[key][0] - before[key][0], after_draws[key] - before_draws[key])
        for name, key in keys.items()
    }
    change = {m: (after[m] - before[m])[0] for m in ("accuracy", "f1")}
    draws = {m: after_draws[m] - before_draws[m] for m in change}
    figures["findings"] = {
        name: {m: estimate(change[m][column], draws[m][:, column]) for m in change}
        for column, name in enumerate(findings)
    }
    return figures


def majority_guess(training: Sequence[Names], *, findings: Names = LABEL_NAMES) -> tuple[str, ...]:
    """The findings that more than half of the training studies have: a baseline without images."""
    if not training:
        raise UsageError("no training study for the majority guess")
    present = _indicators(training, findings).mean(axis=0)
    return tuple(name for name, share in zip(findings, present, strict=True) if share > 0.5)


def auc(
    truth: Sequence[Names],
    scores: np.ndarray,
    *,
    findings: Names = LABEL_NAMES,
    patients: Sequence[str] | None = None,
    bootstrap: int = 1000,
    seed: int = 42,
) -> dict[str, Any]:
    """Area under the ROC curve of `scores` [N, findings] per finding and their mean ("macro").

    Undefined (None), and left out of the mean, for a finding that all or none of the studies have.
    Intervals by bootstrap over `patients` ([N] names), or over studies if `patients` is None.
    Raises UsageError for scores of another shape or with NaN, or unequal lengths.
    """
    from sklearn.metrics import roc_auc_score

    scores = np.asarray(scores, dtype=np.float64)
    present = _indicators(truth, findings)
    if scores.shape != present.shape:
        raise UsageError(
            f"scores are {list(scores.shape)}, expected {list(present.shape)} (studies x findings)"
        )
    if not np.isfinite(scores).all():
        raise UsageError("scores contain NaN or infinity")
    if patients is not None and len(patients) != len(truth):
        studies = counted(len(truth), "study", "studies")
        raise UsageError(f"{studies}, but {counted(len(patients), 'patient')}")
    groups = range(len(truth)) if patients is None else patients
    weights = group_weights(groups, bootstrap, seed)
    values = np.full(len(findings), np.nan)
    draws = np.full((bootstrap, len(findings)), np.nan)
    for column in range(len(findings)):
        target = present[:, column]
        if 0 < target.sum() < len(target):
            values[column] = roc_auc_score(target, scores[:, column])
            draws[:, column] = _weighted_auc(target, scores[:, column], weights)
    per_finding = {
        name: estimate(values[column], draws[:, column]) for column, name in enumerate(findings)
    }
    defined = ~np.isnan(values)
    mean = values[defined].mean() if defined.any() else np.nan
    means = np.ma.masked_invalid(draws[:, defined]).mean(axis=1).filled(np.nan)
    return {"macro": estimate(mean, means), "findings": per_finding}


def _indicators(names: Sequence[Names | None], findings: Names) -> np.ndarray:
    """[N, findings] bool; a None row is all False."""
    column = {name: i for i, name in enumerate(findings)}
    table = np.zeros((len(names), len(findings)), dtype=bool)
    for row, present in enumerate(names):
        for name in present or ():
            if name not in column:
                raise UsageError(
                    f"study {row} has the label {name!r}, which is not one of the "
                    f"{len(findings)} findings under evaluation: {', '.join(findings)}"
                )
            table[row, column[name]] = True
    return table


def _confusion(
    truth: Sequence[Names], predicted: Sequence[Names | None], findings: Names
) -> dict[str, np.ndarray]:
    """Per study and finding: truth and the four cells of the confusion matrix, [N, F] float64;
    "exact" [N].
    """
    if len(truth) != len(predicted):
        studies = counted(len(truth), "study", "studies")
        raise UsageError(f"{studies}, but {counted(len(predicted), 'answer')}")
    if not truth:
        raise UsageError("no study to evaluate: the split is empty")
    positive, named = _indicators(truth, findings), _indicators(predicted, findings)
    parsed = np.array([names is not None for names in predicted])
    cells = {
        "positive": positive,
        "tp": positive & named,
        "fp": ~positive & named,
        "fn": positive & ~named,
        "tn": ~positive & ~named & parsed[:, None],
        "exact": (positive == named).all(axis=1) & parsed,
    }
    return {name: cell.astype(np.float64) for name, cell in cells.items()}


def _occurring(cells: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(cells["positive"].any(axis=0))


def _count(cells: dict[str, np.ndarray], weights: np.ndarray) -> Counts:
    """Weighted sums over studies: cells, "positive" and "all" [B, F]; "exact" [B] as a share."""
    total = weights.sum(axis=1, keepdims=True)
    counts = {name: weights @ cells[name] for name in ("tp", "fp", "fn", "tn", "positive")}
    counts["all"] = np.broadcast_to(total, counts["tp"].shape)
    counts["exact"] = (weights @ cells["exact"]) / total[:, 0]
    return counts


def _metrics(counts: Counts, occurring: np.ndarray) -> Counts:
    """METRICS [B, F], "macro_*" and "micro_*" [B], "exact_match" [B]; NaN where undefined."""
    result = _ratios(counts)
    summed = {name: counts[name].sum(axis=1) for name in counts if name != "exact"}
    result.update({f"micro_{name}": value for name, value in _ratios(summed).items()})
    for name in METRICS:
        # A finding never named has no precision; the mean counts it as 0, as scikit-learn does.
        values = result[name][:, occurring]
        values = np.nan_to_num(values) if name == "precision" else values
        valid = ~np.isnan(values)
        with np.errstate(invalid="ignore"):
            result[f"macro_{name}"] = np.where(valid, values, 0).sum(axis=1) / valid.sum(axis=1)
    result["exact_match"] = counts["exact"]
    return result


def _ratios(counts: Counts) -> Counts:
    tp, fp, fn, tn = (counts[name] for name in ("tp", "fp", "fn", "tn"))
    positive, everyone = counts["positive"], counts["all"]
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "accuracy": (tp + tn) / everyone,
            "sensitivity": tp / positive,
            "specificity": tn / (everyone - positive),
            "precision": tp / (tp + fp),
            "f1": 2 * tp / (2 * tp + fp + fn),
        }


def _resample(cells: dict[str, np.ndarray], bootstrap: int, seed: int) -> Counts:
    weights = study_weights(len(cells["exact"]), bootstrap, seed)
    return _metrics(_count(cells, weights), _occurring(cells))


def _weighted_auc(target: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUC under each row of `weights` [B, N]: the Mann-Whitney statistic, ties counted one half."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) != 0])
    positive = np.add.reduceat((weights * target)[:, order], starts, axis=1)
    negative = np.add.reduceat((weights * ~target)[:, order], starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    won = (positive * (below + 0.5 * negative)).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return won / (positive.sum(axis=1) * negative.sum(axis=1))

"""Accuracy of the diagnosis per finding, with bootstrap intervals; names in, figures out.

The protocol is (B): is each finding's *presence*, as parsed from the generated answer, right? An
answer that cannot be parsed is None here. It is wrong on every finding (a missed one where the
finding is present, no true negative where it is absent), and how many there were is stated beside
the figures. Macro means are over the findings that occur; micro figures pool all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cpo_fast.data.labels import LABEL_NAMES
from cpo_fast.errors import UsageError

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
    """Figures for N studies: finding names in `truth[i]` and `predicted[i]` (None: unparsable).

    Returns {"studies", "unparsable", "exact_match", "macro", "micro", "findings"}. A figure is
    {"value": x, "interval": [low, high]}; value and interval are None where it is undefined
    (sensitivity without a case, precision without a prediction). "macro" and "micro" map the
    METRICS to figures; "findings" maps every name to "support" (true cases), "predicted" (times
    named), "true_positives" and its own METRICS.

    Raises UsageError for unequal lengths, no study, or names outside `findings`.
    """
    correct = _confusion(truth, predicted, findings)
    point = _metrics(_counts(correct, np.ones((1, len(truth)))), _occurring(correct))
    spread = _resampled(correct, bootstrap, seed)
    per_finding = {}
    counts = _counts(correct, np.ones((1, len(truth))))
    for column, name in enumerate(findings):
        per_finding[name] = {
            "support": int(correct["positive"][:, column].sum()),
            "predicted": int((counts["tp"] + counts["fp"])[0, column]),
            "true_positives": int(counts["tp"][0, column]),
        } | {m: figure(point[m][0, column], spread[m][:, column]) for m in METRICS}
    return {
        "studies": len(truth),
        "unparsable": sum(names is None for names in predicted),
        "exact_match": figure(point["exact_match"][0], spread["exact_match"]),
        "macro": {m: figure(point[f"macro_{m}"][0], spread[f"macro_{m}"]) for m in METRICS},
        "micro": {m: figure(point[f"micro_{m}"][0], spread[f"micro_{m}"]) for m in METRICS},
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
    """How much `second` is better than `first` on the same studies: paired bootstrap over studies.

    Returns {"exact_match", "accuracy", "sensitivity", ..., "f1"} (macro means), "micro_f1" (pooled)
    and "findings" {name: {"accuracy", "f1"}}, all as figures.
    """
    sides = []
    for predicted in (first, second):
        table = _confusion(truth, predicted, findings)
        once = _metrics(_counts(table, np.ones((1, len(truth)))), _occurring(table))
        sides.append((once, _resampled(table, bootstrap, seed)))
    (before, before_spread), (after, after_spread) = sides
    keys = {"exact_match": "exact_match"} | {m: f"macro_{m}" for m in METRICS}
    keys["micro_f1"] = "micro_f1"
    figures: dict[str, Any] = {
        name: figure(after[key][0] - before[key][0], after_spread[key] - before_spread[key])
        for name, key in keys.items()
    }
    point = {m: (after[m] - before[m])[0] for m in ("accuracy", "f1")}
    spread = {m: after_spread[m] - before_spread[m] for m in point}
    figures["findings"] = {
        name: {m: figure(point[m][column], spread[m][:, column]) for m in point}
        for column, name in enumerate(findings)
    }
    return figures


def majority_guess(training: Sequence[Names], *, findings: Names = LABEL_NAMES) -> tuple[str, ...]:
    """What more than half of the training studies have: the guess that needs no image."""
    if not training:
        raise UsageError("no training study to learn the majority guess from")
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

    Undefined (None) for a finding that all or none of the studies have; those are not in the mean.
    Intervals by bootstrap over `patients` ([N] names), or over studies where they are not given.
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
        raise UsageError(f"{len(truth)} studies, but {len(patients)} patients")
    if patients is None:
        weights = study_weights(len(truth), bootstrap, seed)
    else:
        weights = patient_weights(patients, bootstrap, seed)
    values = np.full(len(findings), np.nan)
    spread = np.full((bootstrap, len(findings)), np.nan)
    for column in range(len(findings)):
        target = present[:, column]
        if 0 < target.sum() < len(target):
            values[column] = roc_auc_score(target, scores[:, column])
            spread[:, column] = _weighted_auc(target, scores[:, column], weights)
    named = {
        name: figure(values[column], spread[:, column]) for column, name in enumerate(findings)
    }
    defined = ~np.isnan(values)
    mean = values[defined].mean() if defined.any() else np.nan
    means = np.ma.masked_invalid(spread[:, defined]).mean(axis=1).filled(np.nan)
    return {"macro": figure(mean, means), "findings": named}


def _indicators(names: Sequence[Names | None], findings: Names) -> np.ndarray:
    """[N, findings] bool; a None row is all False."""
    column = {name: i for i, name in enumerate(findings)}
    table = np.zeros((len(names), len(findings)), dtype=bool)
    for row, present in enumerate(names):
        for name in present or ():
            if name not in column:
                raise UsageError(
                    f"study {row} carries the label {name!r}, which is not one of the "
                    f"{len(findings)} findings under evaluation: {', '.join(findings)}"
                )
            table[row, column[name]] = True
    return table


def _confusion(
    truth: Sequence[Names], predicted: Sequence[Names | None], findings: Names
) -> dict[str, np.ndarray]:
    """Per study and finding: truth and the four cells [N, F] float64; `exact` [N]."""
    if len(truth) != len(predicted):
        raise UsageError(f"{len(truth)} studies, but {len(predicted)} answers")
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


def _occurring(table: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(table["positive"].any(axis=0))


def study_weights(studies: int, bootstrap: int, seed: int) -> np.ndarray:
    """How often each study is drawn: [bootstrap, N] float64, every row sums to N."""
    draw = np.random.default_rng(seed)
    return draw.multinomial(studies, np.full(studies, 1.0 / studies), bootstrap).astype(np.float64)


def _counts(table: dict[str, np.ndarray], weights: np.ndarray) -> Counts:
    """Cells summed over studies: [B, F]; "positive", "all" [B, F] too, "exact" [B] as a share."""
    total = weights.sum(axis=1, keepdims=True)
    counts = {name: weights @ table[name] for name in ("tp", "fp", "fn", "tn", "positive")}
    counts["all"] = np.broadcast_to(total, counts["tp"].shape)
    counts["exact"] = (weights @ table["exact"]) / total[:, 0]
    return counts


def _metrics(counts: Counts, occurring: np.ndarray) -> Counts:
    """METRICS [B, F], "macro_*" and "micro_*" [B], "exact_match" [B]; NaN where undefined."""
    result = _ratios(counts)
    summed = {name: counts[name].sum(axis=1) for name in counts if name != "exact"}
    result.update({f"micro_{name}": value for name, value in _ratios(summed).items()})
    for name in METRICS:
        # A finding never named has no precision; in the mean it counts 0, as in scikit-learn.
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


def _resampled(table: dict[str, np.ndarray], bootstrap: int, seed: int) -> Counts:
    weights = study_weights(len(table["exact"]), bootstrap, seed)
    return _metrics(_counts(table, weights), _occurring(table))


def patient_weights(patients: Sequence[str], bootstrap: int, seed: int) -> np.ndarray:
    """How often each study is drawn when whole patients are: [bootstrap, N] float64."""
    keys = np.unique(list(patients), return_inverse=True)[1]
    people = int(keys.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(people, np.full(people, 1 / people), bootstrap)
    return drawn[:, keys].astype(np.float64)


def figure(value: float, spread: np.ndarray) -> dict[str, Any]:
    """{"value", "interval"} of a point estimate and its bootstrap values; None where undefined."""
    if np.isnan(value):
        return {"value": None, "interval": None}
    defined = spread[~np.isnan(spread)]
    interval = [float(x) for x in np.quantile(defined, [0.025, 0.975])] if defined.size else None
    return {"value": float(value), "interval": interval}


def _weighted_auc(target: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUC under every row of `weights` [B, N]: the Mann-Whitney share, ties counting one half."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) != 0])
    positive = np.add.reduceat((weights * target)[:, order], starts, axis=1)
    negative = np.add.reduceat((weights * ~target)[:, order], starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    won = (positive * (below + 0.5 * negative)).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return won / (positive.sum(axis=1) * negative.sum(axis=1))

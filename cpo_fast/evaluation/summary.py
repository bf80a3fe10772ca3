"""The `evaluation` part of summary.json and the examples of evaluation.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from cpo_fast.counting import counted
from cpo_fast.data.labels import diagnosis, parse_answer
from cpo_fast.errors import UsageError
from cpo_fast.evaluation.classification import (
    PROTOCOL,
    classification,
    difference,
    majority_guess,
)
from cpo_fast.evaluation.text import text_metrics, thought_of
from cpo_fast.folders import write_json
from cpo_fast.types import Counterfactual, Study

MAJORITY = "majority"


def build_summary(
    *,
    truth: Sequence[Sequence[str]],
    training_truth: Sequence[Sequence[str]],
    answers: Mapping[str, Sequence[str]],
    reports: Sequence[str] | None = None,
    preference: Mapping[str, Mapping[str, Any]] | None = None,
    split: str = "test",
    bootstrap: int = 1000,
    seed: int = 42,
) -> dict[str, Any]:
    """The `evaluation` part of summary.json: figures only, no text of a patient.

    `truth[i]` are the finding names of study i (`labels.diagnosis`). `training_truth` are the names
    of the training split, for the majority guess (left out if empty). `answers` maps each model
    ("untrained", "sft", "cpo", in training order) to its N generated texts. `reports` are the N
    reference reports for the text metrics of the thoughts (left out if None). `preference` maps
    each model to the result of `summarize_preference` on held-out pairs.

    Returns {"split", "studies", "protocol", "majority_guess" [names], "classification" {name:
    figures of `classification`}, "differences" {"cpo - sft": figures of `difference`, ...} of every
    later model minus every earlier one (the majority guess is the first), "text" {name: figures of
    `text_metrics`}, "preference"}. Raises UsageError for a wrong number of answers.
    """
    parsed: dict[str, list[tuple[str, ...] | None]] = {}
    guess = majority_guess(training_truth) if training_truth else None
    if guess is not None:
        parsed[MAJORITY] = [guess] * len(truth)
    for name, texts in answers.items():
        if len(texts) != len(truth):
            studies = counted(len(truth), "study", "studies")
            raise UsageError(f"{studies}, but {counted(len(texts), 'answer')} of {name!r}")
        parsed[name] = [parse_answer(text) or None for text in texts]
    options: dict[str, Any] = {"bootstrap": bootstrap, "seed": seed}
    summary: dict[str, Any] = {
        "split": split,
        "studies": len(truth),
        "protocol": PROTOCOL,
        "majority_guess": None if guess is None else list(guess),
        "classification": {
            name: classification(truth, names, **options) for name, names in parsed.items()
        },
        "differences": {
            f"{later} - {earlier}": difference(truth, parsed[earlier], parsed[later], **options)
            for earlier, later in combinations(parsed, 2)
        },
        "text": {},
        "preference": {name: dict(figures) for name, figures in (preference or {}).items()},
    }
    if reports is not None:
        summary["text"] = {
            name: text_metrics(reports, [thought_of(text) for text in texts], **options)
            for name, texts in answers.items()
        }
    return summary


def choose_examples(
    studies: Sequence[Study],
    answers: Mapping[str, Sequence[str]],
    counterfactuals: Sequence[Counterfactual] = (),
    *,
    count: int = 4,
    uncertain: str = "negative",
) -> list[dict[str, Any]]:
    """Up to `count` studies for the report, with as many different diagnoses as possible.

    `answers[name][i]` belongs to `studies[i]`. Each example is {"study_id", "image" (absolute path
    or None), "report", "labels", "counterfactual", "target", "answers" {name: text}}. The
    counterfactual is the first of `counterfactuals` for the study, else None; studies with one come
    first. The texts are patient data: `write_examples` writes them with mode 0600.
    """
    of_study: dict[str, Counterfactual] = {}
    for candidate in counterfactuals:
        of_study.setdefault(candidate.study_id, candidate)
    names = [diagnosis(study.labels, uncertain=uncertain) for study in studies]
    seen: dict[tuple[str, ...], int] = {}
    ranks = []
    for index, study in enumerate(studies):
        has_counterfactual = study.study_id in of_study
        key = (*names[index], str(has_counterfactual))
        seen[key] = seen.get(key, 0) + 1
        ranks.append((not has_counterfactual, seen[key], index))
    examples = []
    for _, _, index in sorted(ranks)[:count]:
        study = studies[index]
        chosen = of_study.get(study.study_id)
        examples.append(
            {
                "study_id": study.study_id,
                "image": _image_path(study),
                "report": study.report.text,
                "labels": list(names[index]),
                "counterfactual": chosen.counterfactual if chosen else None,
                "target": chosen.target if chosen else None,
                "answers": {name: texts[index] for name, texts in answers.items()},
            }
        )
    return examples


def _image_path(study: Study) -> str | None:
    """Absolute path of the first image; None without an image or for one in memory only."""
    if not study.images or study.images[0].data is not None:
        return None
    return str((Path(study.images[0].root) / study.images[0].path).resolve())


def write_examples(
    run_dir: Path,
    examples: Sequence[Mapping[str, Any]],
    drift: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write run_dir/evaluation.json, {"examples": [...], "drift": [...]}, mode 0600.

    `drift`: probed studies for the page (`evaluation.drift.drift_example`).
    """
    path = run_dir / "evaluation.json"
    write_json(path, {"examples": list(examples), "drift": list(drift)})
    return path

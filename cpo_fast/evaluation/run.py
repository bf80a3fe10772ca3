"""Evaluate models on a cohort; returns figures, answers and examples."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cpo_fast.errors import DataError
from cpo_fast.evaluation.cohort import Cohort
from cpo_fast.evaluation.suites import Options, generate_answers, probe_drift, score_zero_shot
from cpo_fast.evaluation.summary import build_summary
from cpo_fast.model.checkpoint import Checkpoint

Load = Callable[[], Any]
"""Loads a model."""

ComparePairs = Callable[[Any], dict[str, dict[str, Any]]]
"""Loaded model -> {name: figures of `summarize_preference`}."""


@dataclass
class Evaluation:
    """Results of `evaluate`.

    `figures` is the `evaluation` part of summary.json and holds no patient text; `answers[name][i]`
    belongs to study i of the cohort after the evaluation. `failure` is the error of a suite that
    could not be computed; the other suites are complete.
    """

    figures: dict[str, Any]
    answers: dict[str, list[str]] = field(default_factory=dict)
    drift_examples: list[dict[str, Any]] = field(default_factory=list)
    failure: DataError | None = None


def evaluate(
    models: Mapping[str, Load],
    checkpoint: Checkpoint,
    cohort: Cohort,
    options: Options,
    pairs: Mapping[str, ComparePairs] | None = None,
) -> Evaluation:
    """Evaluate models that share the tokenizer and image processor of `checkpoint`.

    `models`: name -> loader, in training order; one model is in memory at a time. `pairs`: name ->
    comparison of held-out pairs by that model. A study whose image fails is rejected for all models
    (`cohort` changes). Raises DataError if no study is left.
    """
    pairs = pairs or {}
    result = Evaluation({})
    suites: dict[str, dict[str, Any]] = {"zero_shot": {}, "drift": {}}
    preference: dict[str, dict[str, Any]] = {}
    for name, load in models.items():
        if not cohort.studies and name not in pairs:
            continue
        model = load()
        if cohort.studies:
            texts, kept = generate_answers(name, model, checkpoint, cohort, options)
            for other, given in result.answers.items():
                result.answers[other] = [given[i] for i in kept]
            result.answers[name] = texts
            if "zero_shot" in options.suites:
                suites["zero_shot"][name] = score_zero_shot(
                    model, checkpoint, cohort, texts, options
                )
            if "drift" in options.suites:
                try:
                    suites["drift"][name], examples = probe_drift(
                        name, model, checkpoint, cohort, texts, options
                    )
                    result.drift_examples += examples
                except DataError as error:
                    result.failure = error
        if name in pairs:
            preference |= pairs[name](model)
        del model
        gc.collect()
    if cohort.studies and options.suites:
        result.figures = summarize(cohort, result.answers, options, preference)
    elif pairs:
        result.figures = {"preference": preference}
    result.figures |= {suite: figures for suite, figures in suites.items() if figures}
    return result


def summarize(
    cohort: Cohort,
    answers: Mapping[str, list[str]],
    options: Options,
    preference: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The figures of the generated answers for the suites in `options`."""
    figures = build_summary(
        truth=cohort.truth,
        training_truth=cohort.training_truth,
        answers=answers,
        reports=[study.report.text for study in cohort.studies],
        preference=preference,
        split=options.split,
        bootstrap=options.bootstrap,
        seed=options.seed,
    )
    if "classification" not in options.suites:
        del figures["classification"], figures["differences"]
    if "report" not in options.suites:
        del figures["text"]
    return figures

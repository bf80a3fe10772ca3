"""Studies -> counterfactuals: labels, targets, rewriting, checks and retries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from cpo_fast.concepts.labeller import (
    label_report,
    merge_labels,
    opposed,
    sentence_mentions,
    sentences,
)
from cpo_fast.counterfactual.checks import check
from cpo_fast.counterfactual.rewrite import rewrite
from cpo_fast.counterfactual.targets import choose_targets
from cpo_fast.counterfactual.wording import WORDINGS
from cpo_fast.data.labels import diagnosis
from cpo_fast.errors import UsageError
from cpo_fast.types import ConceptGraph, Counterfactual, Labels, Report, Study

ATTEMPTS = 4
"""Wordings and places tried before a counterfactual is set aside."""

GENERATORS = ("graph",)


def study_labels(study: Study) -> Labels:
    """The labels that the diagnosis of a study is made from.

    Its own where it has any. A study without labels (a report that Open-I's indexers left out)
    takes the labeller's. Labels that name Emphysema come from those indexers, who marked nine
    findings: the other names (fracture, lesion, devices, ...) are filled in by the labeller.
    """
    return _filled(study, label_report(study.report.text))


def _filled(study: Study, stated: Labels) -> Labels:
    """The labels of a study whose own leave names out; `stated` is what its text says."""
    if study.labels and "Emphysema" not in study.labels:
        return study.labels
    labels = {**stated, **study.labels}
    others = (n for n in labels if n not in ("No Finding", "Support Devices"))
    labels["No Finding"] = 1 if all(labels[n] not in (1, -1) for n in others) else None
    return labels


def counterfactuals(
    studies: Iterable[Study],
    graph: ConceptGraph,
    *,
    num_targets: int = 2,
    targets: Sequence[str] | None = None,
    seed: int = 42,
    generator: str = "graph",
) -> Iterator[Counterfactual]:
    """Counterfactuals of each study in turn, `num_targets` of them; failing ones too (`.passed`
    False).

    With `targets`, the first `num_targets` of them are taken. One that is present gives a record
    whose check "target_absent" is False, a report without text one whose check "report" is False;
    both have no text. Raises UsageError for an unknown generator or disease.
    """
    if generator not in GENERATORS:
        raise UsageError(f"generator {generator} is unknown; one of {', '.join(GENERATORS)}")
    if num_targets < 1:
        raise UsageError(f"num_targets must be at least 1, not {num_targets}")
    for name in targets or ():
        if name not in graph.diseases or name not in WORDINGS:
            known = ", ".join(n for n in graph.diseases if n in WORDINGS)
            raise UsageError(f"target {name} is unknown; one of {known}")
    for study in studies:
        lines = sentences(study.report.text)
        stated = merge_labels(map(sentence_mentions, lines))
        labels = _filled(study, stated)
        merged = {n: _stronger(labels.get(n), stated.get(n)) for n in {**stated, **labels}}
        if targets:
            chosen = list(targets)[:num_targets]
        else:
            against = frozenset[str]().union(*map(opposed, lines))
            chosen = choose_targets(
                graph, study.study_id, merged, stated, against, num_targets, seed
            )
        for target in chosen:
            yield _one(study, graph, labels, target, merged.get(target) == 1, seed)


def _stronger(a: int | None, b: int | None) -> int | None:
    return max(a, b, key=(None, 0, -1, 1).index)


def _one(
    study: Study, graph: ConceptGraph, labels: Labels, target: str, present: bool, seed: int
) -> Counterfactual:
    names = diagnosis(labels)
    gone = set(graph.excluded[target]) | {"No Finding"}
    text = Report()
    written = bool(study.report.findings.strip() or study.report.impression.strip())
    checks = {"report": written, "target_absent": not present}
    if all(checks.values()):
        for attempt in range(ATTEMPTS):
            text = rewrite(graph, study.report, target, study.study_id, seed, attempt)
            checks = check(graph, study.report, text, target)
            if all(checks.values()):
                break
    if graph.excluded[target]:  # what went with an excluded disease
        lost = label_report(text.text)
        gone |= {n for n, v in label_report(study.report.text).items() if v == 1 and lost[n] != 1}
    return Counterfactual(
        id=f"{study.study_id}/{target}",
        study_id=study.study_id,
        patient_id=study.patient_id,
        images=tuple(image.path for image in study.images),
        report=study.report.text,
        labels=names,
        target=target,
        counterfactual=text.text,
        counterfactual_labels=(*(n for n in names if n not in gone and n != target), target),
        seed=seed,
        checks=checks,
    )

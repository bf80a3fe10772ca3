"""Generate counterfactuals of studies: labels, targets, drafts, checks and retries."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

from cpo_fast.concepts.labeller import (
    STRENGTH,
    find_mentions,
    find_opposed,
    label_report,
    merge_labels,
    split_sentences,
)
from cpo_fast.concepts.mine import Miner
from cpo_fast.counterfactual.checks import check
from cpo_fast.counterfactual.graph.wording import TARGET_WORDINGS
from cpo_fast.counterfactual.progress import Tally
from cpo_fast.counterfactual.prompt import Task
from cpo_fast.counterfactual.targets import balance_prices, pick_targets, score_targets
from cpo_fast.counterfactual.writers import GaveUpError, GraphWriter, Writer
from cpo_fast.data.labels import diagnosis
from cpo_fast.errors import RecordError, UsageError
from cpo_fast.types import ConceptGraph, Counterfactual, Labels, Report, Study

ATTEMPTS = 4
"""Maximum number of drafts of a counterfactual."""


def study_labels(study: Study) -> Labels:
    """The labels of a study from which its diagnosis is built.

    These are its own labels, or the labeller's if it has none (reports that Open-I's indexers
    skipped). Open-I's indexers marked nine findings, among them Emphysema, which no other labels
    have: labels with Emphysema are completed by the labeller (fracture, lesion, devices, ...).
    """
    return _fill_labels(study, label_report(study.report.text))


def _fill_labels(study: Study, stated: Labels) -> Labels:
    """The study's labels, with missing names taken from `stated`, the labels of its text."""
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
    generator: str | Writer = "graph",
    prices: Mapping[str, float] | None = None,
    skip: Collection[str] = (),
) -> Iterator[Counterfactual]:
    """Yield `num_targets` counterfactuals of each study, including failed ones (`passed` False).

    They come in the order in which they are decided (a draft passes, or all attempts failed). For
    "graph", which writes one at a time, that is the order of the studies.

    `generator` is "graph" or a `Writer`. The first `num_targets` of `targets` are used if given;
    otherwise targets are chosen by score less `prices` (see `balance`). Ids in `skip` are omitted.
    A record without text has a failed check: "target_absent" (the target is present), "report" (the
    report is empty), or the reason for which the writer returned no draft. Raises UsageError for an
    unknown generator or disease.
    """
    return chain.from_iterable(
        generate_decided(
            studies,
            graph,
            num_targets=num_targets,
            targets=targets,
            seed=seed,
            generator=generator,
            prices=prices,
            skip=skip,
        )
    )


def generate_decided(
    studies: Iterable[Study],
    graph: ConceptGraph,
    *,
    num_targets: int = 2,
    targets: Sequence[str] | None = None,
    seed: int = 42,
    generator: str | Writer = "graph",
    prices: Mapping[str, float] | None = None,
    skip: Collection[str] = (),
    by_study: bool = False,
    on_draft: Callable[[Tally], None] | None = None,
) -> Iterator[list[Counterfactual]]:
    """As `counterfactuals`, in groups: a single record when it is decided, or with `by_study` all
    records of a study when the last is decided. `on_draft` is called after every draft."""
    if generator == "graph":
        generator = GraphWriter()
    if isinstance(generator, str):
        raise UsageError(
            f"generator {generator} is unknown; graph, or a writer for local and server"
        )
    if num_targets < 1:
        raise UsageError(f"num_targets must be at least 1, not {num_targets}")
    for name in targets or ():
        if name not in graph.diseases or name not in TARGET_WORDINGS:
            known = ", ".join(n for n in graph.diseases if n in TARGET_WORDINGS)
            raise UsageError(f"target {name} is unknown; one of {known}")
    entries = _open_entries(studies, graph, num_targets, targets, seed, prices or {}, skip)
    for entry in _draft(entries, graph, generator, on_draft):
        entry.decided = True
        group = entry.of_study if by_study else [entry]
        if all(one.decided for one in group):
            yield [_build_record(one, graph, generator.name) for one in group]


def balance(
    studies: Iterable[Study], graph: ConceptGraph, *, num_targets: int = 2, seed: int = 42
) -> dict[str, float]:
    """Prices for `counterfactuals` with which each disease is a target about equally often.

    `studies` must be the whole data set, whatever shard is written.
    """
    return balance_prices((read_study(study, graph, seed)[2] for study in studies), num_targets)


@dataclass(slots=True)
class _Entry:
    """A counterfactual in progress: its task, the latest draft and its checks."""

    study: Study
    labels: Labels
    task: Task
    checks: dict[str, bool]
    of_study: list[_Entry] = field(repr=False)
    text: Report = field(default_factory=Report)
    open: bool = True
    decided: bool = False


def read_study(
    study: Study, graph: ConceptGraph, seed: int
) -> tuple[Labels, Labels, dict[str, float]]:
    """(labels, labels merged with those of the text, scores of possible targets)."""
    lines = split_sentences(study.report.text)
    stated = merge_labels(map(find_mentions, lines))
    labels = _fill_labels(study, stated)
    merged = {n: _stronger(labels.get(n), stated.get(n)) for n in {**stated, **labels}}
    against = frozenset[str]().union(*map(find_opposed, lines))
    mentions = _miner(graph).mentions(study.report.text)
    asserted = [name for name in graph.attributes if mentions.get(name) == 1]
    scores = score_targets(graph, study.study_id, merged, stated, asserted, against, seed)
    return labels, merged, scores


@lru_cache(maxsize=4)
def _miner(graph: ConceptGraph) -> Miner:
    return Miner(graph)


def _open_entries(
    studies: Iterable[Study],
    graph: ConceptGraph,
    num_targets: int,
    targets: Sequence[str] | None,
    seed: int,
    prices: Mapping[str, float],
    skip: Collection[str],
) -> Iterator[_Entry]:
    for study in studies:
        labels, merged, scores = read_study(study, graph, seed)
        chosen = (
            list(targets)[:num_targets] if targets else pick_targets(scores, prices, num_targets)
        )
        written = bool(study.report.findings.strip() or study.report.impression.strip())
        of_study: list[_Entry] = []
        for target in chosen:
            if f"{study.study_id}/{target}" in skip:
                continue
            checks = {"report": written, "target_absent": merged.get(target) != 1}
            task = Task(study.report, target, study.study_id, seed)
            of_study.append(
                _Entry(study, labels, task, checks, of_study, open=all(checks.values()))
            )
        yield from of_study


def _draft(
    entries: Iterator[_Entry],
    graph: ConceptGraph,
    writer: Writer,
    on_draft: Callable[[Tally], None] | None,
) -> Iterator[_Entry]:
    """Yield each entry when it is decided: a draft passes, or all attempts failed.

    Each round drafts up to `writer.window` open entries, new ones together with retries, so that
    rounds stay full.
    """
    waiting: list[_Entry] = []
    tally = Tally()
    while True:
        new = list(islice(entries, writer.window - len(waiting)))
        waiting += [entry for entry in new if entry.open]
        for entry in new:
            if not entry.open:
                tally.set_aside += 1
                yield entry
        if not waiting and not new:
            return
        tally.open = len(waiting)
        if on_draft is not None:
            on_draft(tally)
        drafts = writer.write(graph, [entry.task for entry in waiting]) if waiting else ()
        for index, draft in drafts:
            entry = waiting[index]
            task = entry.task
            if isinstance(draft, RecordError):
                entry.text, entry.checks = Report(), {draft.reason: False}
            else:
                entry.text = draft
                entry.checks = check(graph, task.report, draft, task.target)
            failed = tuple(name for name, good in entry.checks.items() if not good)
            last = task.attempt + 1 == ATTEMPTS or isinstance(draft, GaveUpError)
            entry.open = bool(failed) and not last
            tally.drafts += 1
            if entry.open:
                entry.task = replace(task, attempt=task.attempt + 1, failed=failed)
            else:
                tally.passed += not failed
                tally.set_aside += bool(failed)
                tally.open -= 1
                yield entry
            if on_draft is not None:
                on_draft(tally)
        waiting = [entry for entry in waiting if entry.open]


def _stronger(a: int | None, b: int | None) -> int | None:
    return max(a, b, key=STRENGTH.__getitem__)


def _build_record(entry: _Entry, graph: ConceptGraph, generator: str) -> Counterfactual:
    study, target, text = entry.study, entry.task.target, entry.text
    names = diagnosis(entry.labels)
    gone = set(graph.excluded[target]) | {"No Finding"}
    if graph.excluded[target]:  # findings removed together with an excluded disease
        gone |= _find_present(study.report.text) - _find_present(text.text)
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
        generator=generator,
        seed=entry.task.seed,
        checks=entry.checks,
    )


@lru_cache(maxsize=1 << 10)
def _find_present(text: str) -> frozenset[str]:
    return frozenset(name for name, value in label_report(text).items() if value == 1)


def place_images(study: Study, folder: Path) -> Study:
    """The study with image paths relative to `folder` if they are below it, otherwise absolute."""
    home = folder.resolve()
    images = []
    for image in study.images:
        path = Path(image.root, image.path).resolve() if image.root else Path(image.path)
        path = path.relative_to(home) if path.is_relative_to(home) else path
        images.append(replace(image, path=str(path), root=""))
    return replace(study, images=tuple(images))

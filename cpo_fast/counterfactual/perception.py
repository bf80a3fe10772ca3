"""Perception counterfactuals: the study's answer with another patient's image, as in CPO++.

The answer must be wrong for the other image: the other study lacks a disease of this one or, if
this one has none, has a disease. Of such studies the nearest in asserted attributes is taken.
Method: arXiv 2604.15705. The pool holds all studies, whatever shard is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from cpo_fast.concepts.mine import Miner
from cpo_fast.counterfactual.generate import study_labels
from cpo_fast.counterfactual.seeding import hash_seed
from cpo_fast.data.labels import LABEL_NAMES, NO_FINDING, diagnosis
from cpo_fast.types import ConceptGraph, Counterfactual, ImageRef, Preference, Study

PER_KEY, AT_RANDOM = 24, 24
"""Number of candidates per attribute or finding of a study, and of random candidates."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """The part of a study kept in the pool: its attributes, diagnosis and images."""

    study_id: str
    patient_id: str
    attributes: frozenset[str]
    names: frozenset[str]
    images: tuple[ImageRef, ...]


@dataclass
class Pool:
    """All studies with an image, indexed by asserted attribute and finding."""

    rows: list[Neighbour] = field(default_factory=list)
    by_key: dict[str, list[int]] = field(default_factory=dict)

    def nearest(self, own: Neighbour, seed: int) -> Neighbour | None:
        """The nearest study by Jaccard index for whose image the answer of `own` is wrong, or None.

        Compares up to `PER_KEY` studies per key of `own` and `AT_RANDOM` others, drawn by seed and
        study id. The first drawn wins ties.
        """
        best: tuple[float, Neighbour | None] = (-1.0, None)
        for key in sorted(own.attributes | own.names):
            best = self._best(own, self.by_key.get(key, []), PER_KEY, seed, key, best)
        every = range(len(self.rows))
        best = self._best(own, every, AT_RANDOM, seed, "", best)
        if best[1] is None:  # a rare kind of study: compare all
            best = self._best(own, every, len(self.rows), seed, "", best)
        return best[1]

    def _best(
        self,
        own: Neighbour,
        among: list[int] | range,
        count: int,
        seed: int,
        key: str,
        best: tuple[float, Neighbour | None],
    ) -> tuple[float, Neighbour | None]:
        start = hash_seed(seed, own.study_id, key) % len(among) if among else 0
        for step in range(min(count, len(among))):
            other = self.rows[among[(start + step) % len(among)]]
            if other.patient_id != own.patient_id and _answer_is_wrong(own, other):
                both = own.attributes | other.attributes
                near = len(own.attributes & other.attributes) / len(both) if both else 1.0
                if near > best[0]:
                    best = (near, other)
        return best


def _answer_is_wrong(own: Neighbour, other: Neighbour) -> bool:
    """Whether the answer of `own` is wrong for the image of `other`."""
    if NO_FINDING in own.names:
        return NO_FINDING not in other.names
    return not own.names <= other.names


def build_pool(studies: Iterable[Study], graph: ConceptGraph) -> Pool:
    """The pool of a data set, without studies that have no image."""
    miner, pool = Miner(graph), Pool()
    for study in studies:
        if study.images:
            row = _summarise_study(study, miner)
            for key in row.attributes | row.names:
                pool.by_key.setdefault(key, []).append(len(pool.rows))
            pool.rows.append(row)
    return pool


def _summarise_study(study: Study, miner: Miner) -> Neighbour:
    found = miner.mentions(study.report.text)
    keys = frozenset(key for key, value in found.items() if value == 1)
    names = frozenset(diagnosis(study_labels(study)))
    return Neighbour(study.study_id, study.patient_id, keys, names, study.images)


def perception_counterfactuals(
    studies: Iterable[Study], pool: Pool, graph: ConceptGraph, *, seed: int = 42
) -> Iterator[Counterfactual]:
    """Yield one record per study with images to reject: kind "perception", id "study/perception".

    The record repeats the study's report and labels. `counterfactual_labels` are those of the
    rejected image; the target is the first of them that the study lacks, otherwise the first. A
    study without an image fails the check "image", one without a neighbour the check "neighbour".
    """
    miner = Miner(graph)
    for study in studies:
        own = _summarise_study(study, miner)
        other = pool.nearest(own, seed) if study.images else None
        shown = tuple(n for n in LABEL_NAMES if other and n in other.names)
        lacking = [n for n in shown if n not in own.names]
        names = diagnosis(study_labels(study))
        yield Counterfactual(
            id=f"{study.study_id}/perception",
            study_id=study.study_id,
            patient_id=study.patient_id,
            images=tuple(image.path for image in study.images),
            report=study.report.text,
            labels=names,
            target=next(iter(lacking or shown), ""),
            counterfactual=study.report.text,
            counterfactual_labels=shown,
            kind="perception",
            seed=seed,
            checks={"image": bool(study.images), "neighbour": other is not None},
            rejected_images=tuple(image.path for image in other.images) if other else (),
        )


def with_perception(one: Preference, rejected_images: tuple[ImageRef, ...]) -> Preference:
    """Add a perception pair to a study's preference or SFT sample: the chosen answer with its own
    images over the same answer with `rejected_images`.

    Raises ValueError if either has no image.
    """
    if not one.images or not rejected_images:
        raise ValueError(f"study {one.id}: a perception pair needs two images")
    number = len(one.images)  # as many as the prompt has placeholders
    shown = (rejected_images * number)[:number]
    return replace(
        one,
        rejected=(*one.rejected, one.chosen),
        rejected_images=(*(None for _ in one.rejected), shown),
        source=one.source if one.rejected else "perception",
    )

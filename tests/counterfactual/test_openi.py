"""Counterfactuals of real reports: every eighth report of Open-I, read from the installed wheel."""

from __future__ import annotations

import statistics
from collections import Counter
from itertools import islice

import pytest

from bench.bench_counterfactual import find_denied_assertions
from cpo_fast.concepts import label_report, load_graph
from cpo_fast.concepts.labeller import find_ruled_out, split_sentences
from cpo_fast.counterfactual import counterfactuals
from cpo_fast.counterfactual.graph.text import join_units, split_units
from cpo_fast.data import open_studies
from cpo_fast.errors import DataError
from cpo_fast.types import Counterfactual, Study


@pytest.fixture(scope="module")
def studies() -> list[Study]:
    try:
        return list(islice(open_studies("open-i"), 0, None, 8))
    except DataError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def generated(studies: list[Study]) -> list[Counterfactual]:
    return list(counterfactuals(studies, load_graph()))


def test_nearly_all_counterfactuals_pass(generated: list[Counterfactual]) -> None:
    assert len(generated) > 900
    assert statistics.mean(cf.passed for cf in generated) > 0.97


def test_target_is_asserted_and_never_denied(generated: list[Counterfactual]) -> None:
    for cf in generated:
        if cf.passed:
            assert label_report(cf.counterfactual)[cf.target] == 1
            assert not any(
                cf.target in find_ruled_out(s) for s in split_sentences(cf.counterfactual)
            )


def test_passing_counterfactuals_deny_no_assertion(generated: list[Counterfactual]) -> None:
    assert not [cf.id for cf in generated if cf.passed and find_denied_assertions(cf)]


def test_most_sentences_are_kept(generated: list[Counterfactual]) -> None:
    shares = []
    for cf in generated:
        old = Counter(u.plain for u in split_units(cf.report) if u.plain)
        shares.append(
            (old & Counter(u.plain for u in split_units(cf.counterfactual))).total() / old.total()
        )
    assert statistics.median(shares) >= 0.6


def test_targets_cover_all_diseases(generated: list[Counterfactual]) -> None:
    targets = Counter(cf.target for cf in generated)
    assert len(targets) == 12
    assert max(targets.values()) < 0.25 * len(generated)


def test_splitting_and_joining_preserves_sections(studies: list[Study]) -> None:
    exact = [
        join_units(list(split_units(text))) == text
        for study in studies
        for text in (study.report.findings, study.report.impression)
    ]
    assert statistics.mean(exact) > 0.995


def test_the_labeller_agrees_with_the_indexers(studies: list[Study]) -> None:
    hits: Counter[str] = Counter()
    for study in studies:
        if study.labels:
            found = label_report(study.report.text)
            for name in study.labels.keys() - {"No Finding"}:
                hits[f"{study.labels[name] == 1}{found[name] == 1}"] += 1
    assert (
        2 * hits["TrueTrue"] / (2 * hits["TrueTrue"] + hits["TrueFalse"] + hits["FalseTrue"]) > 0.88
    )

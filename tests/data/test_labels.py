"""Label policies; the answer sentence and its strict parser."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpo_fast.data.labels import LABEL_NAMES, answer, diagnosis, parse_answer, question, thought
from cpo_fast.types import FINDINGS

NAMES = st.lists(st.sampled_from(LABEL_NAMES), min_size=1, unique=True).map(tuple)


def test_label_names_are_chexperts_and_emphysema() -> None:
    assert (*FINDINGS, "Emphysema") == LABEL_NAMES


@pytest.mark.parametrize(
    ("labels", "negative", "positive"),
    [
        ({}, ("No Finding",), ("No Finding",)),
        ({"Edema": None, "Fracture": 0}, ("No Finding",), ("No Finding",)),
        ({"Edema": -1}, ("No Finding",), ("Edema",)),
        ({"Pneumonia": -1, "Edema": 1}, ("Edema",), ("Edema", "Pneumonia")),
        ({"No Finding": 1}, ("No Finding",), ("No Finding",)),
        ({"No Finding": 1, "Support Devices": 1}, ("Support Devices",), ("Support Devices",)),
        (
            {"Emphysema": 1, "Atelectasis": 1},
            ("Atelectasis", "Emphysema"),
            ("Atelectasis", "Emphysema"),
        ),
    ],
)
def test_diagnosis_by_policy(labels: dict, negative: tuple, positive: tuple) -> None:
    assert diagnosis(labels) == negative
    assert diagnosis(labels, uncertain="negative") == negative
    assert diagnosis(labels, uncertain="positive") == positive


def test_unknown_policy_is_an_error() -> None:
    with pytest.raises(ValueError, match="negative"):
        diagnosis({}, uncertain="maybe")


@given(NAMES, st.text())
def test_parse_answer_inverts_answer_and_thought(names: tuple[str, ...], report: str) -> None:
    assert parse_answer(answer(names)) == names
    assert parse_answer(thought(report, names)) == names


def test_thought_has_the_wording_of_the_paper() -> None:
    expected = "<think> FINDINGS: x </think> The disease of this patient is Edema, Fracture."
    assert thought("FINDINGS: x", ["Edema", "Fracture"]) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<think> The disease of this patient is Edema.",
        "<think> x </think>",
        "<think> x </think> The disease of this patient is Edema",
        "<think> x </think> The disease of this patient is edema.",
        "<think> x </think> The disease of this patient is Edema, Edema.",
        "<think> x </think> The disease of this patient is Edema, Gout.",
        "<think> x </think> The disease of this patient is Edema and Pneumonia.",
        "<think> x </think> The disease of this patient is Edema. And more.",
        "<think> The disease of this patient is Edema. </think> I do not know.",
        "Surely: The disease of this patient is Edema.",
    ],
)
def test_malformed_answer_parses_to_nothing(text: str) -> None:
    assert parse_answer(text) == ()


@given(st.text())
def test_parse_answer_never_fails(text: str) -> None:
    assert set(parse_answer(text)) <= set(LABEL_NAMES)


def test_answer_needs_a_name() -> None:
    with pytest.raises(ValueError, match="No Finding"):
        answer(())


def test_question_has_one_placeholder_per_image() -> None:
    (message,) = question(2, "What is it?")
    assert message["role"] == "user"
    assert message["content"] == [
        {"type": "image"},
        {"type": "image"},
        {"type": "text", "text": "What is it?"},
    ]

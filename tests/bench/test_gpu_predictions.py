"""Predicted times of the loss op on a GPU: docs/gpu.md contains the computed table."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.gpu.predictions import CARDS, FROZEN, LSE_ONLY, TRAINED, make_predictions_table, predict

pytestmark = pytest.mark.complete
PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"


def test_the_page_has_the_computed_table() -> None:
    assert make_predictions_table() in PAGE.read_text()


@pytest.mark.parametrize(
    ("card", "provider", "low", "high"),
    [  # milliseconds, computed by hand in a review
        ("NVIDIA H100 80GB HBM3", "triton lean", 36.8, 36.8),
        ("NVIDIA H200", "triton lean", 36.0, 36.0),
        ("NVIDIA H100 80GB HBM3", "triton masked", 36.6, 37.6),
        ("NVIDIA H200", "triton masked", 36.3, 37.3),
        ("NVIDIA H100 80GB HBM3", "floor", 33.9, 33.9),
    ],
)
def test_the_headline_agrees_with_the_review(
    card: str, provider: str, low: float, high: float
) -> None:
    span = predict(card, provider, FROZEN, "7B")
    assert span is not None
    assert span.low == pytest.approx(low, rel=0.01) and span.high == pytest.approx(high, rel=0.01)


def test_cases_without_a_prediction() -> None:
    assert predict("NVIDIA A100", "floor", FROZEN, "7B") is None
    assert predict("NVIDIA H200", "trl chunked", FROZEN, "7B") is None
    assert predict("NVIDIA H200", "triton lean", "another case", "7B") is None
    assert predict("NVIDIA H200", "triton lse", FROZEN, "7B") is None
    assert predict("NVIDIA H200", "cuda fused", LSE_ONLY, "0.5B") is None


def test_every_prediction_is_above_its_floor() -> None:
    for card in CARDS:
        for case in (FROZEN, TRAINED, LSE_ONLY):
            floor = predict(card, "floor", case, "7B")
            for provider in ("triton lean", "triton masked", "cuda rows", "cuda fused"):
                span = predict(card, provider, case, "7B")
                assert span is not None and floor is not None
                assert floor.low < span.low <= span.high

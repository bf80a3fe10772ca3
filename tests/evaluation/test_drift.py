"""The token tree and the probe equal a forward of one sequence at a time."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from cpo_fast.errors import UsageError
from cpo_fast.evaluation import drift
from cpo_fast.evaluation.tree import TokenTree, score_tree
from cpo_fast.model.build import add_lora
from cpo_fast.model.packed import PackedModel
from cpo_fast.testing.samples import image, images, text_model, tokenizer, vision_language_model
from tests.evaluation.test_likelihood import IMAGE, build_prompts, score_separately

FINDINGS = ("Cardiomegaly", "Edema", "No Finding")
THOUGHT = "The heart is enlarged. No pneumothorax."


def test_tree_stores_shared_prefixes_once():
    tree = TokenTree.of((5, 6, 7))
    assert tree.insert((5, 6, 8)) == 3
    assert tree.insert((5, 6, 8, 9)) == 4
    assert tree.insert((6,)) == 5
    assert tree.insert((5, 6)) == 1
    assert tree.parents == [-1, 0, 1, 1, 3, -1]
    assert tree.depths == [0, 1, 2, 2, 3, 0]


@pytest.mark.parametrize("tokens_per_pass", [1, 10, 10_000])
def test_random_continuations_equal_separate_forwards(tokens_per_pass):
    model = vision_language_model()
    (prompt,) = build_prompts(image(60, 120))
    rng = random.Random(3)
    trunk = tuple(rng.randrange(5, 200) for _ in range(9))
    continuations = [
        (*trunk[: rng.randrange(len(trunk) + 1)], *(rng.randrange(5, 8) for _ in range(n)))
        for n in (1, 2, 3, 4, 4, 3, 5)
    ]
    continuations += [trunk, trunk[:2], (*continuations[3], 7, 7)]
    scores = score_tree(PackedModel(model), prompt, continuations, images().pixels, trunk=trunk,
                        image_token_id=IMAGE, tokens_per_pass=tokens_per_pass)  # fmt: skip
    expected = [score_separately(model, prompt, continuation) for continuation in continuations]
    np.testing.assert_allclose(scores.numpy(), expected, rtol=2e-6)


def compute_naively(model, prompt, thought: str) -> list[float]:
    """The distribution over FINDINGS after a thought given as text, from separate answers."""
    texts = [f"{thought} </think> The disease of this patient is {name}." for name in FINDINGS]
    logps = [score_separately(model, prompt, tokenizer()(text)["input_ids"]) for text in texts]
    weights = [math.exp(logp - max(logps)) for logp in logps]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("kind", ["vision", "text", "lora"])
def test_probe_equals_the_naive_computation(kind):
    model = text_model() if kind == "text" else vision_language_model()
    if kind == "lora":
        model = add_lora(model, r=2, alpha=4, dropout=0.5)
    (prompt,) = build_prompts(None if kind == "text" else image(100, 80))
    found = drift.probe(PackedModel(model), tokenizer(), prompt, THOUGHT, images().pixels,
                        findings=FINDINGS, image_token_id=IMAGE, tokens_per_pass=50)  # fmt: skip
    model.eval()
    stream = tokenizer()(f"<think> {THOUGHT}")["input_ids"]
    assert found.distribution.shape == (len(stream) + 1, 3)
    for j in (0, 1, len(stream) // 2, len(stream)):
        expected = compute_naively(model, prompt, tokenizer().decode(stream[:j]))
        np.testing.assert_allclose(found.distribution[j], expected, atol=1e-5)
    assert "".join(found.tokens) == f"<think> {THOUGHT}"
    assert found.distribution.std(axis=0).max() > 1e-3, "the distribution must change"


def test_swaps_equal_the_naive_computation():
    model = vision_language_model()
    (prompt,) = build_prompts(image(100, 80))
    swaps = drift.find_swaps(THOUGHT)
    assert {swap.kind for swap in swaps} == {"synonym", "negation"}
    original, effects = drift.swap_effects(
        PackedModel(model), tokenizer(), prompt, THOUGHT, swaps, images().pixels,
        findings=FINDINGS, image_token_id=IMAGE,
    )  # fmt: skip
    expected = compute_naively(model, prompt, f"<think> {THOUGHT}")
    np.testing.assert_allclose(original, expected, atol=1e-5)
    for effect in effects:
        changed = compute_naively(model, prompt, f"<think> {effect.swap.text}")
        np.testing.assert_allclose(effect.distribution, changed, atol=1e-5)
        moved = sum(abs(a - b) for a, b in zip(expected, changed, strict=True)) / 2
        assert effect.variation == pytest.approx(moved, abs=1e-5)


def test_swaps_name_their_kind():
    text = "Left lung opacity is seen. There is no pneumothorax. No effusion in the right lung."
    swaps = {swap.text: swap for swap in drift.find_swaps(text)}
    assert text.replace("lung opacity", "opacity") in swaps
    assert text.replace("is seen", "is noted") in swaps
    sides = "Right lung opacity is seen. There is no pneumothorax. No effusion in the left lung."
    assert swaps[sides].kind == "side"
    negation = swaps[text.replace("There is no pneumothorax", "There is a pneumothorax")]
    assert negation.kind == "negation"
    assert text.replace("No effusion", "There is effusion") in swaps
    assert text.replace("lung opacity", "lung lung opacity") not in swaps


def test_distances_equal_hand_computation():
    p, q = np.array([1.0, 0.0, 0.0]), np.array([0.0, 0.5, 0.5])
    assert drift.total_variation(p, q) == 1.0
    assert drift.jensen_shannon(p, q) == pytest.approx(1.0)
    assert drift.jensen_shannon(p, p) == 0.0
    a, b = np.array([0.2, 0.3, 0.5]), np.array([0.6, 0.3, 0.1])
    assert drift.jensen_shannon(a, b) == pytest.approx(jensenshannon(a, b, base=2) ** 2)


def test_change_points_are_sorted_by_change():
    rows = np.array([[0.5, 0.5], [0.5, 0.5], [0.9, 0.1], [0.7, 0.3], [0.1, 0.9]])
    found = drift.Drift(("A", "B"), ("a", "b", "c", "d"), rows)
    assert found.change_points() == [3, 1, 2]
    assert found.change_points(0.3) == [3, 1]
    np.testing.assert_allclose(found.variation, [0, 0.4, 0.2, 0.6])


def test_empty_input_is_refused():
    model = PackedModel(text_model())
    (prompt,) = build_prompts(None)
    with pytest.raises(UsageError, match="thought is empty"):
        drift.probe(model, tokenizer(), prompt, "  ")
    with pytest.raises(UsageError, match="no findings"):
        drift.probe(model, tokenizer(), prompt, "a", findings=())
    with pytest.raises(UsageError, match="at least one token"):
        score_tree(model, prompt, [()], trunk=(1,))

"""Scores of many candidates from one pack equal separate forwards of whole sequences."""

from __future__ import annotations

import pytest
import torch

from cpo_fast.data.labels import LABEL_NAMES
from cpo_fast.errors import UsageError
from cpo_fast.evaluation.generate import diagnose
from cpo_fast.evaluation.likelihood import (
    after_thought,
    finding_candidates,
    finding_distribution,
    score_answers,
)
from cpo_fast.model.packed import PackedModel
from cpo_fast.packing import encode, image_token_id
from cpo_fast.testing.samples import (
    image,
    images,
    preference,
    text_model,
    tokenizer,
    vision_language_model,
)
from cpo_fast.types import Prompt

IMAGE = image_token_id(tokenizer())


def build_prompts(*pictures) -> list[Prompt]:
    made = []
    for number, picture in enumerate(pictures):
        sample = preference(str(number), 0, *([picture] if picture else []))
        prompt = encode(sample, tokenizer(), images().grid, max_length=1000).prompt
        made.append(after_thought(prompt, tokenizer(), "Small effusion." * number))
    return made


def score_separately(model, prompt: Prompt, candidate) -> float:
    """Summed log-prob of the candidate from the model's own forward over prompt and answer."""
    row = torch.tensor([[*prompt.input_ids, *candidate]])
    inputs = {"input_ids": row}
    if prompt.images:
        values, grid = images().pixels(prompt.images[0])
        inputs |= {"pixel_values": values, "image_grid_thw": grid.view(1, 3)}
        inputs["mm_token_type_ids"] = (row == IMAGE).long()
    with torch.no_grad():
        logps = model(**inputs).logits[0].double().log_softmax(-1)
    start = len(prompt.input_ids) - 1
    return sum(float(logps[start + i, token]) for i, token in enumerate(candidate))


def assert_same(scores: torch.Tensor, expected: list[list[float]]) -> None:
    """Float32 log-probs of about -100, equal to a relative 1e-6."""
    torch.testing.assert_close(scores, torch.tensor(expected), atol=0, rtol=1e-6)


@pytest.mark.parametrize("packing_length", [1, 100_000])
def test_scores_equal_separate_forwards_with_images(packing_length):
    model = vision_language_model()
    prompts = build_prompts(image(100, 80), image(60, 120), None)
    candidates = finding_candidates(tokenizer())[:5]
    expected = [[score_separately(model, p, c) for c in candidates] for p in prompts]
    scores = score_answers(PackedModel(model), prompts, candidates, images().pixels,
                           image_token_id=IMAGE, packing_length=packing_length)  # fmt: skip
    assert scores.shape == (3, 5)
    assert_same(scores, expected)


def test_scores_of_a_text_model_with_own_candidates():
    model = text_model().double()
    prompts = build_prompts(None, None)
    first, second, third = finding_candidates(tokenizer())[:3]
    own = [[first, second], [third, first]]
    expected = [
        [score_separately(model, p, c) for c in cs] for p, cs in zip(prompts, own, strict=True)
    ]
    scores = score_answers(PackedModel(model), prompts, own)
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=0)


def test_packed_model_generates_as_before():
    """The attention function of packs does not change `generate`."""
    model = vision_language_model()
    prompts = build_prompts(image(100, 80), image(60, 120))
    before = diagnose(model, tokenizer(), prompts, images().pixels, max_new_tokens=12)
    PackedModel(model)
    assert diagnose(model, tokenizer(), prompts, images().pixels, max_new_tokens=12) == before
    assert len(set(before)) == 2


def test_candidates_are_one_sentence_per_finding():
    texts = [tokenizer().decode(ids) for ids in finding_candidates(tokenizer())]
    assert texts[0] == " The disease of this patient is Atelectasis."
    assert len(texts) == len(LABEL_NAMES)


def test_distribution_is_the_softmax_of_scores():
    scores = torch.tensor([[-700.0, -701.0, -730.0]])
    found = finding_distribution(scores)
    assert float(found.sum()) == pytest.approx(1.0)
    assert float(found[0, 0] / found[0, 1]) == pytest.approx(2.718281828)


def test_bad_candidates_are_refused():
    model = PackedModel(text_model())
    prompts = build_prompts(None, None)
    with pytest.raises(UsageError, match="no candidate"):
        score_answers(model, prompts, [])
    with pytest.raises(UsageError, match="one of its candidates is empty"):
        score_answers(model, prompts, [(1, 2), ()])
    with pytest.raises(UsageError, match="2 prompts, but 1 list of candidates"):
        score_answers(model, prompts, [[(1, 2)]])
    assert score_answers(model, [], [(1,)]).shape == (0, 0)

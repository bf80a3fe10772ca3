"""Data and small models of the step benchmarks: CCF-like pairs of random words, a tokenizer, noise
images.

A study has one chosen and two rejected responses of 100 to 250 tokens; a word is about one token.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from cpo_fast.model.build import tiny_model, tiny_text_model
from cpo_fast.model.images import ImageProcessor
from cpo_fast.model.tokenizer import train_tokenizer
from cpo_fast.packing import encode_all
from cpo_fast.testing.samples import image
from cpo_fast.types import ImageRef, Preference, PreferenceGroup

VOCABULARY = ["".join(random.Random(i).choices("aeioulnrstmdp", k=3 + i % 6)) for i in range(1200)]
VISUAL_504 = 504
"""Pixels per side of an image of 324 visual tokens."""


def make_words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(VOCABULARY) for _ in range(count))


@dataclass(frozen=True)
class Work:
    """The same pairs as preferences (input of peers) and as groups (our input)."""

    preferences: list[Preference]
    groups: list[PreferenceGroup]
    tokenizer: PreTrainedTokenizerBase
    images: ImageProcessor

    @property
    def pairs(self) -> int:
        return sum(len(group.rejected) for group in self.groups)

    @property
    def physical_tokens(self) -> int:
        """Prompt, chosen and every rejected response of a study, each counted once."""
        return sum(
            len(group.prompt.input_ids) + len(group.chosen) + sum(map(len, group.rejected))
            for group in self.groups
        )

    @property
    def logical_tokens(self) -> int:
        """prompt + chosen and prompt + rejected of every pair."""
        return sum(
            2 * len(group.prompt.input_ids) + len(group.chosen) + len(rejected)
            for group in self.groups
            for rejected in group.rejected
        )


@functools.cache
def train_word_tokenizer() -> PreTrainedTokenizerBase:
    """4,096 entries, trained on texts of VOCABULARY."""
    texts = [make_words(random.Random(i), 200) for i in range(200)]
    return train_tokenizer(texts, vocab_size=4096)


def make_preference(
    name: str,
    rng: random.Random,
    pictures: tuple[ImageRef, ...],
    *,
    prompt_words: int,
    response_words: tuple[int, int],
    rejected: int = 2,
) -> Preference:
    """Random words: a question about the pictures, a chosen answer and `rejected` others."""
    text = {"type": "text", "text": make_words(rng, prompt_words)}
    prompt = ({"role": "user", "content": [*[{"type": "image"}] * len(pictures), text]},)
    answers = [make_words(rng, rng.randint(*response_words)) for _ in range(1 + rejected)]
    return Preference(name, prompt, answers[0], tuple(answers[1:]), pictures)


@functools.lru_cache(maxsize=2)
def make_work(
    *, studies: int, side: int, prompt_words: int, response_words: tuple[int, int] = (95, 235)
) -> Work:
    """Pairs of `studies` studies, each with side x side pixels of grey noise (no image for 0). The
    result is cached: do not modify it."""
    rng = random.Random(0)
    preferences = []
    for study in range(studies):
        pictures = (image(side, side, study),) if side else ()
        preferences.append(
            make_preference(
                str(study),
                rng,
                pictures,
                prompt_words=prompt_words,
                response_words=response_words,
            )
        )
    tokenizer = train_word_tokenizer()
    images = ImageProcessor.create(max_pixels=max(side, 56) ** 2)
    groups = encode_all(preferences, tokenizer, images.grid, max_length=4096).groups
    return Work(preferences, groups, tokenizer, images)


def build_small_model(tokenizer: PreTrainedTokenizerBase, *, vision: bool) -> Any:
    """A random Qwen2.5-VL (Qwen2 without `vision`): hidden 256, four layers."""
    sizes = {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "intermediate_size": 768,
    }
    if not vision:
        return tiny_text_model(tokenizer, **sizes)
    tower = {"vision_hidden_size": 128, "vision_layers": 4, "vision_intermediate_size": 256}
    return tiny_model(tokenizer, **sizes, **tower)

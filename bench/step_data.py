"""What the step benchmarks train on: CCF-like pairs of random words, a tokenizer, images of noise.

A study has one chosen and two rejected responses of 100 to 250 tokens; a word is about one token.
"""

from __future__ import annotations

import functools
import io
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from cpo_fast.model.images import ImageProcessor
from cpo_fast.model.tokenizer import train_tokenizer
from cpo_fast.packing import encode_all
from cpo_fast.types import ImageRef, Preference, PreferenceGroup

VOCABULARY = ["".join(random.Random(i).choices("aeioulnrstmdp", k=3 + i % 6)) for i in range(1200)]
VISUAL_504 = 504
"""Pixels per side of an image of 324 visual tokens."""


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(VOCABULARY) for _ in range(count))


@dataclass(frozen=True)
class Work:
    """The same pairs as preferences, which peers read, and as groups, which we compute."""

    preferences: list[Preference]
    groups: list[PreferenceGroup]
    tokenizer: PreTrainedTokenizerBase
    images: ImageProcessor

    @property
    def pairs(self) -> int:
        return sum(len(group.rejected) for group in self.groups)

    @property
    def physical_tokens(self) -> int:
        """prompt, chosen and every rejected response of a study once."""
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
def word_tokenizer() -> PreTrainedTokenizerBase:
    """4,096 entries, trained on texts of VOCABULARY."""
    return train_tokenizer([words(random.Random(i), 200) for i in range(200)], vocab_size=4096)


def noise(name: str, width: int, height: int, seed: int) -> ImageRef:
    """A grey PNG in memory."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return ImageRef(f"{name}.png", data=file.getvalue())


def preference(
    name: str,
    rng: random.Random,
    pictures: tuple[ImageRef, ...],
    *,
    prompt_words: int,
    response_words: tuple[int, int],
    rejected: int = 2,
) -> Preference:
    """Random words about the pictures: a question, a chosen answer and `rejected` others."""
    text = {"type": "text", "text": words(rng, prompt_words)}
    prompt = ({"role": "user", "content": [*[{"type": "image"}] * len(pictures), text]},)
    answers = [words(rng, rng.randint(*response_words)) for _ in range(1 + rejected)]
    return Preference(name, prompt, answers[0], tuple(answers[1:]), pictures)


@functools.lru_cache(maxsize=2)
def work(
    *, studies: int, side: int, prompt_words: int, response_words: tuple[int, int] = (95, 235)
) -> Work:
    """Pairs of `studies` studies, each with an image of side x side grey noise (none for 0). The
    same object for the same arguments: it is not to be changed.
    """
    rng = random.Random(0)
    preferences = []
    for study in range(studies):
        pictures = (noise(str(study), side, side, study),) if side else ()
        preferences.append(
            preference(
                str(study),
                rng,
                pictures,
                prompt_words=prompt_words,
                response_words=response_words,
            )
        )
    tokenizer = word_tokenizer()
    images = ImageProcessor.create(max_pixels=max(side, 56) ** 2)
    groups = encode_all(preferences, tokenizer, images.grid, max_length=4096).groups
    return Work(preferences, groups, tokenizer, images)

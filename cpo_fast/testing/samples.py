"""Small preferences with images in memory, a tokenizer and models: shared by the packing and model
tests."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from cpo_fast.model.build import tiny_model, tiny_text_model
from cpo_fast.model.images import ImageProcessor
from cpo_fast.model.tokenizer import train_tokenizer
from cpo_fast.types import ImageRef, Preference

CORPUS = [
    "FINDINGS: The heart is enlarged. Lungs are clear.\n\nIMPRESSION: Cardiomegaly.",
    "FINDINGS: Small left pleural effusion, 12 mm. No pneumothorax.\n\nIMPRESSION: Effusion.",
    "What does the radiograph show? <think> opacity </think> The disease of this patient is Edema.",
] * 3


@cache
def tokenizer() -> Any:
    return train_tokenizer(CORPUS, vocab_size=420)


@cache
def images() -> ImageProcessor:
    return ImageProcessor.create(max_pixels=112 * 112)


@cache
def image(width: int, height: int, seed: int = 0) -> ImageRef:
    """Noise as a PNG in memory."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return ImageRef(f"noise-{width}x{height}-{seed}", data=file.getvalue())


def preference(
    name: str,
    rejected: int,
    *pictures: ImageRef,
    perception: ImageRef | None = None,
    words: int = 4,
) -> Preference:
    """`rejected` wrong answers of different lengths; with `perception` the first of them is the
    chosen text, told of that image.
    """
    text = {"type": "text", "text": "What does the radiograph show?"}
    answer = "The heart is enlarged. " * words
    wrong = [f"<think> {'Small effusion. ' * (k + 1)}</think> {name}" for k in range(rejected)]
    if perception is not None:
        wrong[0] = answer
    return Preference(
        id=name,
        prompt=({"role": "user", "content": [*[{"type": "image"}] * len(pictures), text]},),
        chosen=answer,
        rejected=tuple(wrong),
        images=pictures,
        rejected_images=(
            ((perception,), *[None] * (rejected - 1)) if perception is not None else ()
        ),
    )


def mixed() -> list[Preference]:
    """With and without images, of several sizes, two in one prompt, K from 1 to 3, a perception
    pair."""
    return [
        preference("one", 1, image(100, 80)),
        preference("three", 3, image(300, 200), words=2),
        preference("text", 2),
        preference("perception", 2, image(80, 120), perception=image(60, 60)),
        preference("two-images", 2, image(56, 56), image(120, 60)),
    ]


def strengthen(model: torch.nn.Module) -> Any:
    """Fresh weights make attention almost uniform and its errors invisible; these do not."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "lora" not in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise * parameter[0].numel() ** -0.5)
            if "q_proj" in name or "k_proj" in name:
                parameter.data.mul_(2.0)
    return model.eval()


def vision_language_model() -> Any:
    return strengthen(
        tiny_model(tokenizer(), hidden_size=64, num_hidden_layers=2, intermediate_size=96)
    )


def text_model() -> Any:
    return strengthen(
        tiny_text_model(tokenizer(), hidden_size=64, num_hidden_layers=2, intermediate_size=96)
    )

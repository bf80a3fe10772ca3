"""A model on disk: the folder of its weights, its tokenizer and its image processor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cpo_fast.data.lengths import has_tokenizer, load_tokenizer
from cpo_fast.model.build import load_model, save_model
from cpo_fast.model.images import ImageProcessor
from cpo_fast.model.lineage import lineage
from cpo_fast.model.supported import read_model_config
from cpo_fast.packing import encode, image_token_id
from cpo_fast.packing.readable import decode_images
from cpo_fast.types import Pixels, Preference, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Checkpoint:
    """A model or adapter in `path`; `images` is None for a model that takes text only.

    `base_model` replaces the base that an adapter names.
    """

    path: Path
    tokenizer: PreTrainedTokenizerBase
    images: ImageProcessor | None = None
    base_model: Path | None = None

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        base_model: str | Path | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Checkpoint:
        """Read tokenizer and image processor, not the weights.

        An adapter's own files come first, then its base's. `min_pixels` and `max_pixels` replace
        the bounds of the image processor. Raises UsageError as the loaders do.
        """
        base = lineage(folder, base_model)[-1]
        own = base if base == folder or not has_tokenizer(folder) else folder
        beside = folder if base != folder else None
        bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        images = ImageProcessor.find(base, read_model_config(base), beside=beside, **bounds)
        tokenizer = load_tokenizer(own)
        return cls(folder, tokenizer, images, Path(base_model) if base_model else None)

    @property
    def pixels(self) -> Pixels | None:
        """Reads an image as the model's input."""
        return self.images.pixels if self.images else None

    @property
    def image_token_id(self) -> int | None:
        return image_token_id(self.tokenizer)

    def load(
        self, *, dtype: torch.dtype, device: torch.device | None = None, path: Path | None = None
    ) -> Any:
        """The model with weights of `dtype` on `device` (default: the GPU if there is one).

        `path`: another folder of weights with the same tokenizer and images, such as a checkpoint
        trained from this one.
        """
        model: Any = load_model(path or self.path, dtype=dtype, base_model=self.base_model)
        return model.to(device or default_device())

    def save(
        self, model: Any, folder: Path, *, weights: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Write `model` with this tokenizer and image processor; see `build.save_model`."""
        save_model(model, folder, tokenizer=self.tokenizer, images=self.images, weights=weights)

    def encode_prompt(self, asked: Preference, *, max_length: int) -> Prompt:
        """The tokens of the prompt of `asked`.

        Its images are decoded once, so that a damaged one raises RecordError here and not later.
        """
        grid = self.images.grid if self.images else None
        prompt = encode(asked, self.tokenizer, grid, max_length=max_length).prompt
        decode_images([prompt], self.pixels, {})
        return prompt


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

"""Images as Qwen2.5-VL wants them: grid from the header, pixel values as transformers' processor
makes them (bit for bit: a test holds the two together), in half its time.

transformers' AutoProcessor and Qwen2_5_VLProcessor need torchvision, of which there is no working
CPU build; its PIL-backed image processor does not, and gives the same preprocessor_config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cpo_fast.data.images import image_size, load_shades
from cpo_fast.data.pixels import FRAMES, PATCH, pixel_values, resized
from cpo_fast.errors import RecordError, UsageError
from cpo_fast.packing.encode import MERGE_SIZE, Grid
from cpo_fast.types import ImageRef

if TYPE_CHECKING:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

MIN_PIXELS = 56 * 56
MAX_PIXELS = 1280 * 28 * 28
"""Qwen2.5-VL's own bounds on the resized image; 1,003,520 pixels are 1,280 visual tokens."""


class ImageProcessor:
    """The image side of a checkpoint. Resizes so that both sides are multiples of 28 pixels and the
    area lies between `min_pixels` and `max_pixels`, the aspect ratio kept as closely as that
    allows.
    """

    def __init__(self, processor: Qwen2VLImageProcessorPil) -> None:
        if processor.merge_size != MERGE_SIZE:
            raise UsageError(
                f"the image processor merges {processor.merge_size} patches a side; only "
                f"{MERGE_SIZE} (Qwen2.5-VL) is supported"
            )
        if (processor.patch_size, processor.temporal_patch_size) != (PATCH, FRAMES):
            raise UsageError(
                f"the image processor cuts patches of {processor.patch_size} pixels and "
                f"{processor.temporal_patch_size} frames; only {PATCH} and {FRAMES} (Qwen2.5-VL) "
                "are supported"
            )
        self.processor = processor

    @classmethod
    def create(
        cls, *, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
    ) -> ImageProcessor:
        """Qwen2.5-VL's preprocessing with bounds in pixels (28 x 28 of them make a visual
        token).
        """
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        if not 0 < min_pixels <= max_pixels:
            raise UsageError(
                f"min_pixels={min_pixels}, max_pixels={max_pixels}: "
                "give 0 < min_pixels <= max_pixels"
            )
        size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
        return cls(Qwen2VLImageProcessorPil(size=size))

    @classmethod
    def load(
        cls, folder: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> ImageProcessor:
        """From a checkpoint's preprocessor_config.json, its bounds replaced where given."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        try:
            processor = Qwen2VLImageProcessorPil.from_pretrained(str(folder))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"no usable preprocessor_config.json in {folder} ({type(error).__name__}); "
                "point at a Qwen2.5-VL checkpoint"
            ) from error
        size = processor.size
        return cls.create(
            min_pixels=min_pixels or size["shortest_edge"],
            max_pixels=max_pixels or size["longest_edge"],
        )

    def save(self, folder: str | Path) -> None:
        """Write preprocessor_config.json, which also tells AutoProcessor its class."""
        (written,) = self.processor.save_pretrained(str(folder))
        config = json.loads(Path(written).read_text())
        config["processor_class"] = "Qwen2_5_VLProcessor"
        Path(written).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def grid(self, ref: ImageRef) -> Grid:
        """(t, h, w) in patches, from the image's header; raises image_size's RecordErrors."""
        try:
            width, height = resized(
                *image_size(ref),
                min_pixels=self.processor.size["shortest_edge"],
                max_pixels=self.processor.size["longest_edge"],
            )
        except RecordError as error:
            if error.reason != "image-too-thin":
                raise
            raise RecordError(error.reason, f"{ref.path}: {error.detail}") from None
        return 1, height // PATCH, width // PATCH

    def pixels(self, ref: ImageRef) -> tuple[torch.Tensor, torch.Tensor]:
        """(pixel values [t * h * w, 1176] float32, grid [3] int64); raises load_image's
        RecordErrors.
        """
        values, grid = pixel_values(
            load_shades(ref),
            min_pixels=self.processor.size["shortest_edge"],
            max_pixels=self.processor.size["longest_edge"],
            mean=self.processor.image_mean,
            std=self.processor.image_std,
            scale=self.processor.rescale_factor,
        )
        return torch.from_numpy(values), torch.tensor(grid)

"""Pixel values are bit-equal to those of transformers' processor."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cpo_fast.data.pixels import MEAN, STD, pixel_values, resized_size, visual_tokens
from cpo_fast.errors import RecordError

theirs = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")


@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(1, 40), st.integers(40, 2000))
def test_size_equals_transformers(width: int, height: int, least: int, most: int) -> None:
    bounds = {"min_pixels": least * 784, "max_pixels": most * 784}
    try:
        expected = theirs.smart_resize(height, width, factor=28, **bounds)
    except ValueError:
        with pytest.raises(RecordError, match="image-too-thin"):
            resized_size(width, height, **bounds)
        return
    assert resized_size(width, height, **bounds) == expected[::-1]
    assert visual_tokens(width, height, **bounds) == expected[0] * expected[1] // 784


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(60, 40), (300, 517), (28, 28)])
@pytest.mark.parametrize("most", [28 * 28 * 12, 28 * 28 * 1280])
def test_values_equal_transformers(mode: str, size: tuple[int, int], most: int) -> None:
    shape = size[::-1] if mode == "L" else (*size[::-1], 3)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    image = Image.fromarray(noise)
    bounds = {"shortest_edge": 56 * 56, "longest_edge": most}
    processor = theirs.Qwen2VLImageProcessorPil(size=bounds)
    expected = processor(images=[image.convert("RGB")], return_tensors="np")
    values, grid = pixel_values(image, min_pixels=56 * 56, max_pixels=most)
    assert values.dtype == np.float32
    assert grid == tuple(expected["image_grid_thw"][0])
    assert (values == expected["pixel_values"]).all()
    assert (tuple(processor.image_mean), tuple(processor.image_std)) == (MEAN, STD)

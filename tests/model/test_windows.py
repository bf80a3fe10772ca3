"""A vision tower that batches its windows equals one that computes them one by one."""

from __future__ import annotations

import pytest
import torch

from cpo_fast.model import windows
from cpo_fast.model.attention import varlen_kernel
from cpo_fast.model.windows import WINDOWS, use_windows
from cpo_fast.testing.samples import vision_language_model
from tests.model.test_attention import torch_2_11_varlen

GRIDS = {
    "one image of whole windows": [(1, 16, 16)],
    "one image of ragged windows": [(1, 36, 36)],
    "images of several sizes": [(1, 12, 20), (1, 16, 16), (1, 4, 6), (1, 18, 10)],
}


def build_tower(dtype=torch.float32):
    torch.manual_seed(0)
    return vision_language_model().model.visual.to(dtype).eval()


def draw_patches(vision, grid, *, requires_grad=False):
    generator = torch.Generator().manual_seed(1)
    count = sum(t * h * w for t, h, w in grid)
    size = vision.patch_embed.proj.weight[0].numel()
    pixels = torch.randn(count, size, generator=generator)
    return pixels.to(vision.dtype).requires_grad_(requires_grad), torch.tensor(grid)


def compute_outputs(vision, grid):
    pixels, grids = draw_patches(vision, grid, requires_grad=True)
    out = vision(pixels, grids).pooler_output
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    grads = [pixels.grad, *(p.grad for p in vision.parameters())]
    vision.zero_grad()
    return [out.detach(), *grads]


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_features_and_gradients_equal_transformers(grid):
    vision = build_tower(torch.float64)
    want = compute_outputs(vision, grid)
    use_windows(vision)
    assert vision.config._attn_implementation == WINDOWS
    for one, other in zip(compute_outputs(vision, grid), want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_windows_change_the_features():
    """Without windows the features differ, so the test above can fail."""
    vision, grid = build_tower(), GRIDS["one image of ragged windows"]
    use_windows(vision)
    want = compute_outputs(vision, grid)[0]
    vision.fullatt_block_indexes = list(range(len(vision.blocks)))
    assert (compute_outputs(vision, grid)[0] - want).abs().max() > 1e-3


def test_layer_makes_one_call_per_window_length(monkeypatch):
    vision = build_tower()
    use_windows(vision)
    calls = []
    plain = windows.scaled_dot_product_attention

    def counting(*qkv, **options):
        calls.append(qkv[0].shape)
        return plain(*qkv, **options)

    monkeypatch.setattr(windows, "scaled_dot_product_attention", counting)
    pixels, grid = draw_patches(vision, [(1, 36, 36)] * 8)
    with torch.no_grad():
        vision(pixels, grid)
    whole = len(vision.fullatt_block_indexes)
    windowed = len(vision.blocks) - whole
    lengths = {shape[2] for shape in calls} - {36 * 36}
    assert windowed > 0 and len(calls) == whole + windowed * len(lengths)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_flash_attention_receives_the_windows(grid, monkeypatch):
    """With the CUDA kernel replaced by plain torch."""
    vision = build_tower(torch.float64)
    want = compute_outputs(vision, grid)
    use_windows(vision)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torch_2_11_varlen)
    monkeypatch.setattr(windows, "_supports_flash", lambda q: True)
    varlen_kernel.cache_clear()
    try:
        got = compute_outputs(vision, grid)
    finally:
        varlen_kernel.cache_clear()
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)

"""Model FLOPs of a pack, and their share of a machine's peak.

The convention ("model FLOPs", as in arXiv 2204.02311, appendix B): the matrix products of the
mathematics, two operations per multiply-add, each counted once. Not counted: recomputation by
gradient checkpointing, elementwise operations, the adapters' low-rank products, and the vision
tower's attention. Attention counts visible (query, key) pairs, not a full square. A weight needs 2
operations per token in the forward, 2 for the gradient of its input, and 2 more for its own
gradient if it is trained: 4 N per token with LoRA, 6 N with full tuning, and 2 N more for a
reference computed online.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch
from torch import nn

from cpo_fast.model.attention import studies_of
from cpo_fast.model.packed import PackedModel
from cpo_fast.types import PackedBatch

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "A800": 312e12}
"""Dense bfloat16 FLOP/s by a word in the GPU's name, from the manufacturers' data sheets."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of one training step on a pack: forward, backward and reference together."""

    vision: float
    trunk: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.vision + self.trunk + self.attention + self.head


class FlopCounter:
    """Counts the model FLOPs of packs; the model's weights are counted once, at construction."""

    def __init__(self, model: PackedModel) -> None:
        config = model.trunk.config
        self.frozen, self.trained = _linear_weights(model.trunk)
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.attention = config.num_hidden_layers * 2 * heads * head_dim
        head, _ = model.head()
        self.head, self.head_trained = head.numel(), head.requires_grad
        self.per_patch = 0.0
        self.tower_trained = False
        if model.vision is not None:
            frozen, trained = _linear_weights(model.vision)
            merger = getattr(model.vision, "merger", None)
            merged = sum(_linear_weights(merger)) if merger is not None else 0
            self.per_patch = (
                frozen + trained - merged * 3 / 4
            )  # the merger runs once per four patches
            self.tower_trained = bool(trained)

    def __call__(self, batch: PackedBatch, *, reference: bool = True) -> Flops:
        """Model FLOPs of `batch`; `reference`: with an online reference forward."""
        once = 2.0 * (2 if reference else 1)  # forward passes
        tokens, rows = len(batch.input_ids), len(batch.score_rows)
        weights = self.frozen + self.trained
        trunk = tokens * (weights * (once + 2) + 2 * self.trained)
        pairs = sum(_visible(prompt, branches) for prompt, branches in studies_of(batch))
        attention = pairs * self.attention * (once + 4)
        logits = rows * self.head * (once + (4 if self.head_trained else 2))
        patches = 0 if batch.pixel_values is None else len(batch.pixel_values)
        vision = patches * self.per_patch * (once + 4 if self.tower_trained else 2.0)
        return Flops(vision, trunk, attention, logits)


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilisation: `flops` in `seconds` as a share of `peak` FLOP/s."""
    return flops / seconds / peak


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s of `device`: from the data sheet for a known GPU in half precision, else measured
    with a matrix product of that dtype: 1024 x 1024, or 256 x 256 where that would take over 0.1 s
    (bfloat16 on a processor without instructions for it).
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for word, peak in PEAKS.items():
            if word in name:
                return peak
    small = _measure_product(256, device, dtype)
    return small if 2 * 1024**3 / small > 0.1 else _measure_product(1024, device, dtype)


def _measure_product(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two size x size matrices, the best of four."""
    square = torch.randn(size, size, device=device).to(dtype)
    best = 0.0
    for _ in range(4):
        begun = time.perf_counter()
        product = square @ square
        product[0, 0].item()  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - begun))
    return best


def _linear_weights(module: nn.Module) -> tuple[int, int]:
    """Numbers of frozen and trained weights in the linear layers of `module`, without adapters.

    A weight with an adapter is frozen.
    """
    frozen = trained = 0
    for name, layer in module.named_modules():
        if "lora_" in name or not isinstance(layer, nn.Linear | nn.Conv3d):
            continue
        if layer.weight.requires_grad:
            trained += layer.weight.numel()
        else:
            frozen += layer.weight.numel()
    return frozen, trained


def _visible(prompt: int, branches: list[int]) -> int:
    """Number of visible (query, key) pairs of a study."""
    own = sum(n * (n + 1) // 2 for n in (prompt, *branches))
    return own + prompt * sum(branches)

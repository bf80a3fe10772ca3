"""Names and sizes of the measurements. Importing this module does not load torch, as the parent
process and the report use it."""

from __future__ import annotations

from typing import Any

HEADS = {"7B": (3584, 152064), "3B": (2048, 151936), "0.5B": (896, 151936)}
"""D, V of Qwen2.5-VL's 7B and 3B and of Qwen2.5's 0.5B."""
TOKENS = 8192
"""T of the headline and of the predictions."""
FROZEN = "frozen head, reference on-line"
TRAINED = "trained head, reference on-line"
LSE_ONLY = "log-probs alone"
VENDOR_SETTINGS = ("vendor default", "fp32 sums")
"""Settings of the vendor library's GEMM: its default, and our op's (chunked.fp32_sums)."""
CLASSES = (
    *("products", "attention", "elementwise", "reductions", "copies and casts", "ours", "other"),
)
"""Kernel classes of a profile (bench/gpu/kernel_times.py)."""
LOG_2, LOSS_ERROR = 0.6931472, 2e-2
"""Loss of an untrained step, and its tolerance."""
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours": ("auto", {}),
    "ours, fused": ("auto, fused", {"fused": True}),
    "ours, compiled": ("auto, compiled", {"compile": True}),
    "ours, gathered": ("gathered", {"attention": "gathered"}),
    "ours, flex": ("flex", {"attention": "flex"}),
}
"""Our steps: (check in bench/gpu/attention.py, options of bench.step_sizes.run that differ from
PackedModel's defaults)."""
ATTENTION_CHECK = "attention {}: against float32"

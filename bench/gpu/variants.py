"""The variants of the loss op to check and time; "cuda" has one per path.

Importing this module does not load torch: the parent process needs only the names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

IMPLEMENTATIONS = ("triton lean", "cuda rows", "cuda fused", "cpu", "reference")
"""In order of priority."""
REPORTED = (*IMPLEMENTATIONS, "triton lse", "triton masked")
"""Includes two Triton kernels, removed because they were slower, which earlier results list."""
CHECKED = {
    "cuda": tuple(name for name in IMPLEMENTATIONS if name != "cpu"),
    "cpu": ("cpu", "reference"),
}
"""Variants of the smoke check, by device."""
PARTS = {
    "triton": {"lean": "triton lean"},
    "cuda": {"rows": "cuda rows", "fused": "cuda fused"},
}


def list_variants(device: str) -> list[str]:
    """Variants that run on this device, in order of priority."""
    import torch

    from cpo_fast.loss import available_impls

    found: set[str] = set()
    for impl in available_impls(device):
        found.update(PARTS.get(impl, {"": impl}).values())
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        found.discard("cuda fused")
    return [name for name in IMPLEMENTATIONS if name in found]


def explain_absence(variant: str, device: str) -> str | None:
    """Why `list_variants` does not list this variant; None if it does."""
    here = list_variants(device)
    if variant in here:
        return None
    from cpo_fast.loss.api import impl_obstacles

    impl = variant.partition(" ")[0]
    return impl_obstacles(device).get(impl) or f"{variant} does not run on this device"


@contextlib.contextmanager
def force_variant(variant: str) -> Iterator[str]:
    """Yields the `impl` of a variant; its path is forced within the block."""
    impl, _, part = variant.partition(" ")
    if impl == "cuda":
        from cpo_fast.loss import cuda

        with cuda.forced_path(part):
            yield impl
    else:
        yield impl


def find_obstacle(
    variant: str, dtype: torch.dtype, D: int = 8, *, plain: bool = True, device: str = "cuda"
) -> str | None:
    """Why a variant, as documented, does not support such inputs; None if it must."""
    import torch

    if variant.startswith("cuda") and dtype == torch.float32:
        return "float32 needs the reference or Triton"
    if variant == "cuda fused":
        if dtype != torch.bfloat16:
            return "the fused path needs bfloat16"
        if D % 8:
            return "the fused path needs a hidden size that is a multiple of 8"
        if not plain:
            return "the fused path does not support bias or soft cap"
    if variant.startswith("triton") and device == "cpu" and dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 products incorrectly"
    return None

"""The variants that are checked and timed: "cuda" has one per path.

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
"""With a log-sum-exp and a row kernel in Triton that were slower and are removed: earlier results
list them."""
CHECKED = {
    "cuda": tuple(name for name in IMPLEMENTATIONS if name != "cpu"),
    "cpu": ("cpu", "reference"),
}
"""Variants of the smoke check, by device."""
PARTS = {
    "triton": {"lean": "triton lean"},
    "cuda": {"rows": "cuda rows", "fused": "cuda fused"},
}


def variants(device: str) -> list[str]:
    """Names for `using` that run here, in order of priority."""
    import torch

    from cpo_fast.loss import available_impls

    found: set[str] = set()
    for impl in available_impls(device):
        found.update(PARTS.get(impl, {"": impl}).values())
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        found.discard("cuda fused")
    return [name for name in IMPLEMENTATIONS if name in found]


def why_not(variant: str, device: str) -> str | None:
    """Why `variants` does not list this variant; None if it does."""
    here = variants(device)
    if variant in here:
        return None
    from cpo_fast.loss.api import impl_obstacles

    impl = variant.partition(" ")[0]
    return impl_obstacles(device).get(impl) or f"{variant} does not run on this device"


@contextlib.contextmanager
def using(variant: str) -> Iterator[str]:
    """The `impl` of a variant; its path is forced within the block."""
    impl, _, part = variant.partition(" ")
    if impl == "cuda":
        from cpo_fast.loss import cuda

        with cuda.forced_path(part):
            yield impl
    else:
        yield impl


def obstacle(
    variant: str, dtype: torch.dtype, D: int = 8, *, plain: bool = True, device: str = "cuda"
) -> str | None:
    """Why a variant does not support such inputs by its documentation; None if it must."""
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
        return "Triton's interpreter computes wrong bfloat16 products"
    return None

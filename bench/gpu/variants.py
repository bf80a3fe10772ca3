"""The implementations as they are checked and timed: "cuda" counts twice, once for each path."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from cpo_fast.loss import available_impls


def variants(device: str) -> list[str]:
    """Names for `using`, "reference" first, the preferred one last."""
    names: list[str] = []
    for impl in available_impls(device):
        if impl == "cuda":
            if torch.cuda.get_device_capability() == (9, 0):
                names.append("cuda fused")
            names.append("cuda rows")
        else:
            names.append(impl)
    return names


@contextlib.contextmanager
def using(variant: str) -> Iterator[str]:
    """The `impl` of a variant, with its path forced inside the block."""
    impl, _, path = variant.partition(" ")
    if not path:
        yield impl
        return
    from cpo_fast.loss import cuda

    with cuda.forced_path(path):
        yield impl


def obstacle(
    variant: str, dtype: torch.dtype, D: int = 8, *, plain: bool = True, device: str = "cuda"
) -> str | None:
    """Why a variant takes no such inputs by its documentation; None: it must take them."""
    if variant.startswith("cuda") and dtype == torch.float32:
        return "float32 is for the reference and Triton"
    if variant == "cuda fused":
        if dtype != torch.bfloat16:
            return "the fused path takes bfloat16"
        if D % 8:
            return "the fused path takes hidden sizes that are multiples of 8"
        if not plain:
            return "the fused path takes no bias and no soft cap"
    if variant == "triton" and device == "cpu" and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return None

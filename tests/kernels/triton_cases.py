"""What the Triton tests share: where they run, the rule on errors, heads to try.

The tests of kernels run on a GPU where there is one, else in Triton's interpreter. That must be
chosen before triton is imported, so that without a GPU an ordinary run skips their modules, and
test_triton_interpreter.py runs them in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"
IGNORED = -100
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# In the interpreter `tl.dot` is wrong for bf16 operands, and casts to bf16 cut digits off.
EXACT_FLOATS = FLOATS[:2] if INTERPRETING else FLOATS
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 20.0},
    "temperature": {"temperature": 0.7},
    "all": {"softcap": 20.0, "temperature": 1.3, "bias": True},
}


def skip_unless_runnable() -> None:
    """Leave a test module out where its kernels cannot run."""
    pytest.importorskip("triton")
    if DEVICE == "cpu" and not INTERPRETING:
        pytest.skip("no GPU; test_triton_interpreter.py runs this", allow_module_level=True)


def error(value: Tensor, truth: Tensor) -> float:
    """The largest error where the truth is finite; elsewhere both must be the same infinity."""
    assert not value.isnan().any(), "NaN never passes"
    finite = truth.isfinite()
    assert torch.equal(value[~finite].double(), truth[~finite])
    return float((value.double() - truth)[finite].abs().max()) if finite.any() else 0.0


def assert_as_good(value: Tensor, eager: Tensor, truth: Tensor, band: float) -> None:
    """The rule: an error of at most twice that of eager PyTorch in the same precision, + a band."""
    ours, theirs = error(value, truth), error(eager, truth)
    assert ours <= 2 * theirs + band, f"error {ours:.2e}, eager {theirs:.2e}, band {band:.2e}"


def head_of(T: int, V: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, D], weight [V, D], labels [T] of which some are ignored."""
    torch.manual_seed(T + V + D)
    labels = torch.randint(0, V, (T,))
    labels[T // 2 + 1 :: 3] = IGNORED
    return torch.randn(T, D).to(dtype), torch.randn(V, D).to(dtype), labels

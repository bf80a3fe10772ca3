"""Shared by the Triton tests: device, test heads, stand-ins for a GPU.

The tests of kernels run on a GPU where there is one, else in Triton's interpreter. That must be
chosen before triton is imported, so that without a GPU an ordinary run skips their modules, and
test_triton_interpreter.py runs them in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
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


def add_product_on_cpu(total: Tensor, left: Tensor, right: Tensor) -> None:
    """chunked.add_product for CPU tensors: PyTorch has `out_dtype` on CUDA only."""
    torch.addmm(total, left.to(total.dtype), right.to(total.dtype), out=total)


@contextmanager
def standing_in_for_a_gpu() -> Iterator[None]:
    """In the interpreter: run `impl="triton"` on CPU tensors, planned as on an H100."""
    if DEVICE == "cuda":
        yield
        return
    from cpo_fast.loss import chunked, triton

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "obstacle", lambda device: None)
        patch.setattr(triton, "add_product", add_product_on_cpu)
        patch.setattr(chunked, "multiprocessors", lambda device: 132)
        yield


def head_of(T: int, V: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, D], weight [V, D], labels [T] (some ignored)."""
    torch.manual_seed(T + V + D)
    labels = torch.randint(0, V, (T,))
    labels[T // 2 + 1 :: 3] = IGNORED
    return torch.randn(T, D).to(dtype), torch.randn(V, D).to(dtype), labels

"""SwiGLU and rotary embedding against float64, and a whole model with fused layers: on a GPU where
there is one, else in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from tests.kernels.triton_cases import DEVICE, INTERPRETING, skip_unless_runnable

skip_unless_runnable()

from cpo_fast.kernels import decoder_layer  # noqa: E402
from cpo_fast.kernels.decoder_layer import rotate, swiglu  # noqa: E402

FLOATS = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
if INTERPRETING:
    del FLOATS[torch.bfloat16]  # there, casts to it cut digits off


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def error(found: Tensor, truth: Tensor) -> float:
    assert found.shape == truth.shape
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", list(FLOATS))
@pytest.mark.parametrize("shape", [(1,), (3, 7), (1, 5, 1030)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up, grad = (drawn(*shape, k, dtype=dtype)[..., 0] for k in (1, 2, 3))
    found = [gate.requires_grad_(), up.requires_grad_()]
    truth = [x.detach().double().requires_grad_() for x in found]
    out, expected = swiglu(*found), silu(truth[0]) * truth[1]
    assert out.dtype == dtype and error(out, expected) < FLOATS[dtype]
    grads = torch.autograd.grad((out * grad).sum(), found)
    for a, b in zip(grads, torch.autograd.grad((expected * grad).sum(), truth), strict=True):
        assert a.dtype == dtype and error(a, b) < FLOATS[dtype]


def test_swiglu_far_out_is_finite() -> None:
    gate = torch.tensor([-3e4, -200.0, 0.0, 200.0, 3e4], device=DEVICE, requires_grad=True)
    out = swiglu(gate, torch.ones_like(gate))
    assert out.tolist() == [0.0, 0.0, 0.0, 200.0, 3e4]
    assert torch.autograd.grad(out.sum(), gate)[0].tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("dtype", list(FLOATS))
@pytest.mark.parametrize(("rows", "heads", "size"), [(5, 28, 128), (9, 16, 80), (1, 1, 6)])
def test_rotate(rows: int, heads: int, size: int, dtype: torch.dtype) -> None:
    """With angles of a row's own in both halves, and rows with gaps between them."""
    x = drawn(rows, 2, heads, size, dtype=dtype)[:, 1].requires_grad_()
    cos, sin = drawn(rows, size), drawn(rows, size + 1)[:, 1:]
    grad = drawn(heads, rows, size).transpose(0, 1).to(dtype)
    wide = x.detach().double().requires_grad_()
    turned = torch.cat((-wide[..., size // 2 :], wide[..., : size // 2]), -1)
    expected = wide * cos.double()[:, None] + turned * sin.double()[:, None]
    out = rotate(x, cos, sin)
    assert out.dtype == dtype and out.is_contiguous() and error(out, expected) < FLOATS[dtype]
    (found,) = torch.autograd.grad(out, x, grad)
    (truth,) = torch.autograd.grad(expected, wide, grad.double())
    assert error(found, truth) < FLOATS[dtype]


@pytest.mark.complete
@pytest.mark.skipif(not INTERPRETING, reason="bench.gpu.attention checks the model on a GPU")
def test_a_model_with_fused_layers_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2.5-VL with LoRA on both parts, as if it were on CUDA."""
    from bench.gpu import attention
    from cpo_fast.model import fused

    monkeypatch.setattr(decoder_layer, "BLOCK", 1 << 18)  # few programs: they run one by one
    monkeypatch.setattr(attention, "STUDIES", ((56, 84, 1), (28, 56, 2)))
    model = attention.build_adapted_model(torch.device("cpu"), torch.float32)
    batch = attention.build_pack(torch.device("cpu"))
    truth = attention.compute_outputs(model, batch)
    monkeypatch.setattr(fused, "check_fused", lambda *a, **options: None)
    monkeypatch.setattr(fused, "_supports", lambda *tensors: True)
    made: list[Any] = []
    use = fused.use_fused_layers

    def counting(base: Any, vision: Any) -> None:
        use(base, vision)
        made.extend(type(m).__name__ for m in base.modules() if hasattr(type(m), "_fused"))

    monkeypatch.setattr(fused, "use_fused_layers", counting)
    try:
        found = attention.compute_outputs(model, batch, fused=True)
        assert {name for _, name in fused._replaced} == {
            *("apply_rotary_pos_emb", "apply_rotary_pos_emb_vision")
        }
    finally:
        fused.restore_functions()
    assert max(attention.compare(found, truth).values()) < 1e-5
    # Two decoder layers and four blocks with two norms and an MLP each, and two norms at the ends.
    assert len(made) == 3 * (2 + 4) + 2

"""The choice of fused layers; tests/kernels/test_triton_layers.py tests the kernels."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import silu
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm
from transformers.models.glm4 import modeling_glm4
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP, Qwen2_5_VLRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from cpo_fast.errors import UsageError
from cpo_fast.model import fused


def build_config(**changes: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 21, "hidden_act": "silu", "mlp_bias": False}
    return SimpleNamespace(**sizes | {"hidden_activation": "gelu_pytorch_tanh"} | changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (Qwen2_5_VLRMSNorm(16), True),
        (Qwen3RMSNorm(16, eps=1e-5), True),
        (Gemma3RMSNorm(16), False),  # multiplies by 1 + weight
        (nn.LayerNorm(16), False),
        (nn.Linear(16, 16, bias=False), False),
    ],
)
def test_norms_are_recognised_by_their_output(
    layer: nn.Module, found: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    assert fused.is_rms_norm(layer.to(dtype)) is found


class TwiceUp(Qwen3MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x) * 2)


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (Qwen3MLP(build_config()), True),
        (Qwen2_5_VLMLP(build_config(), bias=True), True),
        (TwiceUp(build_config()), False),
        (Qwen3MLP(build_config(hidden_act="gelu")), False),
        (Gemma3MLP(build_config()), False),
        (nn.Sequential(nn.Linear(16, 16)), False),
    ],
)
def test_gated_mlps_are_recognised_by_their_output(layer: nn.Module, found: bool) -> None:
    layer.train()
    assert fused.is_gated_mlp(layer) is found
    assert all(module.training for module in layer.modules())


def test_layer_with_a_hook_is_not_fused() -> None:
    layer = Qwen3MLP(build_config())
    layer.register_forward_hook(lambda *_: None)
    assert not fused.is_gated_mlp(layer)


def test_only_half_rotations_of_whole_heads_are_replaced() -> None:
    qwen, glm = (m.apply_rotary_pos_emb for m in (modeling_qwen2_5_vl, modeling_glm4))
    assert fused._is_rotation("apply_rotary_pos_emb", qwen)
    assert not fused._is_rotation("apply_rotary_pos_emb", glm)  # rotates neighbours
    vision = modeling_qwen2_5_vl.apply_rotary_pos_emb_vision
    assert fused._is_rotation("apply_rotary_pos_emb_vision", vision)


def test_replaced_functions_are_exact_on_the_cpu_and_restored() -> None:
    before = modeling_qwen2_5_vl.apply_rotary_pos_emb
    home = modeling_qwen2_5_vl.__name__
    try:
        fused._replace(home, "apply_rotary_pos_emb", fused._fused_rotary)
        now = modeling_qwen2_5_vl.apply_rotary_pos_emb
        assert now is not before and now.__module__ == fused.__name__
        fused._replace(home, "apply_rotary_pos_emb", fused._fused_rotary)  # changes nothing
        assert modeling_qwen2_5_vl.apply_rotary_pos_emb is now
        q, k, cos, sin = (torch.randn(shape) for shape in [(1, 4, 3, 8)] * 2 + [(1, 3, 8)] * 2)
        for a, b in zip(now(q, k, cos, sin), before(q, k, cos, sin), strict=True):
            assert torch.equal(a, b)
    finally:
        fused.restore_functions()
    assert modeling_qwen2_5_vl.apply_rotary_pos_emb is before


def test_frozen_tower_mlp_is_padded_with_zero_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    pytest.importorskip("triton")
    from cpo_fast.kernels import decoder_layer

    sizes: list[int] = []

    def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        sizes.append(gate.shape[-1])
        return silu(gate) * up

    monkeypatch.setattr(decoder_layer, "swiglu", swiglu)
    tower = nn.Sequential(Qwen2_5_VLMLP(build_config(), bias=True)).requires_grad_(False)
    x = torch.randn(5, 16)
    expected, state = tower(x), {k: v.clone() for k, v in tower.state_dict().items()}
    fused.use_fused_layers(tower, tower)
    assert torch.allclose(tower(x), expected, atol=1e-6) and sizes == [24]
    assert tower.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in tower.state_dict().items())
    # Later changes of the weights are used.
    tower.load_state_dict({k: 2 * v for k, v in state.items()})
    assert torch.allclose(tower(x), Qwen2_5_VLMLP.forward(tower[0], x)) and sizes == [24, 21]


def test_trained_tower_mlp_keeps_its_size() -> None:
    tower = nn.Sequential(Qwen2_5_VLMLP(build_config(), bias=True))
    fused.use_fused_layers(tower, tower)
    assert type(tower[0]).forward is fused._mlp_forward
    assert isinstance(tower[0], Qwen2_5_VLMLP)


@pytest.mark.parametrize(
    ("device", "dtype", "compile", "message"),
    [
        ("cpu", torch.bfloat16, False, "need a CUDA model .*bfloat16 on cpu"),
        ("cuda", torch.float32, False, "float32 on cuda"),
        ("cuda", torch.bfloat16, True, "either fused or compile"),
    ],
)
def test_unsupported_fusion_is_named(
    device: str, dtype: torch.dtype, compile: bool, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        fused.check_fused(device, dtype, compile=compile)


def test_layers_are_not_fused_by_default() -> None:
    from cpo_fast.model.packed import PackedModel

    assert inspect.signature(PackedModel).parameters["fused"].default is False

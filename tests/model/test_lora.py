"""The fused LoRA layer equals that of peft in the dtype of the base model."""

from __future__ import annotations

import copy
import io
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cpo_fast.model import lora
from cpo_fast.model.build import add_lora
from cpo_fast.model.lora import FusedLinear, lora_linear, use_fused_lora
from cpo_fast.model.packed import PackedModel
from cpo_fast.testing.packed_oracle import (
    TEXTS,
    adapted,
    assert_same_grads,
    groups_of,
    pack_of,
    packed_logps,
    trainable_grads,
)
from cpo_fast.testing.samples import mixed, text_model, vision_language_model
from tests.model.lora_layers import (
    OUT,
    TOKENS,
    WIDE,
    assert_equals_peft,
    build_layer,
    compute_results,
    draw_inputs,
    get_layer,
    perturb,
)

MODELS = {"qwen2": (text_model, TEXTS[:2]), "qwen2.5-vl": (vision_language_model, mixed())}


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)])
def test_value_and_gradients_equal_the_formula(shape: tuple[int, ...], dropout: bool) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(5, 4).double(), torch.randn(5).double()
    sizes = ((2, 4), (5, 2), (*shape, 4), *[(*shape, 4)] * dropout)
    leaves = [torch.randn(size).double().requires_grad_() for size in sizes]

    def fused(
        down: torch.Tensor, up: torch.Tensor, x: torch.Tensor, *dropped: torch.Tensor
    ) -> torch.Tensor:
        return lora_linear(x, weight, bias, down, up, 1.7, *dropped)

    down, up, x = leaves[:3]
    want = linear(x, weight, bias) + 1.7 * linear(linear(leaves[-1], down), up)
    torch.testing.assert_close(fused(*leaves), want, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(fused, leaves)
    assert torch.autograd.gradcheck(
        lambda down, up: fused(down, up, *(leaf.detach() for leaf in leaves[2:])), (down, up)
    )
    for i, leaf in enumerate(leaves):  # one gradient at a time
        rest = [other.detach() for other in leaves]
        assert torch.autograd.gradcheck(lambda t, i=i, r=rest: fused(*r[:i], t, *r[i + 1 :]), leaf)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", ["plain", "rslora"])
def test_float32_layer_equals_peft(bias: bool, rank: str) -> None:
    model = build_layer(bias=bias, use_rslora=rank == "rslora")
    assert_equals_peft(model, draw_inputs(), fused=True, rtol=1e-5)


def test_non_contiguous_input_equals_peft() -> None:
    x = draw_inputs().transpose(0, 1)
    assert_equals_peft(build_layer(), x, fused=True, rtol=1e-5)
    assert_equals_peft(build_layer(), x[:1].expand(9, -1, -1), fused=True, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout_in_full_precision_equals_peft(dtype: torch.dtype) -> None:
    model = build_layer(dtype, lora_dropout=0.4).train()
    first, second = model(draw_inputs(dtype)), model(draw_inputs(dtype))
    assert not torch.equal(first, second)  # dropout is active
    assert_equals_peft(
        model, draw_inputs(dtype), fused=True, rtol=1e-5 if dtype == torch.float32 else 1e-13
    )
    assert_equals_peft(model, draw_inputs(dtype).transpose(0, 1), fused=True, rtol=1e-5)


class FixedDropout(nn.Dropout):
    """Drops the same half of the elements in every call and dtype; counts its calls."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        generator = torch.Generator().manual_seed(5)
        return x * torch.randint(0, 2, x.shape, generator=generator).to(x.dtype) * 2


def fix_dropout(model: Any) -> Any:
    get_layer(model).lora_dropout["default"] = FixedDropout(0.5)
    return model.train()


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_autocast(dtype: torch.dtype, dropout: bool) -> None:
    model, x = build_layer(dtype), draw_inputs(dtype)
    if dropout:
        model = fix_dropout(model)

    def autocast(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype):
            return model(x)

    exact = copy.deepcopy(model).double()
    want = compute_results(exact, x.double())
    usual = compute_results(model, x, autocast)
    use_fused_lora(model)
    assert lora.fused_adapter(get_layer(model), x) == "default"
    got = compute_results(model, x)
    if dropout:
        assert get_layer(model).lora_dropout["default"].calls == 2  # under autocast and fused
    assert got["y"].dtype == got["x"].dtype == dtype
    for name, expected in want.items():
        if name not in ("y", "x"):
            assert got[name].dtype == torch.float32
        error, bound = ((r[name] - expected).norm() for r in (got, usual))
        assert 0 < error <= 1.2 * bound, name


def test_dropout_in_bfloat16_drops_the_given_share() -> None:
    model = build_layer(
        torch.bfloat16, bias=False, r=WIDE, lora_alpha=WIDE, lora_dropout=0.25
    ).train()
    layer = get_layer(model)
    use_fused_lora(model)
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.lora_A["default"].weight.copy_(torch.eye(WIDE))
        layer.lora_B["default"].weight.copy_(torch.eye(OUT)[:, :WIDE])
        torch.manual_seed(0)
        x = torch.ones(2000, WIDE, dtype=torch.bfloat16)
        dropped, base = model(x)[:, :WIDE].float(), model(x)[:, WIDE:]
    assert not base.any()
    kept = dropped > 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)  # 6 sigma: 0.0084
    assert kept.float().mean(0) == pytest.approx(0.75 * torch.ones(WIDE), abs=0.06)
    assert dropped[kept].tolist() == pytest.approx([1 / 0.75] * int(kept.sum()), rel=2**-8)


class Results(TorchDispatchMode):
    """Records (dtype, number of elements) of every tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[torch.dtype, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.made.append((tensor.dtype, tensor.numel()))
        return out


def list_float32_sizes(model: Any) -> list[int]:
    x = draw_inputs(torch.bfloat16)
    with Results() as seen:
        compute_results(model, x)
    drawn = TOKENS * OUT  # the gradient of y, drawn in float32
    sizes = [size for dtype, size in seen.made if dtype == torch.float32]
    sizes.remove(drawn)
    return sizes


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_float32_tensor_is_as_large_as_an_activation(dropout: float) -> None:
    model = build_layer(torch.bfloat16, lora_dropout=dropout).train()
    assert max(list_float32_sizes(model)) >= TOKENS * OUT
    use_fused_lora(model)
    assert max(list_float32_sizes(model)) < TOKENS * WIDE


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_backward_keeps_only_x_and_its_reduction(dropout: float) -> None:
    model = build_layer(torch.bfloat16, lora_dropout=dropout).train()
    use_fused_lora(model)
    weights = {p.data_ptr() for p in model.parameters()}
    x, kept = draw_inputs(torch.bfloat16).requires_grad_(), []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept.append((tensor.dtype, tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    mask = [(torch.bfloat16, x.numel())] if dropout else []  # dropout's own
    assert kept == [*mask, (torch.bfloat16, x.numel()), (torch.bfloat16, TOKENS * 4)]


def test_disabled_adapters_give_the_base_model() -> None:
    base = text_model().bfloat16()
    ids = torch.arange(40)[None]
    want = base(ids).logits.clone()
    model = adapted(base)
    use_fused_lora(model)
    assert not torch.equal(model(ids).logits, want)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_model_equals_peft(
    name: str, checkpointing: bool, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, samples = MODELS[name]
    model = adapted(make(), freeze_vit=False, dropout=dropout).train()
    batch = pack_of(groups_of(samples))
    packed = PackedModel(model)
    names = [n for n, layer in model.named_modules() if isinstance(layer, FusedLinear)]
    assert {n.rsplit(".", 1)[-1] for n in names} >= {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert any("visual" in n for n in names) == (name == "qwen2.5-vl")

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        packed._last = None
        torch.manual_seed(7)
        logps = packed_logps(packed, batch)
        logps.mean().backward()
        return logps.detach(), trainable_grads(model)

    with monkeypatch.context() as patch:
        patch.setattr(lora, "fused_adapter", lambda layer, x: None)
        want, want_grads = run()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    got, grads = run()
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    assert_same_grads(grads, want_grads)


def test_packed_model_uses_fused_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = add_lora(text_model().bfloat16()), pack_of(groups_of(TEXTS[:1]))
    calls: list[torch.dtype] = []

    def counted(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(x.dtype)
        return lora_linear(x, *rest)

    monkeypatch.setattr(lora, "lora_linear", counted)
    packed = PackedModel(model)
    packed.hidden(batch, reference=True)
    assert not calls
    packed.hidden(batch)
    assert calls == [torch.bfloat16] * 7 * model.config.num_hidden_layers


def test_output_layer_is_not_fused() -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(text_model(), config)
    use_fused_lora(model)
    assert type(model.get_base_model().lm_head) is peft.tuners.lora.Linear
    assert sum(isinstance(layer, FusedLinear) for layer in model.modules()) > 0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_of_a_layer_is_exact(dropout: float) -> None:
    model = build_layer(torch.bfloat16, lora_dropout=dropout).train()
    use_fused_lora(model)
    torch.manual_seed(6)
    want = compute_results(model, draw_inputs(torch.bfloat16))
    torch.manual_seed(6)
    got = compute_results(
        model, draw_inputs(torch.bfloat16), lambda x: checkpoint(model, x, use_reentrant=False)
    )
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compiled_layers_are_one_graph(dropout: float) -> None:
    block = perturb(add_lora(text_model().bfloat16(), dropout=dropout)).train()
    use_fused_lora(block)
    mlp = block.get_base_model().model.layers[0].mlp
    width = mlp.down_proj.out_features
    x = torch.randn(1, 9, width, generator=torch.Generator().manual_seed(4)).bfloat16()

    def run(call: Any) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        leaf = x.clone().requires_grad_()
        torch.manual_seed(8)
        y = call(leaf)
        y.float().square().sum().backward()
        assert leaf.grad is not None
        grads = [p.grad.clone() for p in mlp.parameters() if p.grad is not None]
        block.zero_grad()
        return y.detach(), leaf.grad, grads

    graphs: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(mlp, fullgraph=True, backend=backend, dynamic=True)
    y, grad, grads = run(compiled)
    want_y, want_grad, want_grads = run(mlp)
    assert len(graphs) == 1
    assert sum("autograd_function" in str(node.target) for node in graphs[0].graph.nodes) == 3
    torch.testing.assert_close(y, want_y)
    torch.testing.assert_close(grad, want_grad)
    assert len(grads) == 6
    torch.testing.assert_close(grads, want_grads)


def test_state_copy_pickle_and_merge_of_a_fused_layer() -> None:
    model, x = build_layer(), draw_inputs()
    want, names = model(x), list(model.state_dict())
    use_fused_lora(model)
    use_fused_lora(model)
    assert list(model.state_dict()) == names
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert isinstance(get_layer(other), FusedLinear)
        assert get_layer(other).lora_A["default"] is not get_layer(model).lora_A["default"]
        torch.testing.assert_close(other(x), want, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    plain = model.merge_and_unload()
    assert type(plain[0]) is nn.Linear
    torch.testing.assert_close(plain(x), want, rtol=1e-5, atol=1e-5)

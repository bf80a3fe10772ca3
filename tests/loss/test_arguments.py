"""Invalid input: errors name argument and requirement before anything is computed."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from cpo_fast.loss import CPOLoss, available_impls, cpo_loss, implementations, linear_logprobs

V, D, T = 11, 6, 8


def valid() -> dict[str, object]:
    return {
        "hidden": torch.randn(T, D),
        "weight": torch.randn(V, D),
        "labels": torch.randint(0, V, (T,)),
        "segment_ids": torch.tensor([0, 0, 0, 0, 1, 1, 1, -1]),
        "pairs": torch.tensor([[0, 1]]),
        "ref_hidden": torch.randn(T, D),
    }


BAD = {
    "hidden-list": ("hidden", [[1.0]], TypeError, "torch.Tensor"),
    "hidden-3d": ("hidden", torch.randn(1, T, D), ValueError, r"\[T, D\]"),
    "hidden-int": ("hidden", torch.ones(T, D, dtype=torch.int32), TypeError, "bfloat16"),
    "weight-dtype": ("weight", torch.randn(V, D).bfloat16(), TypeError, "float32"),
    "weight-shape": ("weight", torch.randn(V, D + 1), ValueError, r"\[V, 6\]"),
    "weight-device": ("weight", torch.randn(V, D, device="meta"), ValueError, "cpu"),
    "weight-strides": ("weight", torch.randn(D, V).T, ValueError, "contiguous"),
    "labels-dtype": ("labels", torch.zeros(T, dtype=torch.int32), TypeError, "int64"),
    "labels-shape": ("labels", torch.zeros(T + 1, dtype=torch.long), ValueError, r"\[8\]"),
    "labels-high": ("labels", torch.full((T,), V), ValueError, r"\[0, 11\) or -100, got 11"),
    "labels-negative": ("labels", torch.full((T,), -1), ValueError, "-100, got -1"),
    "segments-shape": ("segment_ids", torch.zeros(T, 1).long(), ValueError, r"\[8\]"),
    "segments-low": ("segment_ids", torch.full((T,), -2), ValueError, "-1, got -2"),
    "pairs-shape": ("pairs", torch.zeros(3, 3).long(), ValueError, r"\[P, 2\]"),
    "pairs-high": ("pairs", torch.tensor([[0, 2]]), ValueError, r"\[0, 2\), got 2"),
    "pairs-low": ("pairs", torch.tensor([[-1, 1]]), ValueError, r"\[0, 2\), got -1"),
    "pairs-dtype": ("pairs", torch.tensor([[0.0, 1.0]]), TypeError, "int64"),
    "ref-shape": ("ref_hidden", torch.randn(T - 1, D), ValueError, r"\[8, D\]"),
    "ref-missing": ("ref_hidden", None, ValueError, "exactly one of ref_hidden and ref_logps"),
    "ref-both": ("ref_logps", torch.zeros(2), ValueError, "ref_hidden and ref_logps"),
    "ref-weight-V": ("ref_weight", torch.randn(V + 1, D), ValueError, r"\[11, 6\]"),
    "ref-bias": ("ref_bias", torch.randn(V + 1), ValueError, r"\[11\]"),
    "bias-shape": ("bias", torch.randn(1, V), ValueError, r"\[11\]"),
    "softcap": ("softcap", 0.0, ValueError, "> 0"),
    "softcap-type": ("softcap", "30", TypeError, "number"),
    "beta": ("beta", 0.0, ValueError, "> 0"),
    "beta-nan": ("beta", float("nan"), ValueError, "finite"),
    "loss-type": ("loss_type", "dpo", ValueError, "sigmoid, hinge"),
    "smoothing-high": ("label_smoothing", 1.0, ValueError, "< 1"),
    "average-type": ("average_log_prob", 1, TypeError, "bool"),
    "simpo-gamma": ("simpo_gamma", 0.7, ValueError, "does not use it"),
    "rpo": ("rpo_alpha", -0.1, ValueError, ">= 0"),
    "weights-shape": ("pair_weights", torch.ones(2), ValueError, r"\[1\]"),
    "weights-negative": ("pair_weights", -torch.ones(1), ValueError, ">= 0"),
    "num-segments": ("num_segments", 1, ValueError, r"\[0, 1\) or -1, got 1"),
    "num-segments-type": ("num_segments", 2.0, TypeError, "int"),
    "ignore-index": ("ignore_index", None, TypeError, "int"),
    "impl": ("impl", "fastest", ValueError, "reference"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_argument_is_named_before_computing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, value, error, expected = BAD[case]
    for impl in available_impls("cpu"):
        monkeypatch.setattr(
            f"cpo_fast.loss.{impl}.token_logps", lambda *_, **__: pytest.fail("computed")
        )
    arguments = valid() | {name: value}
    shown = "segment_ids" if case == "num-segments" else name
    with pytest.raises(error, match=expected) as raised:
        cpo_loss(**arguments)
    assert shown in str(raised.value)


@pytest.mark.parametrize(
    ("loss_type", "options", "expected"),
    [
        ("hinge", {"label_smoothing": 0.1}, "label_smoothing"),
        ("robust", {"label_smoothing": 0.5}, "< 0.5"),
        ("exo_pair", {}, "> 0"),
        ("ipo", {"average_log_prob": True}, "average_log_prob"),
        ("simpo", {}, "ref_hidden"),
        ("orpo", {}, "ref_hidden"),
        ("orpo", {"ref_hidden": None, "ref_logps": torch.zeros(2)}, "ref_logps"),
        ("sigmoid", {"ref_hidden": None, "ref_logps": torch.zeros(3)}, "ref_logps"),
        ("sigmoid", {"ref_hidden": None, "ref_logps": torch.full((2,), torch.nan)}, "ref_logps"),
        (
            "sigmoid",
            {"ref_hidden": None, "ref_logps": torch.zeros(2), "ref_weight": torch.zeros(V, D)},
            "ref_weight",
        ),
    ],
)
def test_option_that_the_loss_does_not_use_is_refused(
    loss_type: str, options: dict[str, object], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        cpo_loss(**(valid() | {"loss_type": loss_type} | options))


def test_module_checks_its_options_on_construction() -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        CPOLoss(loss_type="hinge", label_smoothing=0.1)


def test_temperature_must_be_positive() -> None:
    g = valid()
    with pytest.raises(ValueError, match="temperature must be > 0"):
        linear_logprobs(g["hidden"], g["weight"], g["labels"], temperature=0.0)


def test_only_the_reference_accepts_float64() -> None:
    g = valid()
    args = (g["hidden"].double(), g["weight"].double(), g["labels"])
    assert linear_logprobs(*args).dtype == torch.float64
    for impl in available_impls("cpu"):
        if impl == "reference":
            continue
        with pytest.raises(TypeError, match="float64"):
            linear_logprobs(*args, impl=impl)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_sharded_weights_are_gathered(mesh: DeviceMesh) -> None:
    plain = valid() | {"ref_weight": torch.randn(V, D), "bias": torch.randn(V)}
    plain["hidden"].requires_grad_()
    shared = {
        name: distribute_tensor(plain[name], mesh, [Shard(0)])
        for name in ("weight", "bias", "ref_weight")
    }
    losses = [cpo_loss(**arguments).loss for arguments in (plain, plain | shared)]
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss, plain["hidden"])[0] for loss in losses))
    logps = linear_logprobs(plain["hidden"], shared["weight"], plain["labels"])
    assert torch.equal(logps, linear_logprobs(plain["hidden"], plain["weight"], plain["labels"]))


def test_sharded_trained_weight_is_refused(mesh: DeviceMesh) -> None:
    """Except as a full tensor with gradient placements."""
    g = valid()
    weight = distribute_tensor(g["weight"], mesh, [Shard(0)]).requires_grad_()
    with pytest.raises(ValueError, match=r"weight .*full_tensor"):
        linear_logprobs(g["hidden"], weight, g["labels"])
    with torch.no_grad():
        linear_logprobs(g["hidden"], weight, g["labels"])
    whole = weight.full_tensor(grad_placements=[Partial("avg")])
    linear_logprobs(g["hidden"], whole, g["labels"]).sum().backward()
    leaf = g["weight"].clone().requires_grad_()
    linear_logprobs(g["hidden"], leaf, g["labels"]).sum().backward()
    torch.testing.assert_close(weight.grad.full_tensor(), leaf.grad)


def test_head_sharded_by_fsdp2(mesh: DeviceMesh) -> None:
    """A trained head works in the forward of its FSDP2 module, a frozen head also outside."""

    class Head(nn.Linear):
        def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
            return linear_logprobs(hidden, self.weight, labels, bias=self.bias)

    plain = Head(D, V)
    sharded = copy.deepcopy(plain)
    fully_shard(sharded, mesh=mesh)
    assert isinstance(sharded.weight, DTensor)
    g = valid()
    for head in (plain, sharded):
        head(g["hidden"], g["labels"]).sum().backward()
    for got, want in zip(sharded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad.full_tensor(), want.grad)
    sharded.requires_grad_(False)
    got = linear_logprobs(g["hidden"], sharded.weight, g["labels"], bias=sharded.bias)
    assert torch.equal(
        got, linear_logprobs(g["hidden"], plain.weight, g["labels"], bias=plain.bias)
    )


def test_sharded_hidden_is_refused(mesh: DeviceMesh) -> None:
    g = valid()
    hidden = distribute_tensor(g["hidden"], mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"hidden .*full_tensor"):
        linear_logprobs(hidden, g["weight"], g["labels"])


def test_import_loads_torch_only() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import cpo_fast.loss; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(new, 'torch._dynamo' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "{'cpo_fast'} False"


def test_a_step_with_the_op_loads_no_compiler() -> None:
    code = """
import sys, torch
from cpo_fast.loss import linear_logprobs
hidden = torch.ones(2, 4, requires_grad=True)
weight = torch.ones(5, 4, requires_grad=True)
linear_logprobs(hidden, weight, torch.tensor([0, 1])).sum().backward()
print([m for m in ("torch._dynamo", "torch._inductor", "sympy") if m in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_choosing_an_implementation_loads_nothing_heavy() -> None:
    code = (
        "import sys; from cpo_fast.loss import cpo_loss, available_impls; available_impls('cpu');"
        "print([m for m in ('transformers', 'peft', 'numpy.testing', 'trl') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_missing_native_module_gives_the_reference_and_one_warning() -> None:
    code = """
import sys, warnings
sys.modules["cpo_fast._cpu"] = None
import torch
from cpo_fast.loss import available_impls, linear_logprobs
assert available_impls("cpu") == ("reference",), available_impls("cpu")
args = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    linear_logprobs(*args)
    linear_logprobs(*args)
assert len(seen) == 1 and "_cpu" in str(seen[0].message), seen
try:
    linear_logprobs(*args, impl="cpu")
except ValueError as error:
    assert "impl" in str(error)
else:
    raise AssertionError("an explicit impl must not fall back")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_triton_is_preferred_to_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, `impl=None` prefers Triton to the CUDA kernels."""
    everything = {
        name: SimpleNamespace(obstacle=lambda device: None) for name in implementations.IMPLS
    }
    monkeypatch.setattr(implementations, "_modules", everything)
    names = available_impls("cuda")
    assert names.index("cuda") < names.index("triton")

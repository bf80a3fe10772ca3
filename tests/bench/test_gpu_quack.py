"""Calls of the peer quack, whose kernels need a GPU, with a fake module."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor

from bench import loss_peers
from bench.gpu import loss
from bench.gpu.units import Setting

pytestmark = pytest.mark.complete


def replace_quack(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Replace quack by plain PyTorch with its contract: losses and unscaled gradients of rows
    padded to 128. Returns, per call, whether a gradient was requested."""
    gradients: list[bool] = []

    def parts(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logp = (x.double() @ weight.double().t()).log_softmax(-1)
        losses = -logp.gather(1, target[:, None]).squeeze(1)
        slopes = logp.exp() @ weight.double() - weight.double()[target]
        return losses.float(), slopes.to(x.dtype)

    def forward(
        x: Tensor, weight: Tensor, target: Tensor, rows: int, *, need_dx: bool, need_dw: bool
    ) -> tuple[Tensor, Tensor, None]:
        assert need_dx and not need_dw and rows % 128 == 0
        gradients.append(True)
        losses, slopes = parts(x, weight, target)
        padding = -len(losses) % 128
        pad = torch.nn.functional.pad
        return pad(losses, (0, padding)), pad(slopes, (0, 0, 0, padding)), None

    def loss_only(x: Tensor, weight: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        gradients.append(False)
        return parts(x, weight, target)[0]

    module = types.ModuleType("quack.linear_cross_entropy")
    module.scaled_exp_lce_supported = lambda *_: True  # type: ignore[attr-defined]
    module.scaled_exp_linear_cross_entropy_fwd = forward  # type: ignore[attr-defined]
    module._scaled_exp_lce_loss_only = loss_only  # type: ignore[attr-defined]
    package = types.ModuleType("quack")
    package.linear_cross_entropy = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "quack", package)
    monkeypatch.setitem(sys.modules, "quack.linear_cross_entropy", module)
    return gradients


def test_quack_matches_eager(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gradients = replace_quack(monkeypatch)
    shape = (40, 24, 300)
    grads = {}
    for name in ("eager", "quack"):
        p = loss_peers.make_problem(shape, loss.FROZEN)
        value = loss_peers.PEERS[name](p)
        grads[name] = (value.detach(), *torch.autograd.grad(value, [p.hidden]))
    for got, want in zip(grads["quack"], grads["eager"], strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=0.02, atol=1e-3)
    assert gradients == [True, False], "the policy with its gradient, the reference without"
    with pytest.raises(loss_peers.CannotCompute):
        loss_peers.compute_quack(loss_peers.make_problem(shape, loss.TRAINED))


def test_the_quack_plan_measures_ours_first() -> None:
    keys = [
        unit.key.rpartition(": ")[2] for unit in loss.list_quack_units(Setting("cpu", True, "."))
    ]
    assert keys[-2:] == ["eager", "quack"] and keys[0] in ("cpu", "reference")

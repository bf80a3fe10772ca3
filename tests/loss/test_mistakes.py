"""The table of common mistakes in docs/op.md: arguments and their messages."""

from __future__ import annotations

import re
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cpo_fast.loss import CPOLoss, cpo_loss
from tests.docs_blocks import ROOT
from tests.loss.test_arguments import D, T, V, valid

HEAD = nn.Linear(D, V)


def drop_reference(**more: Any) -> dict[str, Any]:
    return {**more, "ref_hidden": None}


def set_label(place: int, value: int) -> torch.Tensor:
    labels = torch.zeros(T, dtype=torch.long)
    labels[place] = value
    return labels


def build_model() -> nn.Module:
    module = nn.Module()
    module.lm_head = HEAD
    return module


# Row of the table -> the arguments that replace valid ones.
MISTAKES: dict[str, dict[str, Any]] = {
    "logits as `hidden`": {"hidden": torch.randn(T, V)},
    "logits as `ref_hidden`": {"ref_hidden": torch.randn(T, V)},
    "`hidden` [B, L, D]": {"hidden": torch.randn(2, T // 2, D)},
    "`outputs.hidden_states`, a tuple": {"hidden": (torch.randn(T, D), torch.randn(T, D))},
    "the output of a transformers model as `hidden`": {
        "hidden": SimpleNamespace(last_hidden_state=torch.randn(T, D))
    },
    "a NumPy array": {"labels": torch.zeros(T).long().numpy()},
    "a list": {"pairs": [[0, 1]]},
    "an `nn.Linear` as `weight`": {"weight": HEAD},
    "the model as `weight`": {"weight": build_model()},
    "`weight` [D, V]": {"weight": torch.randn(D, V)},
    "`weight` in another dtype than `hidden`": {"weight": torch.randn(V, D).bfloat16()},
    "bfloat16 `ref_hidden` with float32 `hidden`": {"ref_hidden": torch.randn(T, D).bfloat16()},
    "`ref_hidden` of a reference of another size, no `ref_weight`": {
        "ref_hidden": torch.randn(T, D - 1)
    },
    "float64 `ref_hidden` and `ref_weight` with float32 `hidden`": {
        "ref_hidden": torch.randn(T, D).double(), "ref_weight": torch.randn(V, D).double(),
    },
    "a tensor on another device": {"labels": torch.zeros(T, dtype=torch.long, device="meta")},
    "`labels` one shorter than `hidden`": {"labels": torch.zeros(T - 1).long()},
    "`labels` [B, L]": {"labels": torch.zeros(2, T // 2).long()},
    "float `labels`": {"labels": torch.zeros(T)},
    "a label beyond the rows of `weight`": {"labels": set_label(3, V)},
    "labels -1 for padding": {"labels": set_label(7, -1)},
    "only ignored `labels`": {"labels": torch.full((T,), -100)},
    "lengths as `segment_ids`": {"segment_ids": torch.tensor([4, 4])},
    "a boolean mask as `segment_ids`": {"segment_ids": torch.ones(T).bool()},
    "a pair beyond the segments": {"pairs": torch.tensor([[0, 2]])},
    "`pairs` [2, P], P not 2": {"pairs": torch.tensor([[0, 1, 0], [1, 0, 1]])},
    "`pairs` [2, 2] transposed, a segment twice in a row": {
        "pairs": torch.tensor([[0, 0], [1, 2]]),  # (0, 1) and (0, 2)
        "num_segments": 3,
    },
    "a pair (i, i)": {"pairs": torch.tensor([[1, 1]])},
    "one pair as [2]": {"pairs": torch.tensor([0, 1])},
    "`pairs` as a tuple of chosen and rejected": {"pairs": (torch.tensor([0]), torch.tensor([1]))},
    "int32 `pairs`": {"pairs": torch.tensor([[0, 1]], dtype=torch.int32)},
    "a trained `weight`, `ref_hidden`, no `ref_weight`": {
        "weight": torch.randn(V, D, requires_grad=True)
    },
    "a trained `bias`, `ref_hidden`, no `ref_bias`": {
        "bias": torch.randn(V, requires_grad=True), "ref_weight": torch.randn(V, D),
    },
    "log-probs per token as `ref_logps`": drop_reference(ref_logps=-torch.ones(T)),
    "losses as `ref_logps`": drop_reference(ref_logps=torch.tensor([12.0, 9.5])),
    "`beta` as a tensor": {"beta": torch.tensor(0.1)},
    "`beta` as a str": {"beta": "0.1"},
    '`loss_type="dpo"`': {"loss_type": "dpo"},
    '`loss_type="apo"`': {"loss_type": "apo"},
    "a misspelt `loss_type`": {"loss_type": "sigmiod"},
    "a list as `loss_type`": {"loss_type": ["sigmoid"]},
}  # fmt: skip


def parse_table() -> dict[str, tuple[str, list[str]]]:
    """Row of the table -> (error or warning, quoted parts of its message)."""
    text = (ROOT / "docs" / "op.md").read_text(encoding="utf-8")
    (rows,) = re.findall(r"\| passed \| answer \| message \|\n\|[-|]+\n((?:\|.*\n)+)", text)
    cells = [line.strip("| \n").split(" | ") for line in rows.splitlines()]
    assert all(len(row) == 3 for row in cells), cells
    return {name: (kind, re.findall(r"`([^`]+)`", message)) for name, kind, message in cells}


def test_page_lists_every_mistake() -> None:
    assert list(parse_table()) == list(MISTAKES)


@pytest.mark.parametrize("name", list(MISTAKES))
def test_message_is_the_documented_one(name: str) -> None:
    kind, pieces = parse_table()[name]
    arguments = valid() | MISTAKES[name]
    if kind == "warning":
        with pytest.warns(UserWarning) as seen:
            out = cpo_loss(**arguments)
        assert out.loss.isfinite() and len(seen) == 1
        message = str(seen[0].message)
        assert seen[0].filename == __file__  # the caller's line
    else:
        error = {"ValueError": ValueError, "TypeError": TypeError}[kind]
        with pytest.raises(error) as raised:
            cpo_loss(**arguments)
        message = str(raised.value)
    assert next(iter(MISTAKES[name])) in message
    assert pieces and all(piece in message for piece in pieces), message


def compute_loss(arguments: dict[str, Any]) -> torch.Tensor:
    """The loss; warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return cpo_loss(**arguments).loss


def test_explicit_reference_head_gives_no_warning() -> None:
    given = valid()
    weight, bias = (x.requires_grad_() for x in (given["weight"], torch.randn(V)))
    given |= {"bias": bias}
    with pytest.warns(UserWarning, match="trained"):
        want = cpo_loss(**given).loss
    gradient = torch.autograd.grad(want, (weight, bias))
    for head in (weight, weight.detach()):
        shift = bias if head is weight else bias.detach()
        got = compute_loss(given | {"ref_weight": head, "ref_bias": shift})
        assert torch.equal(got, want)
        for one, other in zip(torch.autograd.grad(got, (weight, bias)), gradient, strict=True):
            torch.testing.assert_close(one, other)
    moved = compute_loss(given | {"ref_weight": torch.randn(V, D), "ref_bias": torch.zeros(V)})
    assert not torch.isclose(moved, want)
    compute_loss(given | {"ref_hidden": None, "ref_logps": torch.zeros(2)})
    compute_loss(given | {"weight": weight.detach(), "bias": bias.detach()})


def test_module_raises_the_same_errors() -> None:
    with pytest.raises(ValueError, match="'sigmoid' is the DPO loss"):
        CPOLoss(loss_type="dpo")
    with pytest.raises(TypeError, match="loss_type must be a str, got tuple"):
        CPOLoss(loss_type=("sigmoid", "hinge"))


def test_reference_of_another_dtype_needs_its_own_head() -> None:
    """Policy and reference need one dtype only if they share a head."""
    given = valid()
    states, head = torch.randn(T, D).bfloat16(), torch.randn(V, D).bfloat16()
    got = compute_loss(given | {"ref_hidden": states, "ref_weight": head})
    want = compute_loss(given | {"ref_hidden": states.float(), "ref_weight": head.float()})
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    mixed = given | {"ref_hidden": states, "ref_weight": head, "bias": torch.randn(V)}
    with pytest.raises(TypeError, match=r"bias must be torch\.bfloat16 as ref_hidden is"):
        cpo_loss(**mixed)


def test_autocast_casts_any_half_precision() -> None:
    given = valid()
    with torch.autocast("cpu", torch.bfloat16):
        loss = compute_loss(given | {"ref_hidden": given["ref_hidden"].bfloat16()})
        assert loss.isfinite()
        with pytest.raises(TypeError, match=r"weight must be .*got torch\.float64"):
            cpo_loss(**(given | {"weight": given["weight"].double()}))

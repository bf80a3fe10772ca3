"""from_padded: a padded batch reaches cpo_loss, with the loss and gradients of plain logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cpo_fast import cpo_loss, from_padded
from cpo_fast.testing.samples import images, preference, text_model, tokenizer
from tests.docs_blocks import ROOT, blocks

PAIRS = torch.tensor([[0, 2], [1, 3], [0, 3]])


def build_batch(left: bool, seed: int = 0) -> dict[str, Tensor]:
    """Two chosen and two rejected rows of different lengths, with the keys of trl's collator."""
    g = torch.Generator().manual_seed(seed)
    lengths, prompts, longest = (12, 9, 7, 10), (4, 6, 4, 6), 12
    parts: dict[str, list[Tensor]] = {
        n: [] for n in ("input_ids", "attention_mask", "completion_mask")
    }
    for length, prompt in zip(lengths, prompts, strict=True):
        rest = longest - length
        space = (rest, 0) if left else (0, rest)
        ids = torch.randint(5, 400, (length,), generator=g)
        answer = (torch.arange(length) >= prompt).long()
        for name, row in zip(parts, (ids, torch.ones_like(ids), answer), strict=True):
            parts[name].append(F.pad(row, space))
    return {name: torch.stack(rows) for name, rows in parts.items()}


def build_models() -> tuple[Any, Any]:
    """Policy and reference with different weights, including the head."""
    policy, reference = text_model(), text_model().requires_grad_(False)
    g = torch.Generator().manual_seed(1)
    for parameter in policy.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=g)
    return policy, reference


def compute_plainly(policy: Any, reference: Any, parts: dict[str, Tensor], pairs: Tensor) -> Tensor:
    """The DPO loss at beta 0.1 from full logits, one answer at a time."""
    inputs = {name: parts[name] for name in ("input_ids", "attention_mask")}
    margins = []
    logps = [m(**inputs).logits.double().log_softmax(-1) for m in (policy, reference)]
    for chosen, rejected in pairs.tolist():
        ours, theirs = (
            sum(
                sign * found[row, at - 1, parts["input_ids"][row, at]]
                for sign, row in ((1, chosen), (-1, rejected))
                for at in parts["completion_mask"][row].nonzero()[:, 0].tolist()
            )
            for found in logps
        )
        margins.append(ours - theirs)
    return -F.logsigmoid(0.1 * torch.stack(margins)).mean()


def gradients(loss: Tensor, model: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def read_snippet() -> str:
    """The lines of docs/op.md from a batch to the gradients."""
    (block,) = (
        b for b in blocks(ROOT / "docs" / "op.md") if "import cpo_loss, from_padded" in b.text
    )
    return block.text


def run_snippet(policy: Any, reference: Any, parts: dict[str, Tensor]) -> dict[str, Any]:
    names: dict[str, Any] = {"torch": torch, "model": policy, "reference": reference}
    exec(read_snippet(), names | (space := {"batch": parts}), space)
    return space


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_snippet_of_the_page_equals_full_logits(left: bool) -> None:
    assert len(read_snippet().strip().splitlines()) <= 15
    policy, reference = build_models()
    parts = build_batch(left)
    want = compute_plainly(policy, reference, parts, PAIRS[:2])
    expected_grads = gradients(want, policy)
    got = run_snippet(policy, reference, parts)["out"].loss
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    assert abs(want.item() - 0.6931) > 0.01
    for parameter, expected in zip(policy.parameters(), expected_grads, strict=True):
        worst = (parameter.grad - expected).abs().max()
        assert worst <= 1e-4 * expected.abs().max() + 1e-8


def test_snippet_of_the_page_equals_trl(tmp_path: Any) -> None:
    pytest.importorskip("trl")
    from cpo_fast.testing.trl_oracle import trainer

    samples = [preference("a", 1, words=5), preference("b", 1), preference("c", 1, words=2)]
    policy, reference = build_models()
    theirs = trainer(
        text_model(), samples, tokenizer(), images(), output_dir=str(tmp_path), r=0, alpha=1
    )
    theirs.model.load_state_dict(policy.state_dict())
    theirs.model.eval()
    parts = dict(theirs.data_collator([theirs.train_dataset[i] for i in range(3)]))
    want = theirs.compute_loss(theirs.model, parts)
    want.backward()
    got = run_snippet(policy.eval(), reference.eval(), parts)["out"].loss
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert abs(want.item() - 0.6931) > 0.01
    for mine, other in zip(policy.parameters(), theirs.model.parameters(), strict=True):
        worst = (mine.grad - other.grad).abs().max()
        assert worst <= 1e-4 * other.grad.abs().max() + 1e-8


def build_states(B: int = 4, L: int = 6, D: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    hidden = torch.randn(B, L, D, generator=g, requires_grad=True)
    labels = torch.randint(0, 11, (B, L), generator=g)
    labels[:, :3] = -100
    return hidden, labels, torch.randn(B, L, D, generator=g)


def test_dropping_ignored_tokens_changes_nothing_else() -> None:
    hidden, labels, ref_hidden = build_states()
    labels[1, 4:] = -100
    weight = torch.randn(11, 8, generator=torch.Generator().manual_seed(3))
    results = []
    for drop in (False, True):
        given = from_padded(hidden, labels, ref_hidden, pairs=PAIRS, drop_ignored=drop)
        rows = 3 + 1 + 3 + 3 if drop else 24
        assert given["hidden"].shape == (rows, 8) and given["ref_hidden"].shape == (rows, 8)
        assert given["num_segments"] == 4 and torch.equal(given["pairs"], PAIRS)
        out = cpo_loss(weight=weight, **given)
        results.append((*out, *torch.autograd.grad(out.loss, hidden)))
    for kept, dropped in zip(*results, strict=True):
        torch.testing.assert_close(dropped, kept)
    assert (given["labels"] >= 0).all()


def test_hidden_states_are_views_and_labels_are_shifted() -> None:
    hidden, labels, ref_hidden = build_states(B=2)
    given = from_padded(hidden, labels, ref_hidden)
    assert given["hidden"].data_ptr() == hidden.data_ptr()
    assert given["ref_hidden"].data_ptr() == ref_hidden.data_ptr()
    want = [[*row[1:], -100] for row in labels.tolist()]
    assert given["labels"].tolist() == want[0] + want[1]
    assert given["segment_ids"].tolist() == [0] * 6 + [1] * 6
    assert given["pairs"].tolist() == [[0, 1]]
    own = from_padded(hidden, labels.where(labels >= 0, 7), ignore_index=7)
    assert own["labels"][5] == 7 and own["ref_hidden"] is None


def test_batches_without_reference_or_rows() -> None:
    hidden, labels, _ = build_states()
    weight = torch.randn(11, 8)
    out = cpo_loss(weight=weight, loss_type="simpo", **from_padded(hidden, labels))
    assert out.losses.shape == (2,) and out.loss.requires_grad
    none = from_padded(hidden[:0], labels[:0])
    assert none["pairs"].shape == (0, 2) and none["hidden"].shape == (0, 8)


def test_loss_of_a_padded_batch_is_one_graph() -> None:
    hidden, labels, ref_hidden = build_states()
    weight = torch.randn(11, 8)

    def step(h: Tensor) -> Tensor:
        return cpo_loss(weight=weight, **from_padded(h, labels, ref_hidden)).loss

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    want = torch.autograd.grad(step(hidden), hidden)
    torch.testing.assert_close(torch.autograd.grad(compiled(hidden), hidden), want)


BAD = {
    "flat": ({"hidden": torch.randn(8, 8)}, ValueError, r"hidden must have shape \[B, L, D\]"),
    "shifted": ({"hidden": torch.randn(4, 5, 8)}, ValueError, "labels must .*from_padded shifts"),
    "labels": ({"labels": torch.zeros(4, 6)}, TypeError, r"labels must be torch\.int64"),
    "reference": ({"ref_hidden": torch.randn(4, 5, 8)}, ValueError, "ref_hidden must have shape"),
    "odd": (
        {"hidden": torch.randn(3, 6, 8), "labels": torch.zeros(3, 6).long(), "ref_hidden": None},
        ValueError,
        "even number of rows .* got 3: pass pairs",
    ),
    "transposed": ({"pairs": PAIRS.T}, ValueError, r"pairs must .*pass pairs\.T"),
    "same": ({"pairs": torch.tensor([[2, 2]])}, ValueError, "two different segments"),
    "beyond": ({"pairs": torch.tensor([[0, 4]])}, ValueError, "got 4 .*rows of the batch"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_batches_are_refused(case: str) -> None:
    changed, error, message = BAD[case]
    hidden, labels, ref_hidden = build_states()
    given = {"hidden": hidden, "labels": labels, "ref_hidden": ref_hidden, **changed}
    with pytest.raises(error, match=message):
        from_padded(**given)

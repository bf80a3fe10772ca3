"""Loss and adapter gradients of one step equal trl's DPOTrainer on the same pairs."""

from __future__ import annotations

import pytest
import torch

from cpo_fast.loss import cpo_loss
from cpo_fast.model.build import add_lora
from cpo_fast.model.packed import PackedModel
from cpo_fast.testing.packed_oracle import adapted, groups_of, pack_of
from cpo_fast.testing.samples import (
    image,
    images,
    preference,
    text_model,
    tokenizer,
    vision_language_model,
)

CASES = {
    "images": (
        vision_language_model,
        [
            preference("a", 2, image(100, 80), words=9),
            preference("b", 1, image(300, 200)),
            preference("c", 3, image(56, 56), words=2),
        ],
    ),
    "text": (text_model, [preference("a", 3, words=9), preference("b", 1), preference("c", 2)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True], ids=["first-step", "later"])
@pytest.mark.parametrize("case", CASES)
def test_step_equals_trl(case, trained, tmp_path):
    from cpo_fast.testing.trl_oracle import trainer

    build, samples = CASES[case]
    ours = adapted(build()) if trained else add_lora(build(), r=4, alpha=8)
    theirs = trainer(
        build(), samples, tokenizer(), images(), output_dir=str(tmp_path), r=4, alpha=8
    )
    mine = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    peer = {n: p for n, p in theirs.model.named_parameters() if p.requires_grad}
    assert mine.keys() == peer.keys()
    for name, parameter in peer.items():
        parameter.data.copy_(mine[name].data)

    theirs.model.eval()
    batch = theirs.data_collator([theirs.train_dataset[i] for i in range(6)])
    want = theirs.compute_loss(theirs.model, batch)
    want.backward()

    packed = pack_of(groups_of(samples))
    model = PackedModel(ours)
    out = cpo_loss(
        model.hidden(packed),
        model.head()[0],
        packed.labels,
        packed.segment_ids,
        packed.pairs,
        ref_hidden=model.hidden(packed, reference=True),
        impl="reference",
    )
    out.loss.backward()

    torch.testing.assert_close(out.loss, want, rtol=1e-5, atol=1e-6)
    if not trained:
        assert abs(out.loss.item() - 0.693147) < 1e-5
    for name, parameter in mine.items():
        expected = peer[name].grad
        assert trained or "lora_A" in name or expected.abs().max() > 0
        worst = (parameter.grad - expected).abs().max()
        assert worst <= 1e-4 * expected.abs().max() + 1e-9, name

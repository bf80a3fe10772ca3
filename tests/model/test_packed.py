"""The forward over a pack equals separate, unpacked forwards of the same model."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cpo_fast.errors import UsageError
from cpo_fast.model.build import add_lora, freeze_vision, tiny_model
from cpo_fast.model.packed import PackedModel
from cpo_fast.packing import plan_epoch
from cpo_fast.testing.packed_oracle import (
    TEXTS,
    adapted,
    assert_same_grads,
    dpo_loss,
    groups_of,
    pack_of,
    packed_logps,
    separate_logps,
    trainable_grads,
)
from cpo_fast.testing.samples import (
    image,
    mixed,
    preference,
    text_model,
    tokenizer,
    vision_language_model,
)
from cpo_fast.types import ImageRef

RADIOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "cxr_images" / "png"


def test_frozen_tower_runs_once_and_a_trained_one_twice():
    batch = pack_of(groups_of(mixed()))
    for freeze_vit, runs in ((True, 1), (False, 2)):
        model = add_lora(vision_language_model(), freeze_vit=freeze_vit)
        calls: list[int] = []
        tower = model.base_model.model.model.visual
        tower.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        packed = PackedModel(model)
        packed.hidden(batch)
        packed.hidden(batch, reference=True)
        assert len(calls) == runs


def test_step_of_many_packs_equals_one_pack():
    """Small packs with split groups have the same summed gradient."""
    model, groups = adapted(vision_language_model()), groups_of(mixed())
    packed = PackedModel(model)
    total = sum(len(g.rejected) for g in groups)

    def grads(packing_length):
        (step,) = plan_epoch(
            groups, pairs_per_step=total, packing_length=packing_length, seed=0, epoch=0
        )
        for pack in step:
            batch = pack_of(groups, pack)
            policy = packed_logps(packed, batch)
            loss = dpo_loss(policy, packed_logps(packed, batch, reference=True), batch)
            (loss * len(batch.pairs) / step.num_pairs).backward()
        return len(step), trainable_grads(model)

    few, want = grads(10_000)
    many, got = grads(150)
    assert few == 1 and many > 3
    assert_same_grads(got, want)


def test_shared_and_copied_prompts_agree():
    model, groups = adapted(vision_language_model()), groups_of(mixed())
    packed = PackedModel(model)
    shared, copied = pack_of(groups), pack_of(groups, share_prompt=False)
    assert len(copied.input_ids) > len(shared.input_ids)
    with torch.no_grad():
        torch.testing.assert_close(
            packed_logps(packed, copied), packed_logps(packed, shared), rtol=0, atol=1e-5
        )


def count_saved_bytes(model, compute) -> int:
    """Bytes that `compute` saves for its backward, without weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    return sum(storage.nbytes() for storage in kept.values())


def test_memory_grows_with_the_row_not_with_prompts_times_responses():
    """Except K and V of the prompt, copied per branch; their share is about that of a 7B model."""
    sizes = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 1}
    model = add_lora(tiny_model(tokenizer(), intermediate_size=640, **sizes))
    packed = PackedModel(model)
    found = {}
    for rejected in (1, 3, 7):
        sample = preference("a", rejected, image(112, 112))
        long = dict(sample.prompt[0])
        long["content"] = [*long["content"], {"type": "text", "text": "opacity " * 300}]
        groups = groups_of([replace(sample, prompt=(long,))])
        shared, copied = pack_of(groups), pack_of(groups, share_prompt=False)
        prompt = len(groups[0].prompt.input_ids)
        responses = len(groups[0].chosen) + sum(map(len, groups[0].rejected))
        assert len(shared.input_ids) == prompt + responses
        assert len(copied.input_ids) == (rejected + 1) * prompt + responses
        found[rejected] = {
            name: (len(batch.input_ids), count_saved_bytes(model, lambda b=batch: packed.hidden(b)))
            for name, batch in (("shared", shared), ("copied", copied))
        }
    tokens, size = found[1]["shared"]
    per_token = size / tokens
    for rejected in (3, 7):
        tokens, size = found[rejected]["shared"]
        assert size < 1.1 * per_token * tokens
        assert size < found[rejected]["copied"][1] / 2


def test_full_tuning_and_gradient_checkpointing():
    model, groups = vision_language_model(), groups_of([preference("sft", 0, image(56, 56))])
    freeze_vision(model)
    batch = pack_of(groups)
    separate_logps(model, groups, batch).mean().backward()
    want = trainable_grads(model)
    assert "lm_head.weight" in want and not any("visual" in name for name in want)
    packed = PackedModel(model)
    for checkpointing in (False, True):
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        packed_logps(packed, batch).mean().backward()
        assert_same_grads(trainable_grads(model), want)
    with pytest.raises(UsageError, match="adapters"):
        packed.hidden(batch, reference=True)


def test_checkpointing_with_adapters():
    model, batch = adapted(vision_language_model()), pack_of(groups_of(mixed()))
    packed = PackedModel(model)
    packed_logps(packed, batch).mean().backward()
    want = trainable_grads(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    packed_logps(packed, batch).mean().backward()
    assert_same_grads(trainable_grads(model), want)


@pytest.mark.complete
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_equal_eager_without_recompiling(checkpointing):
    from torch._dynamo.utils import counters

    model = adapted(vision_language_model()).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = [pack_of(groups_of(samples)) for samples in (mixed(), TEXTS, [preference("c", 1)])]

    def step(packed, batch):
        policy = packed_logps(packed, batch)
        loss = dpo_loss(policy, packed_logps(packed, batch, reference=True), batch)
        loss.backward()
        return loss.item(), trainable_grads(model)

    eager = PackedModel(model)
    want = [step(eager, batch) for batch in batches]
    torch._dynamo.reset()
    counters.clear()
    compiled = PackedModel(model, compile=True)
    graphs = []
    for batch, (loss, grads) in zip(batches, want, strict=True):
        got, got_grads = step(compiled, batch)
        assert got == pytest.approx(loss, abs=1e-5)
        assert_same_grads(got_grads, grads)
        graphs.append(counters["stats"]["unique_graphs"])
    # Five parts of a layer around its attention, with and without gradients, for all layers.
    assert graphs == [10, 10, 10]


def test_bfloat16_is_close_to_float32():
    model, batch = adapted(vision_language_model().bfloat16()), pack_of(groups_of(mixed()))
    exact = adapted(vision_language_model())
    with torch.no_grad():
        want = PackedModel(exact).hidden(batch)
        got = PackedModel(model).hidden(batch)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().mean() < 0.1 * want.abs().mean()


def test_generation_is_unchanged():
    """Without the layout of a pack, the registered attention is plain SDPA."""
    model, groups = vision_language_model(), groups_of([preference("a", 0)])
    ids = torch.tensor([groups[0].prompt.input_ids])
    options = {"max_new_tokens": 5, "do_sample": False}
    want = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    PackedModel(model)
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **options), want)
    assert "cpo_fast" not in model.config.to_json_string()  # not written to a checkpoint


def test_bad_models_and_batches_are_refused():
    with pytest.raises(UsageError, match="attention="):
        PackedModel(text_model(), attention="flash")
    with pytest.raises(UsageError, match=r"CUDA|torch 2\.12"):
        PackedModel(text_model(), attention="varlen")
    with pytest.raises(UsageError, match="CUDA"):
        PackedModel(text_model(), attention="flex")
    batch = pack_of(groups_of([preference("a", 1, image(56, 56))]))
    with pytest.raises(UsageError, match="text-only"):
        PackedModel(text_model()).hidden(batch)
    sliding = text_model()
    sliding.config.layer_types = ["sliding_attention"] * 2
    with pytest.raises(UsageError, match="sliding"):
        PackedModel(sliding)


@pytest.mark.skipif(not RADIOGRAPHS.is_dir(), reason="the radiographs are missing")
def test_real_radiographs():
    """Images 640 pixels wide, of different heights, with synthetic texts."""
    from cpo_fast.model.images import ImageProcessor

    processor = ImageProcessor.create(max_pixels=280 * 280)
    names = sorted(path.name for path in RADIOGRAPHS.glob("*.png"))[:3]
    samples = [preference(n, 2, ImageRef(n, root=str(RADIOGRAPHS))) for n in names]
    groups = groups_of(samples, processor)
    batch = pack_of(groups, processor=processor)
    assert len({tuple(grid.tolist()) for grid in batch.image_grid_thw}) > 1
    model = adapted(vision_language_model())
    with torch.no_grad():
        want = separate_logps(model, groups, batch, processor)
        got = packed_logps(PackedModel(model), batch)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)

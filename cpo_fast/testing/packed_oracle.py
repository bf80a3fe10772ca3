"""Packs of the small preferences, and what separate, unpacked forwards of the same model say."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from cpo_fast.model.build import add_lora
from cpo_fast.model.packed import PackedModel
from cpo_fast.packing import collate, encode_all, image_token_id
from cpo_fast.testing.samples import (
    image,
    images,
    mixed,
    preference,
    strengthen,
    text_model,
    tokenizer,
    vision_language_model,
)


def groups_of(samples, processor=None):
    grid = (processor or images()).grid
    return encode_all(samples, tokenizer(), grid, max_length=4000).groups


def pack_of(groups, pack=None, processor=None, **options):
    pack = pack or tuple((i, tuple(range(len(g.rejected)))) for i, g in enumerate(groups))
    pad = image_token_id(tokenizer())
    pixels = (processor or images()).pixels
    return collate(groups, pack, pixels=pixels, image_token_id=pad, **options)


def adapted(model, *, freeze_vit=True, scale=0.05, dropout=0.0):
    """LoRA with a B that is not zero, as after some training."""
    model = add_lora(model, r=4, alpha=8, freeze_vit=freeze_vit, dropout=dropout)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def packed_logps(packed: PackedModel, batch, *, reference=False) -> torch.Tensor:
    """[R] log-probabilities of the labels."""
    weight, _ = packed.head()
    logits = packed.hidden(batch, reference=reference) @ weight.T
    return logits.log_softmax(-1).gather(1, batch.labels[:, None])[:, 0]


def separate_logps(model, groups, batch, processor=None) -> torch.Tensor:
    """[R] the same from one forward of the whole model, with its own attention, per segment."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation("eager")
    by_id = {group.id: group for group in groups}
    pad = image_token_id(tokenizer())
    out = []
    for name in batch.segment_names:
        owner, role = name.split("/")
        group = by_id[owner]
        prompt, response = group.prompt, group.chosen
        if role != "chosen":
            k = int(role.removeprefix("rejected_")) - 1
            response = group.rejected[k]
            prompt = (group.rejected_prompts[k] if group.rejected_prompts else None) or prompt
        ids = torch.tensor([prompt.input_ids + response])
        inputs = {}
        if prompt.images:
            values, grids = zip(*map((processor or images()).pixels, prompt.images), strict=True)
            inputs = {
                "pixel_values": torch.cat(values),
                "image_grid_thw": torch.stack(grids),
                "mm_token_type_ids": (ids == pad).int(),
            }
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0]
        scored = logits[len(prompt.input_ids) - 1 : -1].log_softmax(-1)
        out.append(scored.gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(out)


def dpo_loss(logps, ref_logps, batch, beta=0.1) -> torch.Tensor:
    zeros = torch.zeros(batch.num_segments)
    ratio = zeros.index_add(0, batch.segment_ids, logps - ref_logps)
    chosen, rejected = batch.pairs.T
    return -logsigmoid(beta * (ratio[chosen] - ratio[rejected])).mean()


def trainable_grads(model) -> dict[str, torch.Tensor]:
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return grads


def assert_same_grads(got, want, rtol=1e-4):
    assert got.keys() == want.keys()
    for name, expected in want.items():
        scale = expected.abs().max()
        assert scale > 0, name
        assert (got[name] - expected).abs().max() <= rtol * scale, name


TEXTS = [preference("a", 1), preference("seven", 7, words=2), preference("b", 3, words=9)]


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        intermediate_size=96,
        pad_token_id=tokenizer().pad_token_id,
    )
    return strengthen(LlamaForCausalLM(config))


EVERY_KIND = [*mixed(), *TEXTS, preference("seven-images", 7, image(90, 60))]
CASES = {
    "images": (vision_language_model, mixed()),
    "every-kind": (vision_language_model, EVERY_KIND),
    "vlm-text": (vision_language_model, TEXTS),
    "qwen2": (text_model, TEXTS),
    "llama": (llama, TEXTS),
}

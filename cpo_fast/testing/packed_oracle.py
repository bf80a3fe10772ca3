"""Packs of the small preferences, and what separate, unpacked forwards of the same model say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from cpo_fast.model.build import add_lora
from cpo_fast.model.images import ImageProcessor
from cpo_fast.model.packed import PackedModel
from cpo_fast.packing import Pack, collate, encode_all, image_token_id
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
from cpo_fast.types import PackedBatch, Preference, PreferenceGroup


def groups_of(
    samples: Sequence[Preference], processor: ImageProcessor | None = None
) -> list[PreferenceGroup]:
    grid = (processor or images()).grid
    return encode_all(samples, tokenizer(), grid, max_length=4000).groups


def pack_of(
    groups: Sequence[PreferenceGroup],
    pack: Pack | None = None,
    processor: ImageProcessor | None = None,
    **options: Any,
) -> PackedBatch:
    pack = pack or tuple((i, tuple(range(len(g.rejected)))) for i, g in enumerate(groups))
    pad = image_token_id(tokenizer())
    pixels = (processor or images()).pixels
    return collate(groups, pack, pixels=pixels, image_token_id=pad, **options)


def adapted(
    model: Any, *, freeze_vit: bool = True, scale: float = 0.05, dropout: float = 0.0
) -> Any:
    """LoRA with a B that is not zero, as after some training."""
    model = add_lora(model, r=4, alpha=8, freeze_vit=freeze_vit, dropout=dropout)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def packed_logps(
    packed: PackedModel, batch: PackedBatch, *, reference: bool = False
) -> torch.Tensor:
    """[R] log-probabilities of the labels."""
    weight, _ = packed.head()
    logits = packed.hidden(batch, reference=reference) @ weight.T
    return logits.log_softmax(-1).gather(1, batch.labels[:, None])[:, 0]


def separate_logps(
    model: Any,
    groups: Sequence[PreferenceGroup],
    batch: PackedBatch,
    processor: ImageProcessor | None = None,
) -> torch.Tensor:
    """[R] the same from one forward of the whole model, with its own attention, per segment."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation("eager")
    by_id = {group.id: group for group in groups}
    pad = image_token_id(tokenizer())
    assert pad is not None
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
        inputs: dict[str, torch.Tensor] = {}
        if prompt.images:
            values, grids = zip(*map((processor or images()).pixels, prompt.images), strict=True)
            inputs = {
                "pixel_values": torch.cat(values),
                "image_grid_thw": torch.stack(grids),
                "mm_token_type_ids": torch.eq(ids, pad).int(),
            }
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0]
        scored = logits[len(prompt.input_ids) - 1 : -1].log_softmax(-1)
        out.append(scored.gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(out)


def dpo_loss(
    logps: torch.Tensor, ref_logps: torch.Tensor, batch: PackedBatch, beta: float = 0.1
) -> torch.Tensor:
    zeros = torch.zeros(batch.num_segments)
    ratio = zeros.index_add(0, batch.segment_ids, logps - ref_logps)
    chosen, rejected = batch.pairs.T
    return -logsigmoid(beta * (ratio[chosen] - ratio[rejected])).mean()


def trainable_grads(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    grads = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            grads[name] = parameter.grad.clone()
    model.zero_grad()
    return grads


def assert_same_grads(
    got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], rtol: float = 1e-4
) -> None:
    assert got.keys() == want.keys()
    for name, expected in want.items():
        scale = expected.abs().max()
        assert scale > 0, name
        assert (got[name] - expected).abs().max() <= rtol * scale, name


TEXTS = [preference("a", 1), preference("seven", 7, words=2), preference("b", 3, words=9)]


def llama() -> torch.nn.Module:
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

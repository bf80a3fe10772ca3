"""The forward over a pack says what separate, unpacked forwards of the same model say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from packing_samples import (
    image,
    images,
    mixed,
    preference,
    strengthen,
    text_model,
    tokenizer,
    vision_language_model,
)
from torch.nn.functional import logsigmoid

from cpo_fast.errors import UsageError
from cpo_fast.model.attention import FlexLayout, dense_mask
from cpo_fast.model.build import add_lora, freeze_vision
from cpo_fast.model.packed import PackedModel
from cpo_fast.packing import collate, encode_all, image_token_id, plan_epoch
from cpo_fast.types import ImageRef

RADIOGRAPHS = Path(__file__).parents[2] / "shared" / "data" / "cxr_images" / "png"


def attend_each_sequence(
    q, k, v, query_ends, key_ends, longest_q, longest_k, *, scale, window_size, enable_gqa
):
    """Stands in for torch's varlen_attn, which runs on CUDA only: its definition in plain torch."""
    assert window_size == (-1, 0) and query_ends.dtype == key_ends.dtype == torch.int32
    assert query_ends[-1] == len(q) and key_ends[-1] == len(k) == len(v)
    assert longest_q == query_ends.diff().max() and longest_k == key_ends.diff().max()
    out = []
    for i in range(len(query_ends) - 1):
        rows, columns = (slice(ends[i], ends[i + 1]) for ends in (query_ends, key_ends))
        heads = [x.transpose(0, 1) for x in (q[rows], k[columns], v[columns])]
        if enable_gqa:
            heads[1:] = [x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in heads[1:]]
        n, m = heads[0].shape[1], heads[1].shape[1]
        seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)  # causal from the lower right
        scores = (heads[0] @ heads[1].transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
        out.append((scores.softmax(-1) @ heads[2]).transpose(0, 1))
    return torch.cat(out)


@pytest.fixture(autouse=True)
def cuda_attention_on_cpu(request, monkeypatch):
    """Lets tests of "varlen" and "flex" run here; what is left untested are the kernels."""
    monkeypatch.setattr("cpo_fast.model.attention.SHORTEST_FLEX", 64)
    if "flex" in request.node.name:
        monkeypatch.setattr("cpo_fast.model.packed._check_flex", lambda model: None)
    if "varlen" in request.node.name:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attend_each_sequence)
        monkeypatch.setattr("cpo_fast.model.packed._check_varlen", lambda model: None)


def groups_of(samples, processor=None):
    grid = (processor or images()).grid
    return encode_all(samples, tokenizer(), grid, max_length=4000).groups


def pack_of(groups, pack=None, processor=None, **options):
    pack = pack or tuple((i, tuple(range(len(g.rejected)))) for i, g in enumerate(groups))
    pad = image_token_id(tokenizer())
    pixels = (processor or images()).pixels
    return collate(groups, pack, pixels=pixels, image_token_id=pad, **options)


def adapted(model, *, freeze_vit=True, scale=0.05):
    """LoRA with a B that is not zero, as after some training."""
    model = add_lora(model, r=4, alpha=8, freeze_vit=freeze_vit)
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


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", ["gathered", "sdpa", "varlen", "flex"])
@pytest.mark.parametrize("case", CASES)
def test_logps_and_reference_equal_separate_forwards(case, attention):
    build, samples = CASES[case]
    model, groups = adapted(build()), groups_of(samples)
    batch = pack_of(groups)
    with torch.no_grad():
        want = separate_logps(model, groups, batch)
        with model.disable_adapter():
            want_reference = separate_logps(model, groups, batch)
        packed = PackedModel(model, attention=attention)
        got = packed_logps(packed, batch)
        got_reference = packed_logps(packed, batch, reference=True)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(got_reference, want_reference, rtol=0, atol=1e-5)
    assert (want - want_reference).abs().max() > 0.1  # the adapter matters
    swapped = want[batch.labels.roll(1) != batch.labels]
    assert swapped.std() > 0.5  # and so does the context


def test_flex_rows_have_few_lengths_and_fillers_see_themselves():
    lengths = set()
    for words in range(1, 40):
        batch = pack_of(groups_of([preference("a", 3, words=words)]))
        layout = FlexLayout(batch)
        tokens = len(batch.input_ids)
        length = tokens + layout.filler
        lengths.add(length)
        index = torch.arange(length)
        zero = torch.tensor(0)
        seen = layout.mask.mask_mod(zero, zero, index[:, None], index[None, :])
        assert torch.equal(seen[:tokens, :tokens], dense_mask(batch)[0, 0])
        assert not seen[:tokens, tokens:].any()
        assert torch.equal(seen[tokens:], torch.eye(length, dtype=torch.bool)[tokens:])
    assert len(lengths) < 5 and all(length & (length - 1) == 0 for length in lengths)


@pytest.mark.parametrize("attention", ["gathered", "sdpa", "varlen"])
@pytest.mark.parametrize("case", ["images", "qwen2"])
def test_adapter_gradients_equal_separate_forwards(case, attention):
    build, samples = CASES[case]
    model, groups = adapted(build(), freeze_vit=case != "images"), groups_of(samples)
    batch = pack_of(groups)
    with torch.no_grad(), model.disable_adapter():
        reference = separate_logps(model, groups, batch)
    dpo_loss(separate_logps(model, groups, batch), reference, batch).backward()
    want = trainable_grads(model)
    packed = PackedModel(model, attention=attention)
    dpo_loss(
        packed_logps(packed, batch), packed_logps(packed, batch, reference=True), batch
    ).backward()
    assert_same_grads(trainable_grads(model), want)


@pytest.mark.parametrize("attention", ["gathered", "sdpa", "varlen"])
def test_before_training_policy_is_reference(attention):
    model, batch = add_lora(vision_language_model()), pack_of(groups_of(mixed()))
    packed = PackedModel(model.train(), attention=attention)
    policy, reference = packed.hidden(batch), packed.hidden(batch, reference=True)
    assert torch.equal(policy, reference)
    assert policy.requires_grad and not reference.requires_grad


def test_a_frozen_tower_runs_once_and_a_trainable_one_per_model():
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


def test_steps_of_many_packs_equal_one_pack():
    """A step cut into small packs, groups split, gives the same summed gradient."""
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


def test_prompts_shared_and_copied_agree():
    model, groups = adapted(vision_language_model()), groups_of(mixed())
    packed = PackedModel(model)
    shared, copied = pack_of(groups), pack_of(groups, share_prompt=False)
    assert len(copied.input_ids) > len(shared.input_ids)
    with torch.no_grad():
        torch.testing.assert_close(
            packed_logps(packed, copied), packed_logps(packed, shared), rtol=0, atol=1e-5
        )


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


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_say_the_same_without_compiling_anew(checkpointing):
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
    compiled = PackedModel(model, compile=True)
    graphs = []
    for batch, (loss, grads) in zip(batches, want, strict=True):
        got, got_grads = step(compiled, batch)
        assert got == pytest.approx(loss, abs=1e-5)
        assert_same_grads(got_grads, grads)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == graphs[2] > 0


def test_bfloat16():
    model, batch = adapted(vision_language_model().bfloat16()), pack_of(groups_of(mixed()))
    exact = adapted(vision_language_model())
    with torch.no_grad():
        want = PackedModel(exact).hidden(batch)
        got = PackedModel(model).hidden(batch)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().mean() < 0.1 * want.abs().mean()


def test_generation_still_works():
    """The registered attention is plain SDPA without a pack's layout."""
    model, groups = vision_language_model(), groups_of([preference("a", 0)])
    ids = torch.tensor([groups[0].prompt.input_ids])
    options = {"max_new_tokens": 5, "do_sample": False}
    want = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    PackedModel(model)
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **options), want)
    assert "cpo_fast" not in model.config.to_json_string()  # a checkpoint does not know of it


def test_bad_models_and_batches():
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


@pytest.mark.skipif(not RADIOGRAPHS.is_dir(), reason="the radiographs are not at hand")
def test_real_radiographs():
    """640 pixels wide, of different heights; their texts are made up."""
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

"""Adapters on the output layer, adapter types, targets and merging equal peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from cpo_fast.errors import UsageError
from cpo_fast.evaluation.tree import score_tree
from cpo_fast.loss import linear_logprobs
from cpo_fast.model.adapters import check_targets, merge
from cpo_fast.model.build import add_lora, load_model, save_model, tiny_text_model
from cpo_fast.model.lineage import base_of_adapter
from cpo_fast.model.packed import PackedModel
from cpo_fast.testing.packed_oracle import (
    TEXTS,
    assert_same_grads,
    groups_of,
    pack_of,
    separate_logps,
    trainable_grads,
)
from cpo_fast.testing.samples import (
    images,
    strengthen,
    text_model,
    tokenizer,
    vision_language_model,
)
from cpo_fast.training.objectives import CPOObjective
from cpo_fast.types import Prompt
from tests.model.lora_layers import perturb


def build_tied_model() -> Any:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
    return strengthen(tiny_text_model(tokenizer(), tie_word_embeddings=True, **sizes))


def wrap_lora(model: Any, *targets: str, **options: Any) -> Any:
    config = peft.LoraConfig(
        r=options.pop("r", 3), target_modules=list(targets) or None, task_type="CAUSAL_LM",
        lora_alpha=options.pop("lora_alpha", 8), **options,
    )  # fmt: skip
    return peft.get_peft_model(model, config)


HEADS = {
    "lora": lambda: wrap_lora(text_model(), "q_proj", "lm_head"),
    "lora-alone": lambda: wrap_lora(text_model(), "lm_head", use_rslora=True),
    "lora-tied": lambda: wrap_lora(build_tied_model(), "v_proj", "lm_head"),
    "lora-both-tied": lambda: wrap_lora(build_tied_model(), "embed_tokens", "lm_head"),
    "lora-images": lambda: wrap_lora(vision_language_model(), "q_proj", "lm_head"),
    "saved": lambda: wrap_lora(text_model(), "q_proj", modules_to_save=["lm_head"]),
    "saved-tied": lambda: wrap_lora(build_tied_model(), "q_proj", modules_to_save=["lm_head"]),
    "tokens": lambda: wrap_lora(text_model(), "q_proj", trainable_token_indices=[3, 300]),
    "tokens-tied": lambda: wrap_lora(
        build_tied_model(), "q_proj", trainable_token_indices=[3, 300]
    ),
    "dora-below": lambda: wrap_lora(text_model(), "q_proj", "o_proj", use_dora=True),
}


def score(packed: PackedModel, batch: Any, *, reference: bool = False) -> torch.Tensor:
    weight, bias = packed.head(reference=reference)
    hidden = packed.hidden(batch, reference=reference)
    if reference:
        assert hidden.shape[1] == weight.shape[1] == packed.trunk.config.hidden_size
    return linear_logprobs(hidden, weight, batch.labels, bias=bias, impl="reference")


@pytest.mark.parametrize("name", HEADS)
def test_scores_with_an_adapted_output_layer_equal_peft(name: str) -> None:
    model = perturb(HEADS[name]()).double().eval()
    groups = groups_of(TEXTS[:2])
    batch = pack_of(groups)
    with torch.no_grad():
        want = separate_logps(model, groups, batch)
        with model.disable_adapter():
            untuned = separate_logps(model, groups, batch)
    assert (want - untuned).abs().max() > 0.01
    packed = PackedModel(model)
    got = score(packed, batch)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(score(packed, batch, reference=True), untuned, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "lora-tied", "saved", "tokens-tied"])
def test_gradients_of_the_output_layer_equal_peft(name: str) -> None:
    model = perturb(HEADS[name]()).double().eval()
    groups = groups_of(TEXTS[:2])
    batch = pack_of(groups)
    factors = torch.linspace(0.5, 1.5, len(batch.labels), dtype=torch.float64)
    (score(PackedModel(model), batch) * factors).sum().backward()
    got = trainable_grads(model)
    (separate_logps(model, groups, batch) * factors).sum().backward()
    assert_same_grads(got, trainable_grads(model), rtol=1e-4)


def test_lora_dropout_acts_on_the_output_layer() -> None:
    model = perturb(wrap_lora(text_model(), "lm_head", lora_dropout=0.5)).train()
    packed, hidden = PackedModel(model), torch.randn(5, 64)
    torch.manual_seed(3)
    want = model.base_model.model.lm_head(hidden)
    torch.manual_seed(3)
    inputs = packed.head_inputs(hidden)
    got = inputs @ packed.head()[0].T
    assert inputs.shape[1] % 8 == 0
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "saved", "saved-tied"])
def test_loss_starts_at_log_two_and_falls(name: str) -> None:
    model = HEADS[name]()
    objective = CPOObjective(PackedModel(model.train()), impl="reference")
    batch = pack_of(groups_of(TEXTS[:2]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    out = objective.score(batch)
    assert out.loss.item() == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)
    out.loss.backward()
    optimizer.step()
    after = objective.score(batch)
    assert after.loss < out.loss - 1e-3
    torch.testing.assert_close(after.ref_logps, out.ref_logps, rtol=0, atol=1e-4)


def test_token_tree_uses_the_adapted_output_layer() -> None:
    model = perturb(HEADS["lora"]()).eval()
    prompt, trunk, continuations = [300, 301], [302, 303], [[304], [305, 306]]
    whole = [trunk + continuation for continuation in continuations]
    found = score_tree(PackedModel(model), Prompt(tuple(prompt)), whole, trunk=trunk)
    for value, continuation in zip(found, continuations, strict=True):
        ids = torch.tensor([prompt + trunk + continuation])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].log_softmax(-1)
        want = sum(logits[1 + i, token] for i, token in enumerate(trunk + continuation))
        assert value.item() == pytest.approx(float(want), abs=1e-4)


def wrap_ia3(model: Any) -> Any:
    names = {"target_modules": ["k_proj", "lm_head"], "feedforward_modules": []}
    return peft.get_peft_model(model, peft.IA3Config(task_type="CAUSAL_LM", **names))


def wrap_prompts(kind: Any) -> Any:
    return peft.get_peft_model(text_model(), kind(task_type="CAUSAL_LM", num_virtual_tokens=4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wrap_lora(text_model(), "lm_head", use_dora=True), "use_dora"),
        (lambda: wrap_lora(text_model(), "lm_head", lora_bias=True), "lora_bias"),
        (lambda: wrap_ia3(text_model()), "type ia3 on the output layer"),
        (lambda: wrap_prompts(peft.PromptTuningConfig), "PROMPT_TUNING is not supported"),
        (lambda: wrap_prompts(peft.PrefixTuningConfig), "PREFIX_TUNING is not supported"),
    ],
)
def test_unsupported_adapters_are_named(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PackedModel(make())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "vproj"], "vproj matches no module; did you mean v_proj?"),
        (["q_proj", "experts"], "experts matches no module; choose from .*down_proj"),
        (["q_proj", "qkv"], "qkv is only in the vision tower, which is frozen"),
        ([], "is empty"),
    ],
)
def test_unmatched_target_is_named(targets: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        add_lora(vision_language_model(), target_modules=targets)


def test_targets_match_as_in_peft() -> None:
    model = vision_language_model()
    check_targets(model, ["layers.1.self_attn.q_proj", "qkv", "lm_head"])
    check_targets(model, "all-linear")


def compute_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(300, 320)[None]).logits


@pytest.mark.parametrize("name", ["lora-tied", "lora-both-tied", "saved-tied", "tokens-tied"])
def test_merging_into_tied_weights_preserves_the_logits(name: str, tmp_path: Path) -> None:
    """peft also adds an output layer's adapter to the embeddings if both are one tensor."""
    model = perturb(HEADS[name]())
    want = compute_logits(model)
    save_model(merge(model), tmp_path, tokenizer=tokenizer())
    torch.testing.assert_close(compute_logits(load_model(tmp_path)), want, rtol=0, atol=1e-4)


def save_adapter(folder: Path) -> Path:
    """Save folder/base and folder/adapter, whose B is not zero."""
    save_model(text_model(), folder / "base", tokenizer=tokenizer())
    tuned = perturb(add_lora(load_model(folder / "base"), r=4))
    save_model(tuned, folder / "adapter", tokenizer=tokenizer())
    return folder / "adapter"


def name_base(adapter: Path, base: str) -> None:
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"base_model_name_or_path": base}))


def test_base_of_an_adapter_is_found_or_named(tmp_path: Path, monkeypatch: Any) -> None:
    adapter, base = save_adapter(tmp_path), tmp_path / "base"
    want = compute_logits(load_model(adapter))
    assert base_of_adapter(adapter) == base
    for named, folder in (("../base", "/"), ("base", tmp_path)):
        name_base(adapter, named)
        monkeypatch.chdir(folder)
        assert base_of_adapter(adapter).resolve() == base
    moved = base.rename(tmp_path / "moved")
    for named in (str(base), "somebody/some-model"):
        name_base(adapter, named)
        with pytest.raises(UsageError, match=f"is not there: {named}. .*adapter_config.json"):
            load_model(adapter)
        assert torch.equal(compute_logits(load_model(adapter, base_model=moved)), want)
    with pytest.raises(UsageError, match=r"base_model .*nowhere: no such model folder"):
        load_model(adapter, base_model=tmp_path / "nowhere")


def test_adapter_on_an_adapter_merges_the_lower_one(tmp_path: Path) -> None:
    first = save_adapter(tmp_path)
    below = compute_logits(load_model(first))
    second = perturb(add_lora(merge(load_model(first)), r=2, target_modules=["o_proj"]))
    want = compute_logits(second)
    save_model(second, tmp_path / "second")
    name_base(tmp_path / "second", "../adapter")
    loaded = load_model(tmp_path / "second")
    torch.testing.assert_close(compute_logits(loaded), want, rtol=0, atol=1e-5)
    with loaded.disable_adapter():
        torch.testing.assert_close(compute_logits(loaded), below, rtol=0, atol=1e-5)


def test_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path)
    save_model(vision_language_model(), tmp_path / "other", images=images())
    with pytest.raises(UsageError, match="does not fit its base model"):
        load_model(adapter, base_model=tmp_path / "other")

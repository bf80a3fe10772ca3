"""Unsupported models are refused with class and reason before data is read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cpo_fast.errors import UsageError
from cpo_fast.model.build import add_lora, load_model, save_model
from cpo_fast.model.packed import PackedModel
from cpo_fast.model.supported import check_model, check_vocabulary, empty_model
from cpo_fast.testing.packed_oracle import (
    TEXTS,
    adapted,
    groups_of,
    pack_of,
    packed_logps,
    separate_logps,
)
from cpo_fast.testing.samples import strengthen, text_model, tokenizer
from cpo_fast.train import main
from cpo_fast.training.objectives import CPOObjective

NO_DECODER = "is not supported: it has no decoder named `model`"
REFUSED = {
    "GPT2Config": f"GPT2LMHeadModel {NO_DECODER}",
    "GPTNeoXConfig": f"GPTNeoXForCausalLM {NO_DECODER}",
    "GPTJConfig": f"GPTJForCausalLM {NO_DECODER}",
    "FalconConfig": f"FalconForCausalLM {NO_DECODER}",
    "BloomConfig": f"BloomForCausalLM {NO_DECODER}",
    "BioGptConfig": f"BioGptForCausalLM {NO_DECODER}",
    "RwkvConfig": f"RwkvForCausalLM {NO_DECODER}",
    "xLSTMConfig": f"xLSTMForCausalLM {NO_DECODER}",
    "BertConfig": f"BertLMHeadModel {NO_DECODER}",
    "MambaConfig": f"MambaForCausalLM {NO_DECODER}",
    "T5Config": "T5.* is not supported: it is an encoder-decoder",
    "BartConfig": "BartConfig is not supported: it is an encoder-decoder",
    "ViTConfig": "ViTConfig is not supported: transformers has no causal language model for 'vit'",
    "LlavaConfig": "LlavaConfig is not supported: of the models with image",
    "JambaConfig": "JambaForCausalLM is not supported: its layers carry a state",
    "StableLmConfig": "StableLmForCausalLM does not take .*attn_implementation .*use sdpa",
}


def write_config(folder: Path, **values: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_class_is_named(name: str, tmp_path: Path) -> None:
    config = getattr(transformers, name)()
    for layers in ("num_hidden_layers", "n_layer"):
        if hasattr(config, layers) and name not in ("JambaConfig", "LlavaConfig"):
            setattr(config, layers, 2)
    config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=REFUSED[name]):
        check_model(empty_model(tmp_path), attention="gathered")


def test_checkpoint_code_and_unknown_types_are_named(tmp_path: Path) -> None:
    own = {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}
    cases = {
        "'own' has its own code": {"model_type": "own", **own},
        "'own' of config.json is not known to transformers 5": {"model_type": "own"},
        "None of config.json is not known": {},
    }
    for message, values in cases.items():
        with pytest.raises(UsageError, match=message):
            load_model(write_config(tmp_path, **values))
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(UsageError, match=r"config\.json is not readable as JSON"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: transformers.GPT2Config(n_layer=1).save_pretrained(f), "GPT2LMHeadModel is not"),
        (lambda f: write_config(f, model_type="own"), "'own' of config.json is not known"),
        (lambda f: transformers.Qwen2Config().save_pretrained(f), "no tokenizer in"),
    ],
)
def test_training_refuses_a_model_before_reading_data(
    make: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "model")
    out = tmp_path / "out"
    (tmp_path / "rows.jsonl").write_text("no row of any format")
    flags = ["--dataset", str(tmp_path / "rows.jsonl"), "--stages", "cpo"]
    status = main(
        [*flags, "--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(out)]
    )
    error = capsys.readouterr().err
    assert status == 2 and message in error and str(tmp_path / "model") in error
    assert not out.exists()


def test_training_refuses_targets_and_small_vocabularies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    save_model(text_model(), model, tokenizer=tokenizer())
    (tmp_path / "rows.jsonl").write_text("no row of any format")
    flags = ["--dataset", str(tmp_path / "rows.jsonl"), "--stages", "cpo",
             "--model_name_or_path", str(model), "--output_dir", str(tmp_path / "out")]  # fmt: skip
    assert main([*flags, "--lora_target_modules", "q_proj, vproj"]) == 2
    assert "vproj matches no module; did you mean v_proj?" in capsys.readouterr().err
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 395}))
    assert main(flags) == 2
    last = len(tokenizer()) - 1
    assert f"ids go up to {last}, but the model has 395 tokens" in capsys.readouterr().err


def test_vocabulary_can_be_as_large_as_the_embeddings() -> None:
    check_vocabulary(Path("here"), tokenizer(), text_model())


def build_decoder(name: str, **values: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(tokenizer()), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=96, pad_token_id=tokenizer().pad_token_id,
        bos_token_id=None, eos_token_id=tokenizer().eos_token_id, **values,
    )  # fmt: skip
    torch.manual_seed(0)
    return strengthen(getattr(transformers, f"{name}ForCausalLM")(config))


@pytest.mark.parametrize("name", ["StableLm", "Nemotron"])
def test_sdpa_is_exact_where_gathered_is_refused(name: str) -> None:
    model, groups = adapted(build_decoder(name)), groups_of(TEXTS[:2])
    batch = pack_of(groups)
    if not getattr(model.base_model.model, "_supports_attention_backend", False):
        with pytest.raises(UsageError, match="use sdpa"):
            PackedModel(model)
    with torch.no_grad():
        got = packed_logps(PackedModel(model, attention="sdpa"), batch)
        torch.testing.assert_close(got, separate_logps(model, groups, batch), rtol=1e-4, atol=1e-4)


def test_layers_that_cannot_be_compiled_are_named() -> None:
    with pytest.raises(UsageError, match=r"layers of OPTForCausalLM .*torch_compile"):
        PackedModel(build_opt(), compile=True)


RATES = {
    "Granite": {"attention_dropout": 0.4},
    "SeedOss": {"attention_dropout": 0.3, "residual_dropout": 0.3, "head_dim": 16},
    "Phi": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attention_dropout": 0.2},
    "Persimmon": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
}


def build_opt() -> Any:
    config = transformers.OPTConfig(
        vocab_size=len(tokenizer()), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        ffn_dim=96, dropout=0.4, layerdrop=0.3, attention_dropout=0.3, word_embed_proj_dim=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return strengthen(transformers.OPTForCausalLM(config))


@pytest.mark.parametrize("name", ["Opt", *RATES])
def test_only_lora_has_dropout_in_training(name: str, tmp_path: Path) -> None:
    model = build_opt() if name == "Opt" else build_decoder(name, **RATES[name])
    save_model(model, tmp_path, tokenizer=tokenizer())
    tuned = add_lora(load_model(tmp_path), r=4, dropout=0.5, target_modules=["q_proj", "v_proj"]
                     if name != "Persimmon" else ["query_key_value"]).train()  # fmt: skip
    objective = CPOObjective(PackedModel(tuned, attention="sdpa"), impl="reference")
    batch = pack_of(groups_of(TEXTS[:2]))
    with torch.no_grad():
        first, second = objective.score(batch), objective.score(batch)
        assert torch.equal(first.logps, first.ref_logps) and torch.equal(first.logps, second.logps)
        assert first.loss.item() == pytest.approx(math.log(2), abs=1e-7)
        for parameter_name, parameter in tuned.named_parameters():
            if "lora_B" in parameter_name:
                parameter.add_(0.1)
        first, second = objective.score(batch), objective.score(batch)
    assert not torch.equal(first.logps, second.logps)  # LoRA's own dropout
    assert torch.equal(first.ref_logps, second.ref_logps)


def test_checkpoint_without_some_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_model(text_model(), tmp_path, tokenizer=tokenizer())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lack 1 weight of Qwen2ForCausalLM, lm_head\.weight"):
        load_model(tmp_path)

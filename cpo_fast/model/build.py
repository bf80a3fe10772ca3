"""Models of transformers and peft: tiny random ones, loading and saving checkpoints, LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cpo_fast.counting import counted
from cpo_fast.errors import UsageError, first_line
from cpo_fast.model.adapters import check_targets, load_adapter, merge
from cpo_fast.model.images import ImageProcessor
from cpo_fast.model.lineage import base_of_adapter, is_adapter
from cpo_fast.model.supported import model_class, read_model_config
from cpo_fast.model.tokenizer import SPECIAL_TOKENS
from cpo_fast.types import IMAGE_TOKEN

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2ForCausalLM,
    )

VISION_TOWER = "visual"


def tiny_model(
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    hidden_size: int = 128,
    num_hidden_layers: int = 3,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    intermediate_size: int = 384,
    vision_hidden_size: int = 64,
    vision_layers: int = 2,
    vision_heads: int = 4,
    vision_intermediate_size: int = 128,
    tie_word_embeddings: bool = False,
) -> Qwen2_5_VLForConditionalGeneration:
    """A small Qwen2.5-VL, float32; its random weights depend only on `seed` and the sizes.

    The vision tower's last block attends to the whole image, the others to windows of 112 x 112
    pixels.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = _text_config(
        tokenizer,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        intermediate_size=intermediate_size,
    )
    # Half of a head's dimensions, split over time, height and width as in the published sizes
    # (2:3:3).
    half = hidden_size // num_attention_heads // 2
    side = half * 3 // 8
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1000000.0,
        "mrope_section": [half - 2 * side, side, side],
    }
    ids: dict[str, Any] = {
        token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={
            "depth": vision_layers,
            "hidden_size": vision_hidden_size,
            "num_heads": vision_heads,
            "intermediate_size": vision_intermediate_size,
            "out_hidden_size": hidden_size,
            "fullatt_block_indexes": [vision_layers - 1],
        },
        image_token_id=ids[IMAGE_TOKEN],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tie_word_embeddings,
    )
    return _init_random(Qwen2_5_VLForConditionalGeneration, config, tokenizer, seed)


def tiny_text_model(
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    hidden_size: int = 128,
    num_hidden_layers: int = 3,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    intermediate_size: int = 384,
    tie_word_embeddings: bool = False,
) -> Qwen2ForCausalLM:
    """A small text-only Qwen2, float32; its random weights depend only on `seed` and the sizes."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        **_text_config(
            tokenizer,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            intermediate_size=intermediate_size,
        ),
        tie_word_embeddings=tie_word_embeddings,
    )
    return _init_random(Qwen2ForCausalLM, config, tokenizer, seed)


def _text_config(tokenizer: PreTrainedTokenizerBase, **sizes: int) -> dict[str, Any]:
    heads = sizes["num_attention_heads"]
    if sizes["hidden_size"] % (2 * heads) or heads % sizes["num_key_value_heads"]:
        raise UsageError(
            f"hidden_size={sizes['hidden_size']} must be a multiple of twice the {heads} heads, "
            f"and the heads a multiple of num_key_value_heads={sizes['num_key_value_heads']}"
        )
    return {
        **sizes,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 32768,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _init_random(kind: Any, config: Any, tokenizer: PreTrainedTokenizerBase, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.float()


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    base_model: str | Path | None = None,
) -> PreTrainedModel | PeftModel:
    """A Qwen2.5-VL or text-only causal LM from a folder (or a hub name, if transformers is online).

    A folder with an adapter returns the peft model over its base, the adapter not trainable; a base
    that is itself an adapter is merged first. `base_model` overrides the adapter's base. Weights
    are read from safetensors only, and no code from the checkpoint runs. `dtype` is a torch dtype
    or "auto" (the checkpoint's). Dropout is disabled, also in the configuration: it would make
    policy and reference differ before the first step (LoRA has its own). Raises UsageError if there
    is no such model.
    """
    folder = Path(path)
    if is_adapter(folder):
        base: Any = load_model(base_of_adapter(folder, base_model), dtype=dtype)
        return load_adapter(merge(base) if hasattr(base, "peft_config") else base, folder)
    config = read_model_config(path)
    kind = model_class(config, path)
    disable_dropout(config)
    try:
        model, found = kind.from_pretrained(
            str(path),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UsageError(
            f"no model could be loaded from {path}: {first_line(error)}; give a folder "
            "with config.json and *.safetensors of a Qwen2.5-VL or text-only causal LM"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise UsageError(
            f"the files in {path} lack "
            f"{counted(len(missing), 'weight')} of {type(model).__name__}, "
            f"{missing[0]} among them: copy the whole model"
        )
    for layer in model.modules():
        if isinstance(layer, torch.nn.modules.dropout._DropoutNd):
            layer.p = 0.0
    return model


def disable_dropout(config: Any) -> None:
    """Set all rates of dropout, layer drop and drop path to 0, also in nested configs."""
    from transformers import PreTrainedConfig

    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            disable_dropout(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def save_model(
    model: PreTrainedModel | PeftModel,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    images: ImageProcessor | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a checkpoint that transformers (a whole model) or peft (an adapter) can load.

    `weights` is the state dict if the model has only shards of it. A whole model gets `folder` as
    its name, so that an adapter trained on it records the location of its base. A new folder has
    mode 0700.
    """
    from peft import PeftModel

    folder = Path(folder)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        # "auto" would query the hub about a resized vocabulary.
        model.save_pretrained(str(folder), save_embedding_layers=False)
    else:
        model.save_pretrained(str(folder), state_dict=weights)
        model.name_or_path = model.config._name_or_path = str(folder.resolve())
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    if images is not None:
        images.save(folder)


def freeze_vision(model: PreTrainedModel) -> None:
    """Freeze the vision tower, merger included, for full tuning of the rest."""
    for name, parameter in model.named_parameters():
        if VISION_TOWER in name.split("."):
            parameter.requires_grad_(False)


def frozen_modules(model: PreTrainedModel, *, freeze_vit: bool) -> str | None:
    """The pattern of the modules excluded from LoRA, or None."""
    has_tower = any(name.endswith(VISION_TOWER) for name, _ in model.named_modules())
    return rf"(.*\.)?{VISION_TOWER}\..*" if freeze_vit and has_tower else None


def add_lora(
    model: PreTrainedModel,
    *,
    r: int = 8,
    alpha: int = 32,
    dropout: float = 0.0,
    target_modules: str | list[str] = "all-linear",
    freeze_vit: bool = True,
    seed: int = 0,
) -> PeftModel:
    """LoRA adapters (arXiv 2106.09685) through peft; the base weights are frozen.

    "all-linear" is every linear layer except the output head; with `freeze_vit` also without the
    vision tower. Otherwise `target_modules` is as in peft: a list of name endings or a regular
    expression. The random A matrices depend only on `seed`, B is zero: the initial policy equals
    its reference.
    """
    from peft import LoraConfig, get_peft_model

    if r < 1:
        raise UsageError(f"lora_r={r} must be at least 1")
    excluded = frozen_modules(model, freeze_vit=freeze_vit)
    check_targets(model, target_modules, excluded=excluded)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules,
        exclude_modules=excluded,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise UsageError(
                f"lora_target_modules={target_modules!r} does not fit: {first_line(error)}"
            ) from error

"""Models and adapters supported over packs; others are refused with their class and a reason.

The checks inspect the structure of a model, so they apply to any class. `empty_model` creates a
model without weights from a checkpoint's config.json, to refuse an unsupported one before data is
read.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cpo_fast.errors import UsageError, first_line

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ARGUMENTS = ("inputs_embeds", "position_ids", "attention_mask")
"""Arguments passed to the decoder for a pack."""

ENCODER_DECODER = "it is an encoder-decoder, and packs are for decoder-only models"

PEFT_REASONS = {
    "ADAPTION_PROMPT": "adds attention to a learned prompt, which packs do not support",
    "XLORA": "needs a separate pass over each sequence, and a pack has many",
    "POLY": "needs a task id for each sequence, and a pack has many",
}


def read_model_config(path: str | Path) -> PreTrainedConfig:
    """The configuration of a checkpoint; UsageError if transformers alone cannot create it."""
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig

    file = Path(path) / "config.json"
    if Path(path).is_dir():
        if not file.is_file():
            raise UsageError(f"{path} has no config.json; name a folder that save_pretrained wrote")
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            kind = raw.get("model_type")
        except (OSError, ValueError, AttributeError) as error:
            raise UsageError(f"{file} is not readable as JSON: {first_line(error)}") from error
        if kind not in CONFIG_MAPPING:
            if raw.get("auto_map"):
                raise UsageError(
                    f"{path}: a model of type {kind!r} has its own code (auto_map in "
                    "config.json), and no code from a checkpoint is run; use a model whose class "
                    "is in transformers"
                )
            raise UsageError(
                f"{path}: no model could be loaded: the model type {kind!r} of config.json is not "
                f"known to transformers {transformers.__version__}"
            )
    try:
        return AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # a class's validation can raise anything
        raise UsageError(f"no model could be loaded from {path}: {first_line(error)}") from error


def model_class(config: PreTrainedConfig, path: str | Path) -> Any:
    """The class or auto class that loads the model; UsageError for an unsupported model."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoModelForCausalLM,
        Qwen2_5_VLForConditionalGeneration,
    )

    name = (config.architectures or [type(config).__name__])[0]
    reason = None
    if config.model_type == "qwen2_5_vl":
        return Qwen2_5_VLForConditionalGeneration
    if getattr(config, "is_encoder_decoder", False):
        reason = ENCODER_DECODER
    elif any(hasattr(config, part) for part in ("vision_config", "audio_config")):
        reason = "of the models with image or sound inputs, only Qwen2.5-VL is"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        reason = f"transformers has no causal language model for {config.model_type!r}"
    if reason:
        raise UsageError(f"{path}: {_refusal(name, reason)}")
    return AutoModelForCausalLM


def empty_model(path: str | Path) -> PreTrainedModel:
    """The model of a checkpoint's config.json on the device "meta": structure without weights."""
    config = read_model_config(path)
    kind = model_class(config, path)
    try:
        with torch.device("meta"):
            return kind(config) if hasattr(kind, "config_class") else kind.from_config(config)
    except Exception as error:  # a constructor can raise anything
        raise UsageError(
            f"{path}: {config.model_type!r} cannot be created from config.json: {first_line(error)}"
        ) from error


def check_model(model: Any, *, attention: str = "auto") -> None:
    """UsageError, with the class and the reason, for a model that packs do not support."""
    name = type(model).__name__
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise _refusal(name, ENCODER_DECODER)
    inner = getattr(model, "model", None)
    if inner is None:
        raise _refusal(
            name,
            "it has no decoder named `model` that takes embeddings and positions, as Llama, Qwen "
            "and other current decoder-only models have",
        )
    trunk = getattr(inner, "language_model", inner)
    taken = inspect.signature(trunk.forward).parameters
    if missing := [argument for argument in ARGUMENTS if argument not in taken]:
        raise _refusal(name, f"its decoder takes no {' and no '.join(missing)}")
    if getattr(model, "_is_stateful", False):
        raise _refusal(
            name,
            "its layers carry a state along the row, from one answer of a pack to the next",
        )
    if "sliding_attention" in (getattr(trunk.config, "layer_types", None) or ()):
        raise UsageError(
            "the model has sliding-window layers, which packs do not support; "
            "set use_sliding_window to false in its config.json"
        )
    if model.get_output_embeddings() is None:
        raise _refusal(name, "it has no output layer")
    if attention == "varlen" and (why := varlen_obstacle(config)):
        raise UsageError(f"attn_implementation varlen {why}, or use gathered or sdpa")
    if attention != "sdpa" and not getattr(model, "_supports_attention_backend", False):
        raise UsageError(
            f"{name} does not take an external attention function, which "
            f"attn_implementation {attention} is; use sdpa"
        )


def varlen_obstacle(config: PreTrainedConfig) -> str | None:
    """What flash attention does not support in a decoder's configuration, or None."""
    from cpo_fast.model.attention import supports_head_size

    text: Any = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    dropout = getattr(text, "attention_dropout", 0.0)
    if dropout:
        return f"has no dropout, and attention_dropout is {dropout:g} in config.json; set it to 0"
    if not supports_head_size(head):
        return f"takes heads of a multiple of 8 up to 256, and the model's have {head} dimensions"
    return None


def check_adapter(model: PeftModel) -> None:
    """UsageError for active adapters that act outside the layers computed for a pack."""
    for name in model.active_adapters:
        config = model.peft_config[name]
        kind = str(config.peft_type).removeprefix("PeftType.")
        reason = PEFT_REASONS.get(kind)
        if config.is_prompt_learning:
            reason = "adds learned tokens or keys before a sequence, and a pack has many"
        elif getattr(config, "alora_invocation_tokens", None):
            reason = "acts from a token of each sequence on (aLoRA), and a pack has many"
        if reason:
            raise UsageError(f"an adapter of type {kind} is not supported: it {reason}")


def check_vocabulary(path: Path, tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """UsageError if the tokenizer has ids beyond the model's embeddings."""
    known = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= known:
        raise UsageError(
            f"{path}: the tokenizer's ids go up to {largest}, but the model has {known} tokens; "
            "use the tokenizer it was trained with"
        )


def _refusal(name: str, reason: str) -> UsageError:
    return UsageError(f"{name} is not supported: {reason}")

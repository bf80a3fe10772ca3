"""trl's DPOTrainer 1.16 over our preferences, for tests and benchmarks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from cpo_fast.data.images import load_image
from cpo_fast.model.images import ImageProcessor
from cpo_fast.types import IMAGE_TOKEN, Preference


def processor(tokenizer: Any, images: ImageProcessor) -> Any:
    """Qwen2_5_VLProcessor without its video processor, which would need torchvision."""
    from transformers import Qwen2_5_VLProcessor

    made = Qwen2_5_VLProcessor.__new__(Qwen2_5_VLProcessor)
    made.image_processor = images.processor
    made.tokenizer = tokenizer
    made.chat_template = tokenizer.chat_template
    made.image_token, made.video_token = IMAGE_TOKEN, "<|video_pad|>"
    made.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    made.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    return made


def rows(preferences: Sequence[Preference]) -> list[dict[str, Any]]:
    """One row per (chosen, rejected) pair."""
    return [
        {
            "prompt": [dict(message) for message in p.prompt],
            "chosen": [{"role": "assistant", "content": p.chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            **({"images": [load_image(ref) for ref in p.images]} if p.images else {}),
        }
        for p in preferences
        for rejected in p.rejected
    ]


def trainer(
    model: Any,
    preferences: Sequence[Preference],
    tokenizer: Any,
    images: ImageProcessor,
    *,
    output_dir: str,
    r: int,
    alpha: int,
    kind: Callable[..., Any] | None = None,
    **options: Any,
) -> Any:
    """A DPOTrainer with LoRA on the language model's linears and the reference by adapters off;
    with r = 0, of all weights, with a copy of the model for the reference.

    fp32, no checkpointing, on the CPU, nothing truncated: as ours runs. `kind` is called in place
    of DPOTrainer; `options` go to DPOConfig.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    defaults = {
        "max_length": None,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    config = DPOConfig(output_dir=output_dir, **{**defaults, **options})
    has_images = any(p.images for p in preferences)
    adapter = LoraConfig(
        r=max(r, 1),
        lora_alpha=alpha,
        target_modules="all-linear",
        exclude_modules=r"(.*\.)?visual\..*" if has_images else None,
        task_type="CAUSAL_LM",
    )
    return (kind or DPOTrainer)(
        model=model,
        ref_model=None if r else copy.deepcopy(model),
        args=config,
        train_dataset=Dataset.from_list(rows(preferences)),
        processing_class=processor(tokenizer, images) if has_images else tokenizer,
        peft_config=adapter if r else None,
    )

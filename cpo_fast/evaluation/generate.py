"""Batched greedy generation with left padding and a KV cache, for Qwen2.5-VL and text-only models.

Works on `types.Prompt` (token ids with expanded image placeholders), so that the model gets exactly
the tokens that it was trained on. Needs neither AutoProcessor nor torchvision.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from cpo_fast.counting import counted
from cpo_fast.errors import RecordError, UsageError
from cpo_fast.types import Pixels, Prompt

if TYPE_CHECKING:
    import torch

    from cpo_fast.packing.readable import Decoded

END_OF_TURN = "<|im_end|>"


def diagnose(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    pixels: Pixels | None = None,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    failed: dict[int, RecordError] | None = None,
    description: str = "generating",
) -> list[str]:
    """Greedy answers of `model` to every prompt, in the order of `prompts`.

    An answer ends before the first end-of-turn token or after `max_new_tokens`; special tokens are
    removed from the text. Prompts are batched by length to reduce padding. Dropout and the model's
    own sampling defaults (temperature, repetition penalty) are off.

    A prompt whose image cannot be read raises RecordError; if `failed` is given, `failed[index]` is
    set to the error instead and the answer is "". Raises UsageError for token ids outside the
    model's embedding (a tokenizer of another model), an empty prompt, or images without `pixels`.
    """
    import torch
    from tqdm import tqdm

    from cpo_fast.packing.readable import decode_images

    if batch_size < 1 or max_new_tokens < 1:
        raise UsageError("batch_size and max_new_tokens must be at least 1")
    _check(model, tokenizer, prompts, pixels)
    stops = stop_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops)
    image = getattr(model.config, "image_token_id", None)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].input_ids))
    answers = [""] * len(prompts)
    with (
        evaluating(model),
        torch.inference_mode(),
        tqdm(total=len(prompts), desc=description, unit="study", disable=None) as bar,
    ):
        for start in range(0, len(order), batch_size):
            asked = order[start : start + batch_size]
            decoded: Decoded = {}
            chosen = []
            for i in asked:
                try:
                    decode_images([prompts[i]], pixels, decoded, image)
                    chosen.append(i)
                except RecordError as error:
                    if failed is None:
                        raise
                    failed[i] = error
            bar.update(len(asked))
            if not chosen:
                continue
            inputs = _pad_left(model, [prompts[i] for i in chosen], decoded, pad)
            tokens = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=sorted(stops),
                pad_token_id=pad,
                use_cache=True,
            )
            new = tokens[:, inputs["input_ids"].shape[1] :].tolist()
            for index, row in zip(chosen, new, strict=True):
                answers[index] = tokenizer.decode(
                    _cut_at_stop(row, stops), skip_special_tokens=True
                )
    return answers


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: the tokenizer's end token, end of turn, the model's end tokens."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids: set[int | None] = {tokenizer.eos_token_id}
    ids.update(configured if isinstance(configured, Iterable) else [configured])
    ids.add(tokenizer.get_vocab().get(END_OF_TURN))
    found = frozenset(i for i in ids if i is not None)
    if not found:
        raise UsageError(
            "no answer can end: the tokenizer has neither an end-of-sequence token nor <|im_end|>"
        )
    return found


def _cut_at_stop(row: list[int], stops: frozenset[int]) -> list[int]:
    return list(takewhile(lambda token: token not in stops, row))


def _check(model: Any, tokenizer: Any, prompts: Sequence[Prompt], pixels: Pixels | None) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    for number, prompt in enumerate(prompts):
        if not prompt.input_ids:
            raise UsageError(f"prompt {number} is empty")
        if max(prompt.input_ids) >= rows:
            raise UsageError(
                f"prompt {number} has token id {max(prompt.input_ids)}, but the model has only "
                f"{counted(rows, 'embedding')}: use the model's own tokenizer"
            )
        if prompt.images and pixels is None:
            raise UsageError(f"prompt {number} has images, but `pixels` is missing")


def _pad_left(
    model: Any, prompts: Sequence[Prompt], decoded: Decoded, pad: int
) -> dict[str, torch.Tensor]:
    """Inputs of `model.generate`: ids and mask [B, L]; with images also pixels, grids and token
    types.
    """
    import torch

    device = model.get_input_embeddings().weight.device
    length = max(len(prompt.input_ids) for prompt in prompts)
    ids = torch.full((len(prompts), length), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt.input_ids) :] = torch.tensor(prompt.input_ids)
        mask[row, length - len(prompt.input_ids) :] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    images = [image for prompt in prompts for image in prompt.images]
    if images:
        arrays, grids = zip(*(decoded[image] for image in images), strict=True)
        inputs["pixel_values"] = torch.cat([torch.as_tensor(array) for array in arrays])
        inputs["image_grid_thw"] = torch.stack([torch.as_tensor(grid).view(3) for grid in grids])
        # mRoPE positions depend on the type of each token; padding is masked and counts as text.
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).long() * mask
    return {name: value.to(device) for name, value in inputs.items()}


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode (no dropout) inside the block; the previous mode is restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)

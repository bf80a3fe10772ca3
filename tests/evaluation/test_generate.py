"""Batched, left-padded generation equals generation for one study at a time."""

from __future__ import annotations

import pytest
import torch

from cpo_fast.errors import RecordError, UsageError
from cpo_fast.evaluation.generate import diagnose, stop_ids
from cpo_fast.types import ImageRef, Prompt

VOCABULARY = 96
IMAGE, START, END, PAD, STOP = 90, 91, 92, 93, 94


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = {IMAGE: "<|image_pad|>", START: "<|vision_start|>", END: "<|vision_end|>"}
    specials |= {PAD: "<|endoftext|>", STOP: "<|im_end|>"}
    vocabulary = {specials.get(i, f"w{i}"): i for i in range(VOCABULARY - 1)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )


@pytest.fixture(scope="module")
def vision_model():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.5,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [1, 1, 2],
                "rope_theta": 10000.0,
            },
            "bos_token_id": None,
            "eos_token_id": STOP,
            "pad_token_id": PAD,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "window_size": 16,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.5,
        },
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        video_token_id=95,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).double().eval()
    model.generation_config.repetition_penalty = 5.0  # as in real checkpoints
    return model


def pixels(image: ImageRef) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = (int(part) for part in image.path.split("x"))
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    values = torch.randn(rows * columns, 3 * 2 * 4 * 4, generator=generator, dtype=torch.float64)
    return values, torch.tensor([1, rows, columns])


def prompt(grid: str | None, words: list[int]) -> Prompt:
    if grid is None:
        return Prompt(tuple(words))
    rows, columns = (int(part) for part in grid.split("x"))
    ids = (START, *[IMAGE] * (rows * columns // 4), END, *words)
    return Prompt(ids, (ImageRef(grid),))


PROMPTS = [
    prompt("4x6", [1, 2, 3]),
    prompt("2x2", [4, 5]),
    prompt("6x4", [6, 7, 8, 9, 10]),
    prompt("4x6", [11]),
    prompt("8x4", [12, 13]),
]


def test_batches_equal_single_prompts_in_order(vision_model, tokenizer):
    together = diagnose(vision_model, tokenizer, PROMPTS, pixels, max_new_tokens=24, batch_size=3)
    alone = [
        diagnose(vision_model, tokenizer, [one], pixels, max_new_tokens=24, batch_size=1)[0]
        for one in PROMPTS
    ]
    assert together == alone
    assert len(set(together)) == len(together), "answers must depend on prompts"


def test_cached_generation_equals_forwards_without_cache(vision_model, tokenizer):
    """Greedy decoding by hand: a forward over the whole sequence for every token."""
    answer = diagnose(vision_model, tokenizer, PROMPTS[:2], pixels, max_new_tokens=8, batch_size=2)
    for one, text in zip(PROMPTS[:2], answer, strict=True):
        values, grid = pixels(one.images[0])
        ids, new = list(one.input_ids), []
        while len(new) < 8:
            row = torch.tensor([ids + new])
            with torch.no_grad():
                logits = vision_model(
                    input_ids=row,
                    pixel_values=values,
                    image_grid_thw=grid[None],
                    mm_token_type_ids=(row == IMAGE).long(),
                ).logits
            new.append(int(logits[0, -1].argmax()))
            if new[-1] == STOP:
                break
        assert text == tokenizer.decode([i for i in new if i != STOP], skip_special_tokens=True)


def test_text_only_model_and_first_token_stop(tokenizer):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    model = Qwen2ForCausalLM(config).double().train()
    prompts = [prompt(None, list(range(1, n))) for n in (3, 9, 5, 12)]
    together = diagnose(model, tokenizer, prompts, max_new_tokens=40, batch_size=4)
    alone = [diagnose(model, tokenizer, [p], max_new_tokens=40, batch_size=1)[0] for p in prompts]
    assert together == alone
    assert model.training, "the model's mode was not restored"
    # A stop token as the first new token leaves an empty text.
    first = tokenizer.convert_tokens_to_ids(together[0].split()[0])
    model.generation_config.eos_token_id = [first]
    assert first in stop_ids(model, tokenizer)
    assert diagnose(model, tokenizer, prompts, max_new_tokens=40, batch_size=4)[0] == ""


def test_failed_image_loses_only_its_own_answer(vision_model, tokenizer):
    def missing(image: ImageRef) -> tuple[torch.Tensor, torch.Tensor]:
        if image.path == "2x2":
            raise RecordError("image-missing", "2x2 is not there")
        return pixels(image)

    whole = diagnose(vision_model, tokenizer, PROMPTS, pixels, max_new_tokens=8, batch_size=3)
    options = {"max_new_tokens": 8, "batch_size": 3}
    failed: dict[int, RecordError] = {}
    found = diagnose(vision_model, tokenizer, PROMPTS, missing, failed=failed, **options)
    assert found == [whole[0], "", *whole[2:]]
    assert {i: error.reason for i, error in failed.items()} == {1: "image-missing"}
    with pytest.raises(RecordError, match="2x2 is not there"):
        diagnose(vision_model, tokenizer, PROMPTS, missing, **options)


def test_no_prompts_give_no_answers(vision_model, tokenizer):
    assert diagnose(vision_model, tokenizer, [], pixels) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Prompt((1, 500)), "the model's own tokenizer"),
        (Prompt(()), "prompt 0 is empty"),
        (prompt("2x2", [1]), "`pixels` is missing"),
    ],
)
def test_bad_prompts_are_named(vision_model, tokenizer, bad, message):
    with pytest.raises(UsageError, match=message):
        diagnose(vision_model, tokenizer, [bad])

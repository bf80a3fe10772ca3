"""With Qwen's vocabulary, rebuilt from a wheel, ids equal those of the real processor."""

from __future__ import annotations

import base64
import importlib.util
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from cpo_fast.model.tokenizer import CHAT_TEMPLATE, SPLIT_PATTERN
from cpo_fast.packing import encode, image_token_id
from cpo_fast.testing.samples import image, images, preference

ADDED = (  # at 151643 and after, as in Qwen2.5
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)


def find_ranks() -> Path | None:
    found = importlib.util.find_spec("dashscope")
    if found is None or found.origin is None:
        return None
    file = Path(found.origin).parent / "resources" / "qwen.tiktoken"
    return file if file.is_file() else None


def find_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens of lower rank that the last BPE merge joins to this token."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = (ranks.get(a + b, len(ranks)) for a, b in pairwise(parts))
        _, i = min((rank, i) for i, rank in enumerate(joined))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


@pytest.fixture(scope="module")
def qwen():
    if (file := find_ranks()) is None:
        pytest.skip("the dashscope wheel with Qwen's vocabulary is not installed")
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    letters = bytes_to_unicode()

    def to_letters(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [find_merge(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    bpe = Tokenizer(
        models.BPE(
            vocab={to_letters(token): rank for token, rank in ranks.items()},
            merges=[(to_letters(a), to_letters(b)) for a, b in merges],
        )
    )
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(ADDED))
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    made.chat_template = CHAT_TEMPLATE
    return made


@pytest.mark.slow
def test_ids_equal_the_real_processor(qwen):
    """The Qwen2.5-VL example of trl's documentation, with four visual tokens."""
    assert image_token_id(qwen) == 151655
    system = {"role": "system", "content": "You are a helpful assistant."}
    text = {"type": "text", "text": "What is this?"}
    sample = replace(
        preference("cat", 1, image(56, 56)),
        prompt=(system, {"role": "user", "content": [{"type": "image"}, text]}),
        chosen="This is a cat.",
        rejected=("This is a dog.",),
    )
    group = encode(sample, qwen, images().grid, max_length=100)
    head = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198]
    shown = [151652, 151655, 151655, 151655, 151655, 151653]
    assert group.prompt.input_ids == (
        *head,
        *shown,
        3838,
        374,
        419,
        30,
        151645,
        198,
        151644,
        77091,
        198,
    )
    assert group.chosen == (1986, 374, 264, 8251, 13, 151645, 198)
    assert group.rejected[0] == (1986, 374, 264, 5562, 13, 151645, 198)


@pytest.mark.slow
def test_text_round_trips(qwen):
    for text in ("<think> 12 mm é — opacity.\n\n  </think> Edema", "FINDINGS: XXXX\r\n\tclear"):
        assert qwen.decode(qwen(text)["input_ids"]) == text
    assert len(qwen("<think>")["input_ids"]) > 1

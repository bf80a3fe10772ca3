"""Tokenising preferences: ids equal to trl's, image placeholders, records set aside."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from cpo_fast.errors import DataError, RecordError, UsageError
from cpo_fast.packing import collate, encode, encode_all, image_token_id
from cpo_fast.testing.samples import image, images, preference, tokenizer
from cpo_fast.types import Preference

LONG = 10_000


def tokenise(sample, **options):
    return encode(sample, tokenizer(), images().grid, **{"max_length": LONG, **options})


def find_reason(sample, **options) -> str:
    with pytest.raises(RecordError) as caught:
        tokenise(sample, **options)
    return caught.value.reason


@pytest.mark.parametrize("answer", ["The heart is enlarged.", "<think> a\n\nb </think> é 1", " x "])
def test_ids_equal_trl(answer):
    """Prompt, chosen and rejected as tokenised by trl's DPOTrainer."""
    from trl.data_utils import apply_chat_template

    sample = replace(preference("a", 1), chosen=answer)
    group = tokenise(sample)
    text = apply_chat_template(
        {
            "prompt": [dict(m) for m in sample.prompt],
            "chosen": [{"role": "assistant", "content": sample.chosen}],
            "rejected": [{"role": "assistant", "content": sample.rejected[0]}],
        },
        tokenizer(),
    )
    ids = {name: tuple(tokenizer()(text[name])["input_ids"]) for name in text}
    assert group.prompt.input_ids == ids["prompt"]
    assert group.chosen == ids["chosen"]
    assert group.rejected == (ids["rejected"],)
    whole = tokenizer()(text["prompt"] + text["chosen"])["input_ids"]
    assert group.prompt.input_ids + group.chosen == tuple(whole)


def test_response_includes_the_end_of_its_turn():
    group = tokenise(preference("a", 2))
    for response in (group.chosen, *group.rejected):
        assert tokenizer().decode(response).endswith("<|im_end|>\n")


def test_placeholders_become_one_token_per_visual_token():
    group = tokenise(preference("a", 1, image(300, 200), image(56, 56)))
    pad = image_token_id(tokenizer())
    sizes = [t * h * w // 4 for t, h, w in map(images().grid, group.prompt.images)]
    assert group.prompt.input_ids.count(pad) == sum(sizes) and sizes[1] == 4
    one = tokenise(preference("a", 1, image(56, 56)))
    assert one.prompt.input_ids.count(pad) == 4


def test_perception_pair_has_its_own_prompt():
    group = tokenise(preference("a", 2, image(100, 80), perception=image(60, 60)))
    assert group.rejected[0] == group.chosen
    assert group.rejected_prompts[0].images == (image(60, 60),)
    assert group.rejected_prompts[1] is None


def test_template_that_rewrites_the_prompt_sets_the_row_aside():
    from copy import copy

    rewriting = copy(tokenizer())
    rewriting.chat_template = "{{ messages | length }}{{ messages[-1]['content'] }}"
    with pytest.raises(RecordError, match=r"template-rewrites-prompt.*another template"):
        encode(preference("a", 1), rewriting, max_length=LONG)


def drop_template():
    """The tokenizer without a chat template, as for a base model."""
    from copy import copy

    made = copy(tokenizer())
    made.chat_template = None
    return made


def test_plain_text_needs_no_chat_template():
    plain = Preference(
        "p", ({"role": "user", "content": "The heart"},), " is", (" was",), plain=True
    )
    chat = replace(plain, id="m", plain=False)
    done = encode_all([plain, chat], drop_template(), max_length=LONG)
    assert done.groups == encode_all([plain], tokenizer(), max_length=LONG).groups
    assert [(r.id, r.reason) for r in done.rejected] == [("m", "no-chat-template")]
    with pytest.raises(UsageError, match=r"no-chat-template: 1.*plain strings"):
        encode_all([chat], drop_template(), max_length=LONG)


def test_images_need_a_vision_language_model():
    """The reason names the model, even if the tokenizer has the image token (Qwen2.5)."""
    text_only = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), chat_template=tokenizer().chat_template
    )
    shown, perception = preference("i", 1, image(60, 60)), preference("p", 1)
    perception = replace(perception, rejected_images=((image(60, 60),),))
    for row in (shown, perception):
        for tok, grid in ((tokenizer(), None), (text_only, images().grid)):
            with pytest.raises(RecordError, match="vision-language model") as caught:
                encode(row, tok, grid, max_length=LONG)
            assert caught.value.reason == "model-cannot-see"
    with pytest.raises(UsageError, match="model-cannot-see: 1") as caught:
        encode_all([shown], tokenizer(), max_length=LONG)
    assert "max_length" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "chosen", "why"),
    [
        ("The heart", "<|im_end|>", "empty-response"),
        ("The heart", " <|im_end|> <|endoftext|>\n", "empty-response"),
        ("The heart", "\u200b", None),
        ("The heart", "a\0b", None),
        ("\0", " a", None),
        ("", " a", "empty-prompt"),
        ("\u200b", " a", None),
    ],
)
def test_no_row_ends_the_run(prompt, chosen, why):
    """A row is encoded or set aside; an encoded one can be packed."""
    row = Preference(
        "a", ({"role": "user", "content": prompt},), chosen, (" was large",), plain=True
    )
    good = replace(row, id="good", prompt=({"role": "user", "content": "The"},), chosen=" is")
    done = encode_all([good, row], tokenizer(), max_length=LONG)
    assert [r.reason for r in done.rejected] == ([] if why is None else [why])
    parts = tuple((number, (0,)) for number in range(len(done.groups)))
    assert collate(done.groups, parts, pixels=None, image_token_id=None).num_segments > 0


def test_prompt_that_merges_with_the_answer_sets_the_row_aside():
    merged = next(t for t in sorted(tokenizer().get_vocab()) if len(t) > 3 and t.isalpha())
    row = Preference(
        "a", ({"role": "user", "content": merged[:2]},), merged[2:], (" was large",), plain=True
    )
    if len(tokenizer()(merged)["input_ids"]) != 1:
        pytest.fail(f"{merged} should be one token")
    with pytest.raises(RecordError, match="prompt-merges") as caught:
        encode(row, tokenizer(), max_length=LONG)
    assert "template" not in str(caught.value)


def test_failing_template_sets_the_row_aside():
    from copy import copy

    failing = copy(tokenizer())
    failing.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(RecordError, match="template-refuses: ZeroDivisionError"):
        encode(preference("a", 1), failing, max_length=LONG)


def test_sft_samples_have_no_rejected():
    assert tokenise(preference("a", 0)).rejected == ()


def test_text_only_tokenizers_have_no_placeholder():
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    assert image_token_id(plain) is None


def test_records_are_set_aside_with_their_reason():
    base = preference("a", 2, image(100, 80))
    assert find_reason(replace(base, chosen="  ")) == "empty-response"
    assert find_reason(replace(base, rejected=("x", ""))) == "empty-response"
    assert find_reason(replace(base, rejected=("x", base.chosen))) == "chosen-equals-rejected"
    assert find_reason(replace(base, images=())) == "image-placeholder-mismatch"
    assert find_reason(replace(base, images=base.images * 2)) == "image-placeholder-mismatch"
    assert find_reason(replace(base, chosen="<|image_pad|>")) == "image-token-in-response"
    assert find_reason(replace(base, rejected_images=(None,))) == "rejected-images-mismatch"


def test_over_long_policies():
    sample = preference("a", 1, image(100, 80), words=20)
    whole = tokenise(sample)
    room = 12
    limit = len(whole.prompt.input_ids) + room
    assert find_reason(sample, max_length=limit) == "over-long"
    with pytest.raises(DataError, match="max_length"):
        tokenise(sample, max_length=limit, over_long="error")
    cut = tokenise(sample, max_length=limit, over_long="truncate_response")
    assert cut.prompt == whole.prompt and cut.chosen == whole.chosen[:room]
    # The prompt with its images is never cut: without room for a response the row is dropped.
    for limit in (len(whole.prompt.input_ids), 5):
        assert find_reason(sample, max_length=limit, over_long="truncate_response") == "over-long"
    with pytest.raises(UsageError, match="over_long"):
        tokenise(sample, over_long="keep_end")


def test_responses_equal_after_truncation_are_set_aside():
    sample = replace(preference("a", 1), chosen="same start one", rejected=("same start two",))
    whole = tokenise(sample)
    limit = len(whole.prompt.input_ids) + 2
    assert whole.chosen[:2] == whole.rejected[0][:2]
    got = find_reason(sample, max_length=limit, over_long="truncate_response")
    assert got == "chosen-equals-rejected"


def test_encode_all_counts():
    good, long = preference("good", 1), preference("long", 1, words=50)
    bad = replace(preference("bad", 1), chosen="")
    options = {"max_length": 100, "file": "f.jsonl"}
    done = encode_all([good, bad, long], tokenizer(), **options)
    assert [group.id for group in done.groups] == ["good"] and done.truncated == 0
    assert [(r.file, r.id, r.reason) for r in done.rejected] == [
        ("f.jsonl", "bad", "empty-response"),
        ("f.jsonl", "long", "over-long"),
    ]
    cut = encode_all([good, long], tokenizer(), over_long="truncate_response", **options)
    assert cut.truncated == 1 and len(cut.groups) == 2
    with pytest.raises(DataError, match=r"over-long: 1.*max_length"):
        encode_all([long], tokenizer(), **options)
    with pytest.raises(DataError, match="empty-response: 1") as caught:
        encode_all([bad], tokenizer(), **options)
    assert "max_length" not in str(caught.value)
    assert encode_all([long], tokenizer(), needed=False, **options).groups == []


def test_rejected_answer_with_its_own_prompt():
    """The ids of its pair equal those of a preference with this pair only."""
    whole = preference("a", 2, image(100, 80))
    own = (
        {"role": "user", "content": [{"type": "text", "text": "The lungs?"}, {"type": "image"}]},
    )
    other = (image(60, 60),)
    group = tokenise(replace(whole, rejected_prompts=(None, own), rejected_images=(None, other)))
    assert group.rejected_prompts[0] is None
    alone = tokenise(replace(whole, prompt=own, images=other))
    assert group.rejected_prompts[1] == alone.prompt
    assert group.rejected[1] == alone.rejected[1]
    assert group.prompt == tokenise(whole).prompt
    same_text = replace(whole, rejected=(whole.chosen, whole.rejected[1]))
    assert tokenise(replace(same_text, rejected_prompts=(own, None))).rejected[0] == group.chosen

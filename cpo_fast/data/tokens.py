"""The token ids of a preference's text, as trl 1.16's DPOTrainer makes them of the same row.

A conversation is rendered with the tokenizer's own chat template: the prompt with its generation
prompt, a response as what the template appends for an assistant turn, its end-of-turn included.
Plain text gets no template but the tokenizer's own special tokens, and an end-of-text behind each
answer. Text alone is tokenised together with its prompt, which ends where that differs from the
prompt alone; with images prompt and answers are tokenised apart (trl's two collators).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from cpo_fast.errors import UsageError
from cpo_fast.types import Preference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Ids:
    """Token ids by part; an image is one placeholder still. `rejected_prompts[k]` is None where the
    k-th rejected answer follows `prompt`.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[list[int]]
    rejected_prompts: list[list[int] | None]


def token_ids(preference: Preference, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """The ids of prompt, chosen and rejected answers.

    Where the end of a text prompt merges with one of its answers into a token, that token belongs
    to all answers of the prompt. Raises UsageError for a chat template that does not only append.
    """
    own = preference.rejected_prompts or (None,) * len(preference.rejected)
    answers = zip(preference.rejected, own, strict=True)
    shared = [answer for answer, messages in answers if messages is None]
    prompt, (chosen, *rest) = _ids(
        tokenizer, preference, preference.prompt, [preference.chosen, *shared]
    )
    remaining = iter(rest)
    rejected: list[list[int]] = []
    prompts: list[list[int] | None] = []
    for answer, messages in zip(preference.rejected, own, strict=True):
        if messages is None:
            rejected.append(next(remaining))
            prompts.append(None)
        else:
            alone, (ids,) = _ids(tokenizer, preference, messages, [answer])
            rejected.append(ids)
            prompts.append(alone)
    return Ids(prompt, chosen, rejected, prompts)


def _ids(
    tokenizer: PreTrainedTokenizerBase,
    preference: Preference,
    prompt: Messages,
    answers: Sequence[str],
) -> tuple[list[int], list[list[int]]]:
    """The ids of one prompt and of the answers that follow it."""
    if preference.plain:
        text, texts = str(prompt[0]["content"]), list(answers)
        if not preference.images:
            end = str(tokenizer.eos_token or "")
            texts = [answer if answer.endswith(end) else answer + end for answer in texts]
    else:
        text, texts = _rendered(tokenizer, prompt, answers)
    if preference.images:
        ids, *apart = tokenizer([text, *texts], add_special_tokens=False)["input_ids"]
        return ids, apart
    ids, *whole = tokenizer(
        [text, *(text + answer for answer in texts)], add_special_tokens=preference.plain
    )["input_ids"]
    cut = min(_common(ids, one) for one in whole)
    return ids[:cut], [one[cut:] for one in whole]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two sequences share at their start."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _rendered(
    tokenizer: PreTrainedTokenizerBase, prompt: Messages, answers: Sequence[str]
) -> tuple[str, list[str]]:
    """The prompt as text, and what the template appends to it for each answer."""
    messages = [_flattened(message) for message in prompt]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)  # one conversation, not a batch of them
    texts = []
    for answer in answers:
        turn = {"role": "assistant", "content": answer}
        whole = tokenizer.apply_chat_template([*messages, turn], tokenize=False)
        assert isinstance(whole, str)
        if not whole.startswith(text):
            raise UsageError(
                "the chat template renders the prompt differently once an answer follows; "
                "give the tokenizer a template that only appends"
            )
        texts.append(whole.removeprefix(text))
    return text, texts


def _flattened(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content parts are all text gets a plain string: text-only templates want
    that.
    """
    content = message["content"]
    if not isinstance(content, str):
        if any(part["type"] != "text" for part in content):
            content = [dict(part) for part in content]
        else:
            content = "".join(part["text"] for part in content)
    return {**message, "content": content}

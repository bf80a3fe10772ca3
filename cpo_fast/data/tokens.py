"""The token ids of a preference's text, equal to those of trl 1.16's DPOTrainer for the same row.

A conversation is rendered with the tokenizer's chat template: the prompt with its generation
prompt, a response as the text that the template appends for an assistant turn, with its
end-of-turn. Plain text has no template, but the tokenizer's special tokens, and an end-of-text
token after each answer. Without images, prompt and answer are tokenised together, and the prompt
ends where the ids first differ from those of the prompt alone; with images they are tokenised
separately (trl's two collators).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from cpo_fast.data.preference_values import answer_text
from cpo_fast.errors import RecordError
from cpo_fast.types import IMAGE_TOKEN, Answer, Preference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Ids:
    """Token ids by part, with one placeholder per image. `rejected_prompts[k]` is None if the k-th
    rejected answer follows `prompt`.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[list[int]]
    rejected_prompts: list[list[int] | None]


def token_ids(preference: Preference, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """The ids of prompt, chosen and rejected answers.

    If a token spans the end of a text prompt and the start of an answer, it belongs to all answers
    of the prompt, and so does text that the chat template renders differently once an answer
    follows. Raises RecordError for a preference that cannot be tokenised: "no-chat-template",
    "template-refuses", "template-rewrites-prompt", "prompt-merges", "empty-prompt",
    "empty-response", or, with images and a tokenizer without an image token, "model-cannot-see".
    """
    if preference.all_images and image_token_id(tokenizer) is None:
        raise no_image_support()
    for answer in (preference.chosen, *preference.rejected):
        text = answer_text(answer)
        for token in control_tokens(tokenizer):
            text = text.replace(token, "") if token != IMAGE_TOKEN else text
        if not text.strip():
            raise RecordError("empty-response", "an answer has control tokens only")
    own = preference.rejected_prompts or (None,) * len(preference.rejected)
    answers = zip(preference.rejected, own, strict=True)
    shared = [answer for answer, messages in answers if messages is None]
    prompt, (chosen, *rest) = _tokenize(
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
            alone, (ids,) = _tokenize(tokenizer, preference, messages, [answer])
            rejected.append(ids)
            prompts.append(alone)
    return Ids(prompt, chosen, rejected, prompts)


def _tokenize(
    tokenizer: PreTrainedTokenizerBase,
    preference: Preference,
    prompt: Messages,
    answers: Sequence[Answer],
) -> tuple[list[int], list[list[int]]]:
    """The ids of one prompt and of the answers that follow it."""
    sees = bool(preference.images) or preference.sighted
    if preference.plain:
        text = str(prompt[0]["content"])
        end = "" if sees else str(tokenizer.eos_token or "")
        continuations = [answer_text(answer) for answer in answers]
        texts = [text + (one if one.endswith(end) else one + end) for one in continuations]
    else:
        text, texts = _render(tokenizer, preference, prompt, answers)
    if sees:
        text = text[: min(_common_prefix(text, one) for one in texts)]
        apart = [text, *(one[len(text) :] for one in texts)]
        ids, *answer_ids = tokenizer(apart, add_special_tokens=False)["input_ids"]
        if not ids:
            raise RecordError("empty-prompt", "no token of the prompt is left")
        return ids, answer_ids
    ids, *whole = tokenizer([text, *texts], add_special_tokens=preference.plain)["input_ids"]
    cut = min(_common_prefix(ids, one) for one in whole)
    if not ids:
        raise RecordError("empty-prompt", "no token of the prompt is left")
    if not cut and preference.plain:
        raise RecordError("prompt-merges", "the only token of the prompt merges with an answer's")
    if not cut:
        raise RecordError(
            "template-rewrites-prompt",
            "the chat template renders the whole prompt differently once an answer follows; give "
            "the tokenizer another template",
        )
    return ids[:cut], [one[cut:] for one in whole]


def no_image_support() -> RecordError:
    return RecordError(
        "model-cannot-see",
        "the model has no image processor: use a vision-language model, or leave the images out",
    )


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the image placeholder; None for a tokenizer without one (of a text-only model)."""
    token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return token_id if isinstance(token_id, int) and token_id != tokenizer.unk_token_id else None


@lru_cache(maxsize=2)
def control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The tokenizer's special tokens, the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    names = {str(token) for token in added if token.special} | {*tokenizer.all_special_tokens}
    return tuple(sorted(names - {""}, key=len, reverse=True))


def _common_prefix(one: Sequence[int] | str, other: Sequence[int] | str) -> int:
    """Number of leading ids or characters common to two sequences."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _render(
    tokenizer: PreTrainedTokenizerBase,
    preference: Preference,
    prompt: Messages,
    answers: Sequence[Answer],
) -> tuple[str, list[str]]:
    """The prompt as text, and the whole conversation with each answer.

    Their starts can differ: a template can render earlier turns differently once others follow.
    """

    if not tokenizer.chat_template:
        raise RecordError(
            "no-chat-template",
            "messages need a chat template and the tokenizer has none: use an instruction-tuned "
            "model, or write prompt and answers as strings",
        )

    def text(messages: list[dict[str, Any]], **options: Any) -> str:
        try:
            rendered = tokenizer.apply_chat_template(
                messages, tokenize=False, **preference.template, **options
            )
        except Exception as error:  # a template is a program and can raise anything
            raise RecordError(
                "template-refuses",
                f"{type(error).__name__} at {len(messages)} messages, tools "
                f"{'given' if 'tools' in preference.template else 'none'}",
            ) from None
        assert isinstance(rendered, str)  # one conversation, not a batch
        return rendered

    asked = [_flatten(message) for message in prompt]
    continues = (preference.images or preference.sighted) and asked[-1]["role"] == "assistant"
    wholes = []
    for answer in answers:
        turns = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        wholes.append(text([*asked, *map(_flatten, turns)]))
    if continues:  # trl's image collator only: the answer continues the last turn
        return text(asked, continue_final_message=True), wholes
    return text(asked, add_generation_prompt=True), wholes


def _flatten(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with string content if all parts are text, as text-only templates need."""
    content = message["content"]
    if not isinstance(content, str):
        if any(part["type"] != "text" for part in content):
            content = [dict(part) for part in content]
        else:
            content = "".join(part["text"] for part in content)
    return {**message, "content": content}

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
from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from cpo_fast.data.preference_values import words
from cpo_fast.errors import RecordError
from cpo_fast.types import IMAGE_TOKEN, Answer, Preference

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
    to all answers of the prompt, as does what the chat template renders otherwise once an answer
    follows. Raises RecordError for a preference that cannot be told in tokens: "no-chat-template",
    "template-refuses", "template-rewrites-prompt", "prompt-merges", "empty-prompt",
    "empty-response", or, with images and a tokenizer without a place for them, "model-cannot-see".
    """
    if preference.all_images and image_token_id(tokenizer) is None:
        raise cannot_see()
    for answer in (preference.chosen, *preference.rejected):
        said = words(answer)
        for token in control_tokens(tokenizer):
            said = said.replace(token, "") if token != IMAGE_TOKEN else said
        if not said.strip():
            raise RecordError("empty-response", "an answer has control tokens only")
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
    answers: Sequence[Answer],
) -> tuple[list[int], list[list[int]]]:
    """The ids of one prompt and of the answers that follow it."""
    sees = bool(preference.images) or preference.sighted
    if preference.plain:
        text = str(prompt[0]["content"])
        end = "" if sees else str(tokenizer.eos_token or "")
        said = [words(answer) for answer in answers]
        texts = [text + (one if one.endswith(end) else one + end) for one in said]
    else:
        text, texts = _rendered(tokenizer, preference, prompt, answers)
    if sees:
        text = text[: min(_common(text, one) for one in texts)]
        apart = [text, *(one[len(text) :] for one in texts)]
        ids, *said_ids = tokenizer(apart, add_special_tokens=False)["input_ids"]
        if not ids:
            raise RecordError("empty-prompt", "no token of the prompt is left")
        return ids, said_ids
    ids, *whole = tokenizer([text, *texts], add_special_tokens=preference.plain)["input_ids"]
    cut = min(_common(ids, one) for one in whole)
    if not ids:
        raise RecordError("empty-prompt", "no token of the prompt is left")
    if not cut and preference.plain:
        raise RecordError("prompt-merges", "the only token of the prompt merges with an answer's")
    if not cut:
        raise RecordError(
            "template-rewrites-prompt",
            "the chat template renders the prompt wholly otherwise once an answer follows; give "
            "the tokenizer another template",
        )
    return ids[:cut], [one[cut:] for one in whole]


def cannot_see() -> RecordError:
    return RecordError(
        "model-cannot-see",
        "the model has no image processor: use a vision-language model, or leave the images out",
    )


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the image placeholder, or None for a tokenizer without one (a text-only
    model's).
    """
    token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return token_id if isinstance(token_id, int) and token_id != tokenizer.unk_token_id else None


@lru_cache(maxsize=2)
def control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The tokenizer's special tokens, the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    names = {str(token) for token in added if token.special} | {*tokenizer.all_special_tokens}
    return tuple(sorted(names - {""}, key=len, reverse=True))


def _common(one: Sequence[int] | str, other: Sequence[int] | str) -> int:
    """How many ids or characters two sequences share at their start."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    preference: Preference,
    prompt: Messages,
    answers: Sequence[Answer],
) -> tuple[str, list[str]]:
    """The prompt as text, and the whole conversation with each answer.

    The two need not begin alike: a template may render earlier turns otherwise once others follow.
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
        except Exception as error:  # a template is a program: it fails in any way it likes
            raise RecordError(
                "template-refuses",
                f"{type(error).__name__} at {len(messages)} messages, tools "
                f"{'given' if 'tools' in preference.template else 'none'}",
            ) from None
        assert isinstance(rendered, str)  # one conversation, not a batch of them
        return rendered

    asked = [_flattened(message) for message in prompt]
    goes_on = (preference.images or preference.sighted) and asked[-1]["role"] == "assistant"
    wholes = []
    for answer in answers:
        turns = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        wholes.append(text([*asked, *map(_flattened, turns)]))
    if goes_on:  # trl's collator for images alone lets an answer go on with the last turn
        return text(asked, continue_final_message=True), wholes
    return text(asked, add_generation_prompt=True), wholes


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

"""Preference (text) -> PreferenceGroup (token ids): image placeholders, over-long policy.

The ids of the text are from `cpo_fast.data.tokens` and equal trl's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpo_fast.counting import counted
from cpo_fast.data.pixels import MERGE
from cpo_fast.data.preference_values import answer_text, same_answer
from cpo_fast.data.tokens import image_token_id, no_image_support, token_ids
from cpo_fast.errors import DataError, RecordError, UsageError
from cpo_fast.types import (
    OVER_LONG,
    ImageRef,
    OverLong,
    Preference,
    PreferenceGroup,
    Prompt,
    RejectedRecord,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Grid = tuple[int, int, int]
"""(t, h, w) of an image in patches; it has t * h * w / MERGE**2 visual tokens."""


def encode(
    preference: Preference,
    tokenizer: PreTrainedTokenizerBase,
    image_tokens: Callable[[ImageRef], Grid] | None = None,
    *,
    max_length: int,
    over_long: OverLong = "drop",
) -> PreferenceGroup:
    """Tokenise one preference.

    `image_tokens(ref)` returns the grid of an image without decoding it. A prompt with one of its
    responses can have `max_length` tokens. `over_long` is the policy for longer ones: "drop" the
    record, "truncate_response" (the end of the response, with its end-of-turn, is cut; prompts and
    their image tokens are never cut), or "error".

    Raises RecordError("empty-response" | "chosen-equals-rejected" | "image-placeholder-mismatch" |
    "image-token-in-response" | "rejected-images-mismatch" | "model-cannot-see" | "over-long", and
    those of `token_ids`) for a record to set aside, DataError for an over-long one under "error",
    and whatever `image_tokens` raises.
    """
    return _encode(preference, tokenizer, image_tokens, max_length, over_long)[0]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Result of `encode_all`: groups, records set aside, and the number of truncated groups."""

    groups: list[PreferenceGroup]
    rejected: list[RejectedRecord]
    truncated: int


def encode_all(
    preferences: Iterable[Preference],
    tokenizer: PreTrainedTokenizerBase,
    image_tokens: Callable[[ImageRef], Grid] | None = None,
    *,
    max_length: int,
    over_long: OverLong = "drop",
    file: str = "",
    stage: str = "",
    needed: bool = True,
) -> Encoded:
    """Tokenise all preferences with a progress bar; a RecordError becomes a line of `rejected`.

    `stage` is written to the rejected records, `file` to those without an origin. If `needed`,
    raises DataError with the reasons counted if no group is left; UsageError if all records need a
    chat template or images that the model does not have.
    """
    from tqdm import tqdm

    groups: list[PreferenceGroup] = []
    rejected: list[RejectedRecord] = []
    truncated = 0
    for preference in tqdm(preferences, desc="tokenise", unit="sample", disable=None):
        try:
            group, cut = _encode(preference, tokenizer, image_tokens, max_length, over_long)
        except RecordError as error:
            rejected.append(
                RejectedRecord.of(preference.id, preference.origin, error, file=file, stage=stage)
            )
            continue
        groups.append(group)
        truncated += cut
    if needed and not groups:
        raise _no_groups_error(rejected, f"{file or 'the data'}{f' for {stage}' if stage else ''}")
    return Encoded(groups, rejected, truncated)


_ADVICE = {
    "over-long": "raise max_length (up to the model's positions) or set truncation to "
    "truncate_response",
    "no-chat-template": "use a model whose tokenizer has a chat template, or plain strings",
    "model-cannot-see": "use a vision-language model, or leave the images out",
}


def _no_groups_error(rejected: Sequence[RejectedRecord], what: str) -> DataError | UsageError:
    reasons = Counter(record.reason for record in rejected)
    counted = ", ".join(f"{reason}: {n}" for reason, n in reasons.most_common())
    advice = [_ADVICE[reason] for reason in reasons if reason in _ADVICE]
    message = "; ".join(
        [f"no sample is left after tokenising {what} ({counted or 'it has none'})"]
        + (advice or ["see rejected_records.jsonl"])
    )
    wrong_model = reasons and reasons.keys() <= {"no-chat-template", "model-cannot-see"}
    return UsageError(message) if wrong_model else DataError(message)


def _encode(
    preference: Preference,
    tokenizer: PreTrainedTokenizerBase,
    image_tokens: Callable[[ImageRef], Grid] | None,
    max_length: int,
    over_long: OverLong,
) -> tuple[PreferenceGroup, bool]:
    """The group, and whether a response was truncated."""
    if over_long not in OVER_LONG:
        raise UsageError(f"over_long={over_long!r} is unknown: use one of {', '.join(OVER_LONG)}")
    replaced = preference.rejected_images or (None,) * len(preference.rejected)
    if len(replaced) != len(preference.rejected):
        raise RecordError(
            "rejected-images-mismatch",
            f"{len(replaced)} image lists for {len(preference.rejected)} rejected responses",
        )
    _check_responses(preference, replaced)
    if image_tokens is None and preference.all_images:
        raise no_image_support()

    ids = token_ids(preference, tokenizer)
    pad_id = image_token_id(tokenizer)

    def prompt_of(text_ids: list[int], images: tuple[ImageRef, ...]) -> Prompt:
        return Prompt(_expand(text_ids, images, pad_id, image_tokens), images)

    cuts: list[bool] = []

    def fit(answer: list[int], prompt: Prompt) -> tuple[int, ...]:
        if not answer:
            raise RecordError("empty-response", "an answer has no token")
        if pad_id in answer:
            raise RecordError("image-token-in-response", "a response has an image placeholder")
        room = _room(len(answer), prompt, max_length, over_long, preference.id)
        cuts.append(room < len(answer))
        return tuple(answer[:room])

    prompt = prompt_of(ids.prompt, preference.images)
    prompts = tuple(
        None
        if images is None and own is None
        else prompt_of(own or ids.prompt, preference.images if images is None else images)
        for own, images in zip(ids.rejected_prompts, replaced, strict=True)
    )
    chosen = fit(ids.chosen, prompt)
    rejected = tuple(
        fit(answer, own or prompt) for answer, own in zip(ids.rejected, prompts, strict=True)
    )
    if any(answer == chosen and own is None for answer, own in zip(rejected, prompts, strict=True)):
        raise RecordError(
            "chosen-equals-rejected", f"equal in the first {counted(len(chosen), 'token')}"
        )
    group = PreferenceGroup(
        id=preference.id,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        rejected_prompts=prompts if any(prompts) else (),
        source=preference.source,
        weight=preference.weight,
        origin=preference.origin,
    )
    return group, any(cuts)


def _check_responses(
    preference: Preference, replaced: Sequence[tuple[ImageRef, ...] | None]
) -> None:
    for answer in (preference.chosen, *preference.rejected):
        if not answer_text(answer).strip():
            raise RecordError("empty-response", "chosen or rejected is empty")
    own_prompts = preference.rejected_prompts or (None,) * len(replaced)
    for answer, images, own in zip(preference.rejected, replaced, own_prompts, strict=True):
        same = own is None and (images is None or images == preference.images)
        if same and same_answer(answer, preference.chosen):
            raise RecordError("chosen-equals-rejected", "the two texts are the same")


def _expand(
    ids: Sequence[int],
    images: Sequence[ImageRef],
    pad_id: int | None,
    image_tokens: Callable[[ImageRef], Grid] | None,
) -> tuple[int, ...]:
    """Repeat the placeholder of each image once per visual token."""
    found = 0 if pad_id is None else ids.count(pad_id)
    if found != len(images):
        raise RecordError(
            "image-placeholder-mismatch",
            f"{counted(found, 'placeholder')} for {counted(len(images), 'image')}",
        )
    if not images:
        return tuple(ids)
    assert image_tokens is not None  # `_encode` refuses images otherwise
    counts = iter([t * h * w // MERGE**2 for t, h, w in map(image_tokens, images)])
    expanded: list[int] = []
    for token in ids:
        expanded.extend([token] * next(counts) if token == pad_id else [token])
    return tuple(expanded)


def _room(length: int, prompt: Prompt, max_length: int, over_long: OverLong, name: str) -> int:
    """How many of a response's `length` tokens are kept. Raises RecordError or DataError."""
    room = max_length - len(prompt.input_ids)
    if length <= room:
        return length
    sizes = f"prompt {len(prompt.input_ids)} + response {counted(length, 'token')}"
    detail = f"{sizes}, max_length {max_length}"
    if over_long == "error":
        raise DataError(f"{name} is over-long: {detail}; raise max_length, drop or truncate")
    if over_long == "drop" or room < 1:
        raise RecordError("over-long", detail)
    return room

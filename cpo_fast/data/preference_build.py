"""The last step of every preference format: the parts of a row -> Preference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cpo_fast.counting import counted
from cpo_fast.data.patients import patients_of
from cpo_fast.data.preference_values import (
    Message,
    answer_text,
    image_refs,
    message_text,
    refuse_other_media,
    same_answer,
    text_of,
)
from cpo_fast.errors import RecordError
from cpo_fast.types import Answer, ImageRef, Preference

Row = Mapping[str, Any]

_LABELS = ("label", "kto_tag")
"""The fields of trl and ms-swift, and of LLaMA-Factory, that mark an answer without a pair."""

_OTHER_MARKS = (
    "accepted", "correct", "desirable", "good", "is_accepted", "is_correct", "is_desirable",
    "is_good", "is_preferred", "preferred",
)  # fmt: skip
_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("reward_chosen", "reward_rejected"),
    ("chosen_reward", "rejected_reward"),
)


def read_number(value: Any) -> float | None:
    """The value of a field as a finite float, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def row_images(row: Row, root: str) -> tuple[ImageRef, ...]:
    """The images of a row: the field `images`, else `image`."""
    return image_refs(row.get("images"), root) or image_refs(row.get("image"), root, "image")


def refuse_marked(row: Row, paired: bool) -> None:
    """RecordError if a row (or an entry of a list) marks its answer as bad or ambiguously.

    An answer without a pair is used only if its `label` or `kto_tag`, if any, is true or 1. Beside
    a pair, a label of another type is assumed to have another meaning.
    """
    for name in (*_LABELS, *_OTHER_MARKS):
        if name not in row:
            continue
        mark = row[name]
        if (paired or name in _OTHER_MARKS) and mark is not False:
            continue
        if mark == 0 and paired:  # 0 also means false
            raise RecordError("unclear-label", f"{name} is false beside a chosen answer")
        if mark == 0:
            raise RecordError("answer-marked-bad", f"{name} is false: the answer is not used")
        if mark != 1:
            raise RecordError("unclear-label", f"{name} should be true or false, or rename it")
    for chosen, rejected in _SCORES:
        high, low = read_number(row.get(chosen)), read_number(row.get(rejected))
        if paired and high is not None and low is not None and high < low:
            raise RecordError("scores-contradict", f"{chosen} is below {rejected}")


def _has_content(prompt: Sequence[Message], images: Sequence[ImageRef]) -> bool:
    return bool(images) or any(message_text(turn).strip() or len(turn) > 2 for turn in prompt)


def _texts(prompts: Sequence[Sequence[Message] | None], answers: Sequence[Answer]) -> Iterator[str]:
    for prompt in prompts:
        yield from (message_text(message) for message in prompt or ())
    yield from map(answer_text, answers)


def assemble_preference(
    row: Row,
    id: str,
    prompt: tuple[Message, ...],
    chosen: Answer,
    rejected: Sequence[Answer],
    images: tuple[ImageRef, ...] = (),
    rejected_images: tuple[ImageRef, ...] | None = None,
    rejected_prompt: tuple[Message, ...] | None = None,
    plain: bool = False,
    template: Mapping[str, Any] | None = None,
    sighted: bool = False,
) -> Preference:
    """The preference of a row's parts. Raises RecordError for inconsistent parts."""
    refuse_marked(row, bool(rejected))
    if not _has_content(prompt, images):
        raise RecordError("empty-prompt", "the prompt has no text and no image")
    for text in _texts([prompt, rejected_prompt], [chosen, *rejected]):
        refuse_other_media(text)
    other_images = rejected_images is not None and rejected_images != images
    differs = other_images or rejected_prompt is not None
    if not differs and any(same_answer(text, chosen) for text in rejected):
        raise RecordError("chosen-equals-rejected", "the two texts are the same")
    if other_images and rejected_prompt is None and len(rejected_images or ()) != len(images):
        raise RecordError(
            "image-placeholder-mismatch",
            f"{counted(len(rejected_images or ()), 'rejected image')} for "
            f"{counted(len(images), 'image')}",
        )
    weight = 1.0 if row.get("weight") is None else read_number(row["weight"])
    if weight is None or weight <= 0:
        raise RecordError("bad-weight", "weight should be a positive number")
    given = row.get("id")
    known = isinstance(given, int | str) and not isinstance(given, bool) and given != ""
    return Preference(
        id=text_of(str(given), "id")[:200] if known else id,
        prompt=prompt,
        chosen=chosen,
        rejected=tuple(rejected),
        images=images,
        rejected_images=(rejected_images,) * len(rejected) if other_images else (),
        source="perception" if other_images else "thinking",
        weight=weight,
        rejected_prompts=(rejected_prompt,) * len(rejected) if rejected_prompt else (),
        plain=plain,
        template=template or {},
        sighted=sighted,
        patients=patients_of(row, images),
    )


def no_rejected() -> RecordError:
    return RecordError("no-rejected", "there is no answer to compare with the chosen one")

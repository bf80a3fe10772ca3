"""One row of a preference file -> Preference, for each format that its users already have.

A parser takes the row's fields, the folder that image paths are relative to, and the id that the
row gets when it brings none. It raises RecordError as `preference_values` does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cpo_fast.data.labels import NO_FINDING, question, thought
from cpo_fast.data.patients import patients_of
from cpo_fast.data.preference_values import (
    Message,
    image_refs,
    list_of,
    message_of,
    messages,
    object_of,
    placeholders,
    response,
    same_answer,
    tags_to_parts,
    template_options,
    text_of,
    with_images,
)
from cpo_fast.errors import RecordError
from cpo_fast.types import Answer, ImageRef, Preference

Row = Mapping[str, Any]

IMAGE_TOKEN = "<|image_pad|>"
"""What Qwen2.5-VL writes for an image in plain text."""

_NECTAR_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_DICOM = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{8}){4}")


def _preference(
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
    other_images = rejected_images is not None and rejected_images != images
    differs = other_images or rejected_prompt is not None
    if not differs and any(same_answer(text, chosen) for text in rejected):
        raise RecordError("chosen-equals-rejected", "the two texts are the same")
    if other_images and rejected_prompt is None and len(rejected_images or ()) != len(images):
        raise RecordError(
            "image-placeholder-mismatch",
            f"{len(rejected_images or ())} rejected images for {len(images)} images",
        )
    weight = row.get("weight")
    if weight is None:
        weight = 1.0
    usable = isinstance(weight, int | float) and math.isfinite(weight) and weight > 0
    if not usable or isinstance(weight, bool):
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
        weight=float(weight),
        rejected_prompts=(rejected_prompt,) * len(rejected) if rejected_prompt else (),
        plain=plain,
        template=template or {},
        sighted=sighted,
        patients=patients_of(row, images),
    )


def _no_rejected() -> RecordError:
    return RecordError("no-rejected", "there is nothing to prefer the chosen answer to")


def _shared_start(chosen: list[Any], rejected: list[Any]) -> int:
    """How many messages, or characters, two answers have in common at their start; as in trl the
    shorter one keeps its last."""
    last = min(len(chosen), len(rejected)) - 1
    return next((n for n in range(last) if chosen[n] != rejected[n]), max(last, 0))


def _implicit(chosen: Any, rejected: Any) -> tuple[list[Message], Any, Any]:
    """Prompt and answers out of two conversations, or texts, that share their start."""
    if chosen is not None and chosen == rejected:
        raise RecordError("chosen-equals-rejected", "the two conversations are the same")
    if isinstance(chosen, list) and isinstance(rejected, list):
        cut = _shared_start(chosen, rejected)
        return messages(chosen[:cut], "chosen"), chosen[cut:], rejected[cut:]
    chosen, rejected = text_of(chosen, "chosen"), text_of(rejected, "rejected")
    cut = _shared_start(list(chosen), list(rejected))
    if cut and chosen[cut] != rejected[cut] and chosen[cut - 1] == " ":
        cut -= 1  # as trl does: the space belongs to the answers
    return messages(chosen[:cut], "chosen") if cut else [], chosen[cut:], rejected[cut:]


def parse_trl(row: Row, root: str, id: str) -> Preference:
    """trl, and our own rows, which may hold `rejected_responses` in place of `rejected`, and
    `rejected_images` or `rejected_prompt` for what the rejected answers were given instead.

    The prompt is implicit (what both answers share) when there is none or when it is text and the
    answers are conversations. Images without a placeholder stand before what the first user says.
    Where prompt and answers are all strings they are plain text, without a chat template; with
    images they are so only if the prompt holds the model's own placeholder for each.
    A row of trl's SFTTrainer has `completion` in place of the two answers, one of ours no
    `rejected_responses` in its list: an answer to learn, without a pair.
    `ref_chosen_logps` and `ref_rejected_logps` are not used: the reference is the run's own model.
    """
    alone = row.get("completion") if "chosen" not in row else None
    chosen = row.get("chosen") if alone is None else alone
    several = row.get("rejected_responses")
    given = row.get("prompt")
    conversation = isinstance(chosen, list) and isinstance(given, str)
    rejected: list[Any]
    if several is not None:
        prompt, rejected = messages(given, "prompt"), list_of(several, "rejected_responses")
    elif alone is not None:
        prompt, rejected = messages(given, "prompt"), []
    elif given is None or conversation:
        prompt, chosen, other = _implicit(chosen, row.get("rejected"))
        rejected = [other]
    else:
        prompt, rejected = messages(given, "prompt"), [row.get("rejected")]
    name = "rejected" if several is None else "rejected_responses"
    answers = [response(one, name) for one in rejected]
    images = image_refs(row.get("images"), root) or image_refs(row.get("image"), root, "image")
    own = row.get("rejected_images")
    own_images = image_refs(own, root, "rejected_images") if own else None
    own_prompt = None
    if (other_prompt := row.get("rejected_prompt")) is not None:
        turns = messages(other_prompt, "rejected_prompt")
        count = len(images if own_images is None else own_images)
        own_prompt = with_images(turns, count, insert=not placeholders(turns))
    said = prompt[0]["content"] if prompt and not isinstance(given, list) else None
    plain = (
        isinstance(said, str)
        and own_prompt is None
        and all(isinstance(one, str) for one in (chosen, *rejected))
    )
    if plain and images:
        plain = IMAGE_TOKEN in str(said)
        if plain and str(said).count(IMAGE_TOKEN) != len(images):
            raise RecordError("image-placeholder-mismatch", "the text has another number of images")
    return _preference(
        row,
        id,
        tuple(prompt)
        if plain
        else with_images(prompt, len(images), insert=not placeholders(prompt)),
        response(chosen, "chosen"),
        answers,
        images,
        own_images,
        own_prompt,
        plain=plain,
        template=template_options(row),
        sighted=row.get("images") == [],
    )


def parse_swift(row: Row, root: str, id: str) -> Preference:
    """ms-swift: the last of `messages` is the chosen answer, `<image>` tags mark the images.

    `rejected_messages` that begin otherwise, and a `rejected_response` of several messages, give
    the rejected answer a prompt of its own: of each conversation the last answer is scored. A row
    without any field for it has no rejected answer.
    """
    turns = messages(row.get("messages"), "messages")
    if not turns or turns[-1]["role"] != "assistant":
        raise RecordError("not-one-answer", "messages should end with the assistant's answer")
    chosen = response([turns[-1]], "messages")
    system: list[Message] = []
    if isinstance(said := row.get("system"), str) and said:
        system = [{"role": "system", "content": text_of(said, "system")}]
    images = image_refs(row.get("images"), root)
    own = row.get("rejected_images")
    own_images = image_refs(own, root, "rejected_images") if own else None
    rejected, own_prompt, others = chosen, None, None
    if (given := row.get("rejected_response")) is not None:
        if isinstance(given, list):
            asked = max((n for n, t in enumerate(turns, 1) if t["role"] != "assistant"), default=0)
            others = [*turns[:asked], *messages(given, "rejected_response")]
        else:
            rejected = response(given, "rejected_response")
    elif (given := row.get("rejected_messages")) is not None:
        others = messages(given, "rejected_messages")
    elif own_images is None and any(name.startswith("rejected_") for name in row):
        raise _no_rejected()
    if others is not None:
        rejected = response(others[-1:], "rejected_messages")
        if others[:-1] != turns[:-1]:
            count = len(images if own_images is None else own_images)
            own_prompt = with_images(tags_to_parts([*system, *others[:-1]]), count, insert=True)
    return _preference(
        row,
        id,
        with_images(tags_to_parts([*system, *turns[:-1]]), len(images), insert=True),
        chosen,
        (rejected,) if any(name.startswith("rejected_") for name in row) else (),
        images,
        own_images,
        own_prompt,
    )


def parse_llama_factory(row: Row, root: str, id: str) -> Preference:
    """LLaMA-Factory's sharegpt preferences: `conversations` end with what a human says."""
    turns = [
        message_of(turn, "conversations", "from", "value")
        for turn in list_of(row.get("conversations"), "conversations")
    ]
    if not turns or turns[-1]["role"] != "user":
        raise RecordError("not-one-answer", "conversations should end with what a human says")
    if isinstance(system := row.get("system"), str) and system:
        turns = [{"role": "system", "content": text_of(system, "system")}, *turns]
    chosen, rejected = (
        response([message_of(row.get(name), name, "from", "value")], name)
        for name in ("chosen", "rejected")
    )
    images = image_refs(row.get("images"), root)
    prompt = with_images(tags_to_parts(turns), len(images), insert=False)
    return _preference(row, id, prompt, chosen, (rejected,), images)


def _nectar_prompt(text: str) -> list[Message]:
    """Turns of a text marked "Human:" and "Assistant:"; one of the user where nothing is marked."""
    _, *turns = _NECTAR_TURN.split(text)
    speakers = {"Human": "user", "Assistant": "assistant"}
    said: list[Message] = [
        {"role": speakers[who], "content": what.strip()}
        for who, what in zip(turns[::2], turns[1::2], strict=True)
        if what.strip()
    ]
    return said or [{"role": "user", "content": text}]


def parse_ranked(row: Row, root: str, id: str) -> Preference:
    """Ranked answers, the lowest rank best: NeMo-RL's `completions` or Nectar's `answers`.

    The best one is chosen, all that rank worse are rejected, in order; those that tie with it are
    left out.
    """
    field, name = ("completions", "completion") if "completions" in row else ("answers", "answer")
    listed = []
    for entry in list_of(row.get(field), field):
        rank = object_of(entry, field).get("rank")
        if isinstance(rank, bool) or not isinstance(rank, int | float) or not math.isfinite(rank):
            raise RecordError("bad-rank", f"{field} has a rank that is not a number")
        listed.append((rank, response(entry.get(name), field)))
    if not listed:
        raise RecordError("empty-response", f"{field} is empty")
    listed.sort(key=lambda pair: pair[0])
    best, chosen = listed[0]
    if listed[-1][0] == best:
        raise _no_rejected()
    if "context" in row:
        prompt = messages(row["context"], "context")
    else:
        prompt = _nectar_prompt(text_of(row.get("prompt"), "prompt"))
    images = image_refs(row.get("images"), root)
    return _preference(
        row,
        id,
        with_images(prompt, len(images), insert=not placeholders(prompt)),
        chosen,
        [text for rank, text in listed if rank > best],
        images,
    )


def _ccf_ids(row: Row) -> tuple[str | None, str | None]:
    """(study, patient) out of `sid` and `pid`, by their leading digit."""
    ids = [str(row.get(name) or "").lstrip("ps") for name in ("sid", "pid")]
    study = next((one for one in ids if re.fullmatch(r"5\d{7}", one)), None)
    return study, next((one for one in ids if re.fullmatch(r"1\d{7}", one)), None)


def _ccf_image(row: Row) -> tuple[str, str]:
    """(study id, path of the image below MIMIC-CXR's root)."""
    study, patient = _ccf_ids(row)
    dicom = row["dicom_id"]
    named = isinstance(dicom, str) and _DICOM.fullmatch(dicom)
    if study is None or patient is None or not named:
        raise RecordError("bad-id", "sid, pid or dicom_id is malformed")
    return f"s{study}", f"files/p{patient[:2]}/p{patient}/s{study}/{dicom}.jpg"


def _told(value: Any, field: str) -> str:
    if not text_of(value, field).strip():
        raise RecordError("empty-response", f"{field} is empty")
    return str(value)


def parse_ccf(row: Row, root: str, id: str) -> Preference:
    """CXR-CounterFact: every counterfactual of the item is rejected, in its order.

    `sid` and `pid` stand the wrong way round in some releases: a patient's id begins with 1, a
    study's with 5. The image lies where MIMIC-CXR-JPG puts it, below `root`; an item without
    `dicom_id` has none.
    """
    images: tuple[ImageRef, ...] = ()
    if row.get("dicom_id"):
        id, path = _ccf_image(row)
        images = (ImageRef(path, root),)
    elif sid := row.get("sid"):
        id = text_of(sid, "sid")[:200]
    report, diagnose = (text_of(row.get(name), name) for name in ("report", "diagnose"))
    if not report.strip() or not diagnose.strip():
        raise RecordError("empty-response", "report or diagnose is empty")
    rejected = [
        thought(_told(text, "counterfact"), (text_of(name, "counterfact"),))
        for name, text in object_of(row.get("counterfact"), "counterfact").items()
    ]
    chosen = f"<think> {report} </think> {diagnose}"
    told = {**row, "patient_id": _ccf_ids(row)[1] or row.get("pid")}
    return _preference(told, id, question(len(images)), chosen, rejected, images)


def parse_counterfactual(row: Row, root: str, id: str) -> Preference:
    """A line of our counterfactuals.jsonl (`cpo_fast.types.Counterfactual`).

    Thinking: the rewritten report and its target against the original. Perception: the same answer
    with `rejected_images` in place of the images.
    """
    checks = object_of(row.get("checks") or {}, "checks")
    if failed := sum(passed is not True for passed in checks.values()):
        raise RecordError("counterfactual-checks", f"{failed} of {len(checks)} checks failed")
    images = image_refs(row.get("images"), root)
    names = [text_of(name, "labels") for name in list_of(row.get("labels"), "labels")]
    chosen = thought(_told(row.get("report"), "report"), names or (NO_FINDING,))
    own = image_refs(row.get("rejected_images"), root, "rejected_images") or None
    if row.get("kind") == "perception":
        if own is None:
            raise RecordError("missing-field", "a perception row needs rejected_images")
        rejected = chosen
    else:
        own = None
        target = text_of(row.get("target"), "target")
        rejected = thought(_told(row.get("counterfactual"), "counterfactual"), (target,))
    study = text_of(row.get("study_id"), "study_id")
    return _preference(
        {**row, "id": study}, id, question(len(images)), chosen, (rejected,), images, own
    )


PARSERS: dict[str, Callable[[Row, str, str], Preference]] = {
    "trl": parse_trl,
    "ms-swift": parse_swift,
    "llama-factory": parse_llama_factory,
    "ranked": parse_ranked,
    "ccf": parse_ccf,
    "preferences": parse_trl,
    "counterfactuals": parse_counterfactual,
}
"""Format name -> parser; "preferences" and "counterfactuals" are what this project writes."""


def tell(row: Row) -> str | None:
    """The format that the fields of `row` tell, or None."""
    names = row.keys()
    if {"counterfactual", "target", "report"} <= names:
        return "counterfactuals"
    if {"counterfact", "report"} <= names:
        return "ccf"
    if {"context", "completions"} <= names or {"prompt", "answers"} <= names:
        return "ranked"
    if {"conversations", "chosen", "rejected"} <= names:
        return "llama-factory"
    if "messages" in names:
        return "ms-swift"
    if {"chosen", "rejected_responses"} <= names:
        return "preferences"
    pair, alone = {"chosen", "rejected"}, {"prompt", "completion"}
    return "trl" if pair <= names or alone <= names else None

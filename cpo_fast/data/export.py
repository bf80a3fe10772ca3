"""Preferences and studies as rows for this project and other tools.

"jsonl" is this project's format and keeps everything; "trl", "swift" (ms-swift) and "ccf"
(CXR-CounterFact) keep what they can represent, and other records are set aside with a reason.
A study has no rejected answer: it becomes a row of supervised fine-tuning.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from cpo_fast.data.labels import ANSWER
from cpo_fast.data.lengths import as_preference
from cpo_fast.data.preference_values import IMAGE_TAG, parts_of
from cpo_fast.data.source import Source
from cpo_fast.errors import DataError, RecordError
from cpo_fast.folders import replace_private
from cpo_fast.types import Answer, ImageRef, Preference

Row = dict[str, Any]

_THOUGHT = re.compile(r"<think> (.*) </think> (.*)", re.DOTALL)
_PLACE = re.compile(r"(?:.*/)?p(1\d{7})/s(5\d{7})/([0-9a-f]{8}(?:-[0-9a-f]{8}){4})\.\w+")
_OWN = ("rejected_images", "rejected_prompt")
_ALL_IMAGES = 1_000


def _image(ref: ImageRef) -> str | Row:
    """The path unchanged, or the bytes in base64."""
    if ref.data is None:
        return ref.path
    return {"bytes": base64.b64encode(ref.data).decode(), "path": ref.path or None}


def _images(refs: Sequence[ImageRef]) -> list[str | Row]:
    return [_image(ref) for ref in refs]


def _image_field(one: Preference) -> Row:
    return {"images": _images(one.images)} if one.images or one.sighted else {}


def _patient_field(one: Preference) -> Row:
    """The patient, whose rows all stay on one side of a split."""
    if not one.patients:
        return {}
    return {"patient_id": one.patients[0] if len(one.patients) == 1 else list(one.patients)}


def _parts(one: Preference) -> Iterator[tuple[Answer, tuple[ImageRef, ...] | None, Any]]:
    """(rejected answer, its images or None, its prompt or None)."""
    count = len(one.rejected)
    yield from zip(
        one.rejected,
        one.rejected_images or (None,) * count,
        one.rejected_prompts or (None,) * count,
        strict=True,
    )


def _check_same_prompts(one: Preference, form: str) -> None:
    if any(one.rejected_prompts):
        raise RecordError("prompts-differ", f"{form} has one prompt for both answers")


def _answer(answer: Answer) -> str | list[Row]:
    return answer if isinstance(answer, str) else [dict(turn) for turn in answer]


def _template(one: Preference) -> Row:
    """The fields with arguments of the chat template besides the messages."""
    options = {name: value for name, value in one.template.items() if name != "tools"}
    row: Row = {"chat_template_kwargs": options} if options else {}
    return row | ({"tools": one.template["tools"]} if "tools" in one.template else {})


def jsonl_rows(one: Preference) -> list[Row]:
    """Rows of this project: one for all answers with the same images and prompt."""
    row: Row = {
        "id": one.id,
        **_image_field(one),
        **_patient_field(one),
        "prompt": one.prompt[0]["content"] if one.plain else list(one.prompt),
        "chosen": _answer(one.chosen),
    }
    if one.weight != 1.0:
        row["weight"] = one.weight
    row.update(_template(one))
    rows: list[Row] = []
    for text, images, prompt in _parts(one):
        own: Row = {} if images is None else {"rejected_images": _images(images)}
        if prompt is not None:
            own["rejected_prompt"] = list(prompt)
        if rows and all(rows[-1].get(name) == own.get(name) for name in _OWN):
            rows[-1]["rejected_responses"].append(_answer(text))
        else:
            rows.append({**row, "rejected_responses": [_answer(text)], **own})
    return rows or [{**row, "rejected_responses": []}]


def trl_rows(one: Preference) -> list[Row]:
    """Rows of trl's DPOTrainer, one per rejected answer; of its SFTTrainer if there is none."""
    _check_same_prompts(one, "trl")
    if any(one.rejected_images):
        raise RecordError("rejected-images", "trl shows both answers the same images")

    def messages(answer: Answer) -> str | list[Row]:
        if one.plain or not isinstance(answer, str):
            return _answer(answer)
        return [{"role": "assistant", "content": answer}]

    prompt = one.prompt[0]["content"] if one.plain else list(one.prompt)
    row = {"id": one.id, **_image_field(one), **_patient_field(one), "prompt": prompt}
    row |= _template(one)
    if not one.rejected:
        return [{**row, "completion": messages(one.chosen)}]
    row["chosen"] = messages(one.chosen)
    return [{**row, "rejected": messages(text)} for text in one.rejected]


def _tagged(message: Mapping[str, Any]) -> Row:
    """A message with an `<image>` tag for every image."""
    parts = parts_of(message)
    if any(IMAGE_TAG in part.get("text", "") for part in parts):
        raise RecordError("image-tag-in-text", "ms-swift would take it for an image")
    text = "".join(part["text"] if part["type"] == "text" else IMAGE_TAG for part in parts)
    return {"role": message["role"], "content": text}


def swift_rows(one: Preference) -> list[Row]:
    """Rows of ms-swift: the last of `messages` is the chosen answer, images are tags."""
    if one.plain:
        raise RecordError("plain-text", "ms-swift has conversations only")
    prompts = (one.prompt, *(prompt or () for prompt in one.rejected_prompts))
    if one.template or any(
        turn.keys() > {"role", "content"} for turns in prompts for turn in turns
    ):
        raise RecordError(
            "tools", "ms-swift writes tools and options of a chat template differently"
        )
    answers = (one.chosen, *one.rejected)
    if any(not isinstance(answer, str) for answer in answers):
        raise RecordError("several-turns", "ms-swift scores the last answer of a conversation only")
    if any(IMAGE_TAG in str(answer) for answer in answers):
        raise RecordError("image-tag-in-text", "ms-swift would take it for an image")
    prompt = [_tagged(message) for message in one.prompt]
    chosen = {"role": "assistant", "content": one.chosen}
    row: Row = {"messages": [*prompt, chosen], "images": _images(one.images), **_patient_field(one)}
    rows = []
    for text, images, own_prompt in _parts(one):
        own: Row = {} if images is None else {"rejected_images": _images(images)}
        if own_prompt is not None:
            turns = [_tagged(message) for message in own_prompt]
            own["rejected_messages"] = [*turns, {"role": "assistant", "content": text}]
        elif images is None or text != one.chosen:
            own["rejected_response"] = text
        rows.append({**row, **own})
    return rows or [row]


def ccf_item(
    dicom_id: str, sid: str, pid: str, report: str, diagnose: str, counterfact: dict[str, str]
) -> Row:
    """An item of CXR-CounterFact; `counterfact` maps a disease to its report."""
    return {
        "dicom_id": dicom_id, "sid": sid, "pid": pid, "report": report, "diagnose": diagnose,
        "counterfact": counterfact,
    }  # fmt: skip


def ccf_rows(one: Preference) -> list[Row]:
    """One item of CXR-CounterFact, from answers of a report in `<think>` tags and a sentence."""
    _check_same_prompts(one, "ccf")
    if any(one.rejected_images) or len(one.images) > 1:
        raise RecordError("several-images", "ccf has one image for all answers")
    answers = [answer for answer in (one.chosen, *one.rejected) if isinstance(answer, str)]
    if len(answers) < 1 + len(one.rejected):
        raise RecordError("not-a-thought", "an answer has several messages")
    chosen = _THOUGHT.fullmatch(answers[0])
    if chosen is None:
        raise RecordError("not-a-thought", "the chosen answer is not <think> report </think> ...")
    reports: dict[str, str] = {}
    for text in answers[1:]:
        found = _THOUGHT.fullmatch(text)
        named = found and ANSWER.fullmatch(found[2])
        if found is None or not named or named[1] in reports:
            raise RecordError("not-a-thought", "a rejected answer names no disease, or one twice")
        reports[named[1]] = found[1]
    place = _PLACE.fullmatch(one.images[0].path) if one.images else None
    if one.images and place is None:
        raise RecordError("not-mimic", "ccf finds images by ids of MIMIC-CXR")
    patient, study, dicom = place.groups() if place else ("", one.id, "")
    return [ccf_item(dicom, study, patient, chosen[1], chosen[2], reports)]


FORMATS = {"jsonl": jsonl_rows, "ccf": ccf_rows, "trl": trl_rows, "swift": swift_rows}
"""Format name -> rows of one preference; RecordError if the format cannot represent it."""


@dataclass(frozen=True, slots=True)
class Exported:
    """Numbers of records and rows written, of records set aside by reason, and whether a row
    contains an image path."""

    records: int
    rows: int
    rejected: dict[str, int]
    paths: bool = False


class RowWriter:
    """Writes rows to an open text file, one per line; "ccf" is one JSON list."""

    def __init__(self, file: IO[str], form: str) -> None:
        self.file, self.is_list, self.count = file, form == "ccf", 0
        if self.is_list:
            file.write("[\n")

    def write(self, row: Row) -> None:
        text = json.dumps(row, ensure_ascii=False)
        self.file.write((",\n" if self.count else "") + text if self.is_list else text + "\n")
        self.count += 1

    def close(self) -> None:
        """End the list of "ccf"."""
        if self.is_list:
            self.file.write("\n]\n")


def export(
    source: Source[Any], output: str | Path, form: str, *, max_images: int = _ALL_IMAGES
) -> Exported:
    """Write `source` to `output` (0600) in a format of `FORMATS`, one row per line; "ccf" is one
    JSON list. Image paths are written unchanged, relative to the source's image root.

    `output` is replaced once it is complete. Raises DataError if it cannot be written or no record
    can be exported.
    """
    make = FORMATS[form]
    records = 0
    paths = False
    reasons: Counter[str] = Counter()
    try:
        with replace_private(Path(output)) as file:
            rows = RowWriter(file, form)
            for record in tqdm(source, "export", unit=source.noun, disable=None):
                try:
                    one = as_preference(record, max_images)
                    made = make(one)
                except RecordError as error:
                    reasons[error.reason] += 1
                    continue
                for row in made:
                    rows.write(row)
                records += 1
                shown = (one.images, *(images or () for images in one.rejected_images))
                paths |= any(ref.data is None for images in shown for ref in images)
            rows.close()
            reasons.update(source.reasons())
            if not rows.count:
                counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
                raise DataError(f"{source.path}: no record can be written as {form} ({counts})")
    except OSError as error:
        raise DataError(
            f"{output}: cannot be written ({error.strerror}); choose another --output"
        ) from None
    return Exported(records, rows.count, dict(reasons.most_common()), paths)

"""Fields of a row that its format does not read: nothing that belongs to the question is lost.

A field that is part of the question, of the answers or a picture by its name sets the row aside;
beside a prompt that is only what two texts share, so does any field with text. Other fields with
text are counted by name. What already stands in the prompt or an answer is not lost.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from cpo_fast.data.patients import is_patient, names_patient
from cpo_fast.data.preference_values import text_in, words
from cpo_fast.errors import RecordError
from cpo_fast.types import Preference

_EVERYWHERE = frozenset(
    {"id", "weight", "system", "image", "images", "ref_chosen_logps", "ref_rejected_logps"}
)
_TRL = frozenset(
    {"prompt", "chosen", "rejected", "completion", "rejected_responses", "rejected_images",
     "rejected_prompt", "tools", "chat_template_kwargs"}
)  # fmt: skip
_ALPACA = frozenset(
    {"instruction", "input", "question", "query", "history", "chosen", "rejected", "response",
     "rejected_response"}
)  # fmt: skip
_READ: Mapping[str, frozenset[str]] = {
    "trl": _TRL,
    "preferences": _TRL,
    "ms-swift": frozenset(
        {"messages", "rejected_response", "rejected_messages", "rejected_images"}
    ),
    "llama-factory": frozenset({"conversations", "chosen", "rejected"}),
    "alpaca": _ALPACA,
    "ranked": frozenset({"context", "completions", "prompt", "answers"}),
    "ccf": frozenset({"report", "diagnose", "counterfact"}),
    "counterfactuals": frozenset(
        {"report", "counterfactual", "counterfactual_labels", "labels", "rejected_images"}
    ),
}
"""What each parser reads, beside `_EVERYWHERE`."""

_QUESTION = frozenset(
    {"article", "background", "choices", "clinical_history", "comparison", "context", "contexts",
     "conversation", "conversations", "dialogue", "document", "documents", "evidence", "findings",
     "functions", "hint", "history", "indication", "input", "inputs", "instruction",
     "instructions", "knowledge", "messages", "options", "passage", "passages", "patient",
     "prompt", "query", "question", "questions", "report", "rejected_prompt", "source_text",
     "system_message", "system_prompt", "tools"}
)  # fmt: skip
_ANSWERS = frozenset(
    {"answers", "chosen", "completion", "completions", "rejected", "rejected_messages",
     "rejected_response", "rejected_responses"}
)  # fmt: skip
_PICTURES = frozenset(
    {"image_file", "image_files", "image_path", "image_paths", "image_url", "image_urls", "img",
     "img_path", "imgs", "picture", "pictures", "rejected_images"}
)  # fmt: skip
_OTHER_MEDIA = frozenset({"audio", "audio_path", "audios", "video", "video_path", "videos"})
_ABOUT = frozenset(
    {"annotator", "category", "comment", "created_at", "dataset", "dataset_name", "date",
     "language", "license", "model", "source", "split", "subset", "task", "timestamp", "type",
     "url", "version"}
)  # fmt: skip
"""Fields about the row."""

_NAME = re.compile(r"[A-Za-z][\w\-]{0,39}", re.ASCII)


def shown(name: str) -> str:
    """A field's name for messages, if it looks like one: it might be anything."""
    return name if _NAME.fullmatch(name) else "a field"


def _texts(value: Any) -> Iterator[str]:
    """What a field says: text, lists of it, messages and their parts, objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, dict):
        said = [value[name] for name in ("content", "text", "value") if name in value]
        for one in said or value.values():
            yield from _texts(one)


def _joined(text: str) -> str:
    return "".join(text.split())


def unread_fields(row: Mapping[str, Any], one: Preference, kind: str) -> list[str]:
    """The names of the fields whose text nobody reads, where the row can be used without it.

    Raises RecordError("unread-field" or "unsupported-medium", with the field's name) where the row
    would ask something else without that field.
    """
    known = _EVERYWHERE | _READ[kind]
    if isinstance(row.get("chosen"), list) and isinstance(row.get("prompt"), str):
        known -= {"prompt"}  # trl takes what the conversations share
    implicit = kind == "trl" and row.get("prompt") is None and one.plain
    said = ""
    found = []
    for name, value in row.items():
        if name in known or value is None or value in ("", [], {}):
            continue
        if name in _OTHER_MEDIA:
            raise RecordError("unsupported-medium", f"{name}: only images and text are read")
        if name in _PICTURES:
            raise RecordError("unread-field", f"{name}: the images of a row belong in images")
        texts = [text for text in _texts(value) if text.strip()]
        if not texts or (names_patient(name) and is_patient(value)):
            continue
        said = said or _joined(
            " ".join([*map(text_in, one.prompt), *map(words, (one.chosen, *one.rejected))])
        )
        if all(_joined(text) in said for text in texts):
            continue
        sentence = any(len(text.split()) > 1 for text in texts)
        needed = (name in _QUESTION and name not in _READ[kind]) or name in _ANSWERS
        if needed or (implicit and sentence and name not in _ABOUT):
            raise RecordError(
                "unread-field",
                f"{shown(name)} has text that rows of {kind} do not have: write it into the "
                "prompt, or remove it",
            )
        if (sentence and name not in _ABOUT) or name in _QUESTION:
            found.append(shown(name))
    return found

"""Fields of a row that its format does not read: no part of a question is lost silently.

A row is set aside if an unread field, by its name, belongs to the question, the answers or the
images; beside an implicit plain-text prompt, any unread field with text has this effect. Other
fields with text are counted by name. Text that the prompt or an answer also contains is not lost.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from cpo_fast.data.patients import is_patient, names_patient
from cpo_fast.data.preference_values import answer_text, message_text
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
"""Fields read by each parser, besides `_EVERYWHERE`."""


def find_misspelt(names: Iterable[str]) -> dict[str, str]:
    """The field that is probably meant, for each name that no format reads but nearly is one."""
    known = sorted(_EVERYWHERE.union(*_READ.values()))
    unknown = (name for name in names if name not in known)
    close = {name: get_close_matches(name, known, n=1, cutoff=0.8) for name in unknown}
    return {name: found[0] for name, found in close.items() if found}


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
"""Fields with metadata of the row."""

_NAME = re.compile(r"[A-Za-z][\w\-]{0,39}", re.ASCII)


def field_name(name: str) -> str:
    """A field's name for messages, if it is well-formed: it can be any text."""
    return name if _NAME.fullmatch(name) else "a field"


def _texts(value: Any) -> Iterator[str]:
    """The texts in a field: text, lists, messages and their parts, objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, dict):
        known = [value[name] for name in ("content", "text", "value") if name in value]
        for one in known or value.values():
            yield from _texts(one)


def _without_space(text: str) -> str:
    return "".join(text.split())


def unread_fields(row: Mapping[str, Any], one: Preference, kind: str) -> list[str]:
    """The names of fields with text that is not read, in a row that is usable without them.

    Raises RecordError("unread-field" or "unsupported-medium", with the field's name) if the
    question would change without that field.
    """
    known = _EVERYWHERE | _READ[kind]
    if isinstance(row.get("chosen"), list) and isinstance(row.get("prompt"), str):
        known -= {"prompt"}  # trl uses the common start of the conversations
    implicit = kind == "trl" and row.get("prompt") is None and one.plain
    content = ""
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
        content = content or _without_space(
            " ".join(
                [*map(message_text, one.prompt), *map(answer_text, (one.chosen, *one.rejected))]
            )
        )
        if all(_without_space(text) in content for text in texts):
            continue
        sentence = any(len(text.split()) > 1 for text in texts)
        needed = (name in _QUESTION and name not in _READ[kind]) or name in _ANSWERS
        if needed or (implicit and sentence and name not in _ABOUT):
            raise RecordError(
                "unread-field",
                f"{field_name(name)} has text that rows of {kind} do not have: write it into the "
                "prompt, or remove it",
            )
        if (sentence and name not in _ABOUT) or name in _QUESTION:
            found.append(field_name(name))
    return found

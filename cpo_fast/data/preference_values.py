"""What the formats of preference files have in common: checked values, images, messages.

Each function takes a value from a file and the name of its field, and raises RecordError with a
constant reason and that name, never with what the field says.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cpo_fast.errors import RecordError
from cpo_fast.types import ImageRef

Message = Mapping[str, Any]

IMAGE_TAG = "<image>"
_IMAGE = {"type": "image"}
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}
_DATA_URI = re.compile(r"data:image/[a-z+.\-]+;base64,")


# --- values --------------------------------------------------------------------------------------


def text_of(value: Any, field: str) -> str:
    """A string that can be written as UTF-8 (JSON may escape half a surrogate pair)."""
    if not isinstance(value, str):
        reason = "missing-field" if value is None else "wrong-type"
        raise RecordError(reason, f"{field} should be text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RecordError("bad-unicode", f"{field} has half a surrogate pair") from None
    return value


def list_of(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        reason = "missing-field" if value is None else "wrong-type"
        raise RecordError(reason, f"{field} should be a list")
    return value


def object_of(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        reason = "missing-field" if value is None else "wrong-type"
        raise RecordError(reason, f"{field} should be an object")
    return value


def _base64(text: str, field: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RecordError("image-unreadable", f"{field} is not base64") from None


def image_ref(value: Any, root: str, field: str = "images") -> ImageRef:
    """A path, a data URI, or {"bytes", "path"} as `datasets` and ms-swift write images."""
    data: Any = None
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path") or ""
    else:
        path = value
    path = text_of(path, field)
    if isinstance(data, str):
        data = _base64(data, field)
    elif data is None and (uri := _DATA_URI.match(path)):
        data, path = _base64(path[uri.end() :], field), ""
    if data is not None and not isinstance(data, bytes):
        raise RecordError("wrong-type", f"{field} should hold paths or bytes")
    if data is None and not path:
        raise RecordError("image-missing", f"{field} has an entry without path and bytes")
    return ImageRef(path, root, data)


def image_refs(value: Any, root: str, field: str = "images") -> tuple[ImageRef, ...]:
    """The images of a field that holds none, one or a list."""
    if value is None or value == "":
        return ()
    listed = value if isinstance(value, list) else [value]
    return tuple(image_ref(entry, root, field) for entry in listed)


# --- messages ------------------------------------------------------------------------------------


def _part(part: Any, field: str) -> dict[str, Any]:
    kind = object_of(part, field).get("type")
    if kind == "text":
        return {"type": "text", "text": text_of(part.get("text"), field)}
    if kind == "image":
        return dict(_IMAGE)
    raise RecordError("unknown-content", f"{field} has a part that is neither text nor image")


def message_of(
    value: Any, field: str, role_key: str = "role", text_key: str = "content"
) -> Message:
    message = object_of(value, field)
    role = _ROLES.get(text_of(message.get(role_key), field))
    if role is None:
        raise RecordError("unknown-role", f"{field} has a {role_key} that is not known")
    content = message.get(text_key)
    if isinstance(content, list):
        return {"role": role, "content": [_part(part, field) for part in content]}
    return {"role": role, "content": text_of(content, field)}


def messages(value: Any, field: str) -> list[Message]:
    """A conversation; plain text is what a user says."""
    if isinstance(value, str):
        return [{"role": "user", "content": text_of(value, field)}]
    return [message_of(entry, field) for entry in list_of(value, field)]


def response(value: Any, field: str) -> str:
    """An answer: text, a message, or a list of exactly one message of the assistant."""
    if isinstance(value, list):
        if len(value) != 1:
            raise RecordError("not-one-answer", f"{field} has {len(value)} messages, not one")
        value = value[0]
    if isinstance(value, dict):
        message = message_of(value, field)
        if message["role"] != "assistant":
            raise RecordError("unknown-role", f"{field} is not said by the assistant")
        value = message["content"]
        if isinstance(value, list):
            if any(part["type"] != "text" for part in value):
                raise RecordError("image-in-response", f"{field} holds an image")
            value = "".join(part["text"] for part in value)
    if not text_of(value, field).strip():
        raise RecordError("empty-response", f"{field} is empty")
    return str(value)


def placeholders(prompt: Sequence[Message]) -> int:
    parts = (part for m in prompt if isinstance(m["content"], list) for part in m["content"])
    return sum(part["type"] == "image" for part in parts)


def _before_first_user(prompt: list[Message], count: int) -> list[Message]:
    """`count` image placeholders put in front of what the first user says."""
    for place, message in enumerate(prompt):
        if message["role"] == "user":
            said = message["content"]
            parts = said if isinstance(said, list) else [{"type": "text", "text": said}]
            first = {**message, "content": [dict(_IMAGE) for _ in range(count)] + parts}
            return [*prompt[:place], first, *prompt[place + 1 :]]
    raise RecordError("no-user-message", "the images have no message of a user to stand in")


def tags_to_parts(prompt: list[Message]) -> list[Message]:
    """`<image>` tags inside text become placeholders, the text around them stays."""
    done = []
    for message in prompt:
        said = message["content"]
        if isinstance(said, str) and IMAGE_TAG in said:
            parts: list[dict[str, Any]] = []
            for place, text in enumerate(said.split(IMAGE_TAG)):
                parts += [dict(_IMAGE)] if place else []
                parts += [{"type": "text", "text": text}] if text else []
            message = {**message, "content": parts}
        done.append(message)
    return done


def with_images(prompt: list[Message], images: int, *, insert: bool) -> tuple[Message, ...]:
    """The prompt with one placeholder per image; `insert` adds those that are lacking at its
    start."""
    if not prompt:
        raise RecordError("empty-prompt", "there is no message before the answer")
    there = placeholders(prompt)
    if there < images and insert:
        prompt = _before_first_user(prompt, images - there)
    elif there != images:
        raise RecordError("image-placeholder-mismatch", f"{there} placeholders, {images} images")
    return tuple(prompt)

"""Shared by all preference formats: checked values, images, messages.

Each function takes a value and the name of its field, and raises RecordError with a constant reason
and that name, never with the value.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cpo_fast.counting import counted
from cpo_fast.errors import RecordError
from cpo_fast.types import Answer, ImageRef

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
_MEDIA_TAGS = ("<video>", "<audio>", "<|video_pad|>", "<|audio_pad|>", "<|AUDIO|>")
_MEDIA_PARTS = (
    "video", "video_url", "audio", "audio_url", "input_audio", "image_url", "input_image", "file"
)  # fmt: skip
_DATA_URI = re.compile(r"data:image/[a-z+.\-]+;base64,")


# --- values --------------------------------------------------------------------------------------


def text_of(value: Any, field: str) -> str:
    """A string that can be encoded as UTF-8 (JSON can contain a lone surrogate)."""
    if not isinstance(value, str):
        reason = "missing-field" if value is None else "wrong-type"
        raise RecordError(reason, f"{field} should be text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RecordError("bad-unicode", f"{field} has a lone surrogate") from None
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
    """The images of a field with no image, one, or a list."""
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
    if kind in _MEDIA_PARTS:
        raise RecordError(
            "unsupported-medium",
            f"{field} has a part of type {kind}: text and image parts are read, the images "
            "themselves from the field images",
        )
    raise RecordError("unknown-content", f"{field} has a part that is neither text nor image")


def refuse_other_media(text: str) -> None:
    """RecordError for a text with a placeholder of a video or a sound."""
    for tag in _MEDIA_TAGS:
        if tag in text:
            raise RecordError("unsupported-medium", f"{tag}: only images and text are read")


_NOT_OPTIONS = frozenset(
    {"chat_template", "conversation", "conversations", "messages", "documents", "tools", "self"}
    | {"tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "padding"}
    | {"return_tensors", "return_assistant_tokens_mask", "truncation", "max_length"}
    | {"tokenizer_kwargs"}
)
"""Arguments of `apply_chat_template` that a file cannot set."""

_EXTRAS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
"""Fields of a message that a chat template can render besides role and content."""


def read_message(
    value: Any, field: str, role_key: str = "role", text_key: str = "content"
) -> Message:
    message = object_of(value, field)
    role = _ROLES.get(text_of(message.get(role_key), field))
    if role is None:
        raise RecordError("unknown-role", f"{field} has an unknown {role_key}")
    content = message.get(text_key)
    extras = {name: message[name] for name in _EXTRAS if message.get(name) is not None}
    if content is None and extras.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = [_part(part, field) for part in content]
    else:
        content = text_of(content, field)
    return {"role": role, "content": content, **drop_nulls(extras, field)}


def drop_nulls(value: Any, field: str) -> Any:
    """A JSON value without the nulls that Parquet adds for missing fields."""
    if isinstance(value, dict):
        return {key: drop_nulls(one, field) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [drop_nulls(one, field) for one in value]
    return text_of(value, field) if isinstance(value, str) else value


def read_messages(value: Any, field: str) -> list[Message]:
    """A conversation; plain text is a user message."""
    if isinstance(value, str):
        return [{"role": "user", "content": text_of(value, field)}]
    if not isinstance(value, list):
        reason = "missing-field" if value is None else "wrong-type"
        raise RecordError(reason, f"{field} should be text or a list of messages")
    return [read_message(entry, field) for entry in value]


def read_answer(value: Any, field: str) -> Answer:
    """An answer: text, an assistant message, or a list of messages.

    A single message with no other fields is returned as text, other messages as a tuple.
    """
    given = [{"role": "assistant", "content": value}] if isinstance(value, str) else value
    given = given if isinstance(given, list) else [given]
    if not all(isinstance(turn, dict) for turn in given):
        if value is None:
            raise RecordError("missing-field", f"{field} is missing or null")
        raise RecordError("wrong-type", f"{field} should be text, a message or a list of messages")
    turns = [read_message(turn, field) for turn in given]
    refuse_unlearned(given, field)
    if not turns:
        raise RecordError("empty-response", f"{field} has no message")
    if any(part["type"] != "text" for turn in turns for part in parts_of(turn)):
        raise RecordError("image-in-response", f"{field} holds an image")
    alone = len(turns) == 1
    if alone and turns[0]["role"] != "assistant":
        raise RecordError("unknown-role", f"{field} is not an assistant message")
    if not any(message_text(turn).strip() or turn.get("tool_calls") for turn in turns):
        raise RecordError("empty-response", f"{field} is empty")
    simple = alone and turns[0].keys() == {"role", "content"}
    return message_text(turns[0]) if simple else tuple(turns)


def add_system(row: Mapping[str, Any], turns: Sequence[Message]) -> list[Message]:
    """The conversation after the system message of the row's field `system`, if any."""
    said = row.get("system")
    if said is None or not text_of(said, "system").strip():
        return list(turns)
    if turns and turns[0]["role"] == "system":
        if not contains_text(turns[:1], said):
            raise RecordError("unclear-question", "system differs from the first message")
        return list(turns)
    return [{"role": "system", "content": said}, *turns]


def contains_text(turns: Sequence[Message], text: str) -> bool:
    """Whether the messages contain a text, ignoring white space."""
    return "".join(text.split()) in "".join("".join(map(message_text, turns)).split())


def refuse_unlearned(turns: Sequence[Mapping[str, Any]], field: str) -> None:
    """RecordError for an answer with `loss: false` (ms-swift) or `weight: 0` (OpenAI)."""
    if any(turn.get("loss") is False or turn.get("weight") == 0 for turn in turns):
        raise RecordError("answer-marked-bad", f"{field} has a message marked as not to be learned")


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the chat template in a row of trl: tools and named options."""
    given: dict[str, Any] = {}
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools else None
        except (ValueError, RecursionError):
            raise RecordError("wrong-type", "tools is not JSON") from None
    if tools is not None:
        given["tools"] = drop_nulls(list_of(tools, "tools"), "tools")
    options = row.get("chat_template_kwargs")
    if options is not None:
        options = drop_nulls(object_of(options, "chat_template_kwargs"), "chat_template_kwargs")
        if taken := _NOT_OPTIONS & options.keys():
            raise RecordError(
                "bad-template-option",
                f"chat_template_kwargs cannot set {', '.join(sorted(taken))}",
            )
        given.update(options)
    return given


def parts_of(message: Message) -> list[Mapping[str, Any]]:
    """The parts of a message's content."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def message_text(message: Message) -> str:
    """The text of a message, without its image placeholders."""
    return "".join(part["text"] for part in parts_of(message) if part["type"] == "text")


def answer_text(answer: Answer) -> str:
    """The whole answer as one text, to count, compare, or train a tokenizer."""
    if isinstance(answer, str):
        return answer
    return "\n".join(
        message_text(turn) + "".join(json.dumps(turn[name]) for name in _EXTRAS if name in turn)
        for turn in answer
    )


def same_answer(one: Answer, other: Answer) -> bool:
    """Whether two answers are equal, ignoring surrounding white space."""
    if isinstance(one, str) and isinstance(other, str):
        return one.strip() == other.strip()
    return one == other


def count_placeholders(prompt: Sequence[Message]) -> int:
    return sum(part["type"] == "image" for message in prompt for part in parts_of(message))


def _insert_placeholders(prompt: list[Message], count: int) -> list[Message]:
    """The prompt with `count` image placeholders at the start of its first user message."""
    for place, message in enumerate(prompt):
        if message["role"] == "user":
            first = {**message, "content": [dict(_IMAGE)] * count + [*parts_of(message)]}
            return [*prompt[:place], first, *prompt[place + 1 :]]
    raise RecordError("no-user-message", "there is no user message to put the images in")


def split_tags(prompt: list[Message]) -> list[Message]:
    """Replace `<image>` tags in text by placeholders and keep the text around them."""
    done = []
    for message in prompt:
        content = message["content"]
        if isinstance(content, str) and IMAGE_TAG in content:
            parts: list[dict[str, Any]] = []
            for place, text in enumerate(content.split(IMAGE_TAG)):
                parts += [dict(_IMAGE)] if place else []
                parts += [{"type": "text", "text": text}] if text else []
            message = {**message, "content": parts}
        done.append(message)
    return done


def add_images(prompt: list[Message], images: int, *, insert: bool) -> tuple[Message, ...]:
    """The prompt with one placeholder per image; `insert` adds missing ones at its start."""
    if not prompt:
        raise RecordError("empty-prompt", "there is no message before the answer")
    found = count_placeholders(prompt)
    if found < images and insert:
        prompt = _insert_placeholders(prompt, images - found)
    elif found != images:
        raise RecordError(
            "image-placeholder-mismatch",
            f"{counted(found, 'placeholder')}, {counted(images, 'image')}",
        )
    return tuple(prompt)

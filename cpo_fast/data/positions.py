"""The number of positions that a model supports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def position_limit(config: Any) -> int | None:
    """Maximum sequence length of a model's configuration; None if it has no limit.

    The larger of `max_position_embeddings` of the text part and its length after RoPE scaling
    (linear, dynamic, YaRN, Llama 3: a `factor` on the original length).
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    scaled = [
        part["factor"] * (part.get("original_max_position_embeddings") or limit)
        for part in _parts(rope)
        if part.get("factor")
    ]
    return max([limit, *map(int, scaled)])


def model_positions(folder: str | Path) -> int | None:
    """`position_limit` of the model in `folder`; None if its configuration cannot be read, which
    loading the model reports."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return position_limit(config)


def _parts(rope: Any) -> Iterator[Mapping[str, Any]]:
    """The settings, and the settings of each kind of layer if layers differ."""
    if isinstance(rope, Mapping):
        yield rope
        yield from (part for part in rope.values() if isinstance(part, Mapping))

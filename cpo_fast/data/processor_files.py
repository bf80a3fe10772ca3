"""The image preprocessing settings of a checkpoint, from either of their two files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cpo_fast.data.files import open_regular

PROCESSOR = "processor_config.json"
PREPROCESSOR = "preprocessor_config.json"
LARGEST = 1_000_000
"""Bytes read of such a file."""


def image_processor_settings(folder: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """(file, settings) of the image processor in `folder`, or None if no file has them.

    transformers 5 writes processor_config.json with the settings under "image_processor", earlier
    versions preprocessor_config.json; with both, the former is used, as in transformers. Raises
    OSError or ValueError for an unreadable file.
    """
    whole = _read(Path(folder) / PROCESSOR)
    if whole is not None and isinstance(own := whole.get("image_processor"), dict):
        return Path(folder) / PROCESSOR, own
    alone = _read(Path(folder) / PREPROCESSOR)
    return None if alone is None else (Path(folder) / PREPROCESSOR, alone)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    with open_regular(str(path)) as file:
        found = json.loads(file.read(LARGEST))
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def pixel_bounds(settings: dict[str, Any]) -> tuple[Any, Any]:
    """(min, max) pixels of a resized image, in any spelling; None if not set."""
    size = settings.get("size")
    size = size if isinstance(size, dict) else {}
    return (
        settings.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels"),
        settings.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels"),
    )

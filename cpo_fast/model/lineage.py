"""An adapter's files and its base model; torch is not imported."""

from __future__ import annotations

import json
from pathlib import Path

from cpo_fast.errors import UsageError, first_line

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def base_of_adapter(folder: Path, base_model: str | Path | None = None) -> Path:
    """The folder of the model that the adapter in `folder` was trained on.

    `base_model` if given, else the path in adapter_config.json: absolute, relative to `folder` or
    to the working directory, or a model in the hub's local cache. Nothing is downloaded. Raises
    UsageError for a missing folder, or without an adapter in safetensors.
    """
    file = folder / CONFIG
    if not (folder / WEIGHTS).is_file():
        raise UsageError(f"{folder} has no {WEIGHTS}; pickles are not read")
    try:
        named = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{file} is not readable as JSON: {first_line(error)}") from error
    if base_model is not None:
        if not Path(base_model).is_dir():
            raise UsageError(f"base_model {base_model}: no such model folder")
        return Path(base_model)
    if not named:
        raise UsageError(
            f"{file} names no base model; set base_model_name_or_path in it to the folder of the "
            "adapter's base model"
        )
    for found in (folder / named, Path(named), _cached(named)):
        if found is not None and found.is_dir():
            return found
    raise UsageError(
        f"the base model of the adapter {folder} is not there: {named}. Move it back, set "
        f"base_model_name_or_path in {file} to where it is now, or give the folder "
        "as base_model (of cpo-fast export and evaluate)"
    )


def lineage(folder: Path, base_model: str | Path | None = None) -> list[Path]:
    """`folder` and, for an adapter, the chain of its bases down to a whole model."""
    found = [folder]
    while is_adapter(found[-1]):
        below = base_of_adapter(found[-1], base_model if len(found) == 1 else None)
        if any(below.resolve() == earlier.resolve() for earlier in found):
            raise UsageError(
                f"{found[-1] / CONFIG} names {below}, which is an adapter on top of it"
            )
        found.append(below)
    return found


def _cached(name: str) -> Path | None:
    """The hub's local copy of a model, or None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None

"""A model as a user names it: its tokenizer and image processor, and an adapter merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cpo_fast.data.lengths import has_tokenizer
from cpo_fast.model.adapters import merge
from cpo_fast.model.build import load_model, load_tokenizer, save_model
from cpo_fast.model.images import ImageProcessor
from cpo_fast.model.lineage import CONFIG, WEIGHTS, lineage
from cpo_fast.model.supported import read_config
from cpo_fast.training.digests import file_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ORIGIN = "merged_from.json"
"""In the folder of an adapter that a run has merged: what it was made of."""


def companions(
    folder: Path, *, base_model: str | Path | None = None, **bounds: Any
) -> tuple[PreTrainedTokenizerBase, ImageProcessor | None]:
    """The tokenizer and, for a model that takes images, the image processor of a model or adapter.

    An adapter's own come first, then its base's. `bounds` are those of `ImageProcessor.load`.
    Raises UsageError as the loaders do.
    """
    below = lineage(folder, base_model)[-1]
    own = below if below == folder or not has_tokenizer(folder) else folder
    beside = folder if below != folder else None
    images = ImageProcessor.find(below, read_config(below), beside=beside, **bounds)
    return load_tokenizer(own), images


def merged_adapter(
    adapter: Path, target: Path, *, dtype: torch.dtype, base_model: str | Path | None = None
) -> Path:
    """`target`, holding the adapter merged into its base with tokenizer and image processor.

    The sum is made in float32 and rounded once, to `dtype`. What an earlier call left there is
    taken if it was made of the same adapter and base.
    """
    origin = _origin(adapter, dtype, base_model)
    try:
        if json.loads((target / ORIGIN).read_text(encoding="utf-8")) == origin:
            return target
    except (OSError, ValueError):
        pass
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer, images = companions(adapter, base_model=base_model)
    model: Any = load_model(adapter, dtype=torch.float32, base_model=base_model)
    whole: Any = merge(model)
    try:
        save_model(whole.to(dtype), partial, tokenizer=tokenizer, images=images)
        (partial / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _origin(adapter: Path, dtype: torch.dtype, base_model: str | Path | None) -> dict[str, Any]:
    """What the merged model depends on: the adapter by its bytes, what is below it by its files."""
    _, *below = lineage(adapter, base_model)
    digests = {name: file_digest(adapter / name) for name in (CONFIG, WEIGHTS)}
    files = [file for folder in below for file in sorted(folder.glob("*.safetensors"))]
    weights = {str(f.resolve()): [f.stat().st_size, f.stat().st_mtime_ns] for f in files}
    return {
        "adapter": str(adapter.resolve()),
        "digests": digests,
        "bases": [str(folder.resolve()) for folder in below],
        "weights": weights,
        "dtype": str(dtype),
    }

"""A model as a user names it: from a path to a checkpoint, and an adapter merged into its base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cpo_fast.errors import UsageError
from cpo_fast.model.adapters import CONFIG, WEIGHTS, is_adapter, lineage, merge
from cpo_fast.model.build import has_tokenizer, load_model, load_tokenizer, save_model
from cpo_fast.model.images import ImageProcessor
from cpo_fast.model.supported import read_config
from cpo_fast.training.checkpoint import MANIFEST, checkpoints, damage_of, result_checkpoint
from cpo_fast.training.digests import file_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MERGED = "merged"
"""The folder beside SFT's checkpoints that holds its adapter merged into the base."""

ORIGIN = "merged_from.json"
"""In the folder of an adapter that a run has merged: what it was made of."""

STAGES = ("sft", "cpo")


def find_checkpoint(named: str | Path, flag: str, *, adapter: bool = False) -> Path:
    """The folder of the model or adapter that `named` means.

    That is `named` itself, or, where it is the folder of a stage (`runs/x/sft`), what the stage
    ended with: its merged model (unless an `adapter` is asked for), else its best checkpoint where
    its run asked for the best one, else its last. Raises UsageError, which begins with `flag`, when
    there is no such folder or checkpoint, or it is damaged.
    """
    path = Path(named)
    if not path.is_dir():
        raise UsageError(
            f"{flag} {named}: no such model folder; models are read from folders, and nothing is "
            "downloaded"
        )
    if not _holds_model(path):
        path = _of_stage(path, flag, adapter=adapter)
    if (path / MANIFEST).is_file() and (damage := damage_of(path)):
        raise UsageError(f"{flag} {path} is damaged ({damage}); take another checkpoint")
    return path


def _holds_model(folder: Path) -> bool:
    file = folder / "config.json"
    return is_adapter(folder) or (file.is_file() and not _is_of_run(file))


def _is_of_run(file: Path) -> bool:
    """Whether a config.json holds the flags of a run, not a model's configuration."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "stages" in found and "model_type" not in found


def _is_stage(folder: Path) -> bool:
    return bool(checkpoints(folder)) or _holds_model(folder / MERGED)


def _of_stage(folder: Path, flag: str, *, adapter: bool) -> Path:
    if stages := [str(folder / name) for name in STAGES if _is_stage(folder / name)]:
        raise UsageError(f"{flag} {folder} is the folder of a run: name {' or '.join(stages)}")
    if not _is_stage(folder):
        raise UsageError(
            f"{flag} {folder}: no config.json or {CONFIG} there; name a folder that "
            "save_pretrained or a training stage wrote"
        )
    if _holds_model(folder / MERGED) and not adapter:
        return folder / MERGED
    found = result_checkpoint(folder, best=_wants_best(folder.parent))
    if found is None:
        raise UsageError(f"{flag} {folder}: every checkpoint there is damaged")
    return found


def _wants_best(run: Path) -> bool:
    """Whether the run's stages ended with their best checkpoints."""
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        return bool(config.get("load_best_model_at_end"))
    except (OSError, ValueError, AttributeError):
        return False


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

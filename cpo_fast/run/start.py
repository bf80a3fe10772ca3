"""The model that a run starts from: a folder, or a tiny random model that the run makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from cpo_fast.errors import UsageError
from cpo_fast.folders import write_json
from cpo_fast.model.adapters import check_targets, merge
from cpo_fast.model.build import frozen_modules, save_model, tiny_model, tiny_text_model
from cpo_fast.model.checkpoint import Checkpoint
from cpo_fast.model.images import ImageProcessor
from cpo_fast.model.lineage import CONFIG, WEIGHTS, is_adapter, lineage
from cpo_fast.model.supported import check_model, check_vocabulary, empty_model
from cpo_fast.model.tokenizer import train_tokenizer
from cpo_fast.run.arguments import TrainArguments
from cpo_fast.run.context import RunContext
from cpo_fast.run.corpus import Texts
from cpo_fast.run.find_checkpoint import find_checkpoint
from cpo_fast.run.flag_rules import TINY
from cpo_fast.training.checkpoint import digest_file

START = "start"
"""Folder of a starting model that was merged from an adapter and its base."""

ORIGIN = "merged_from.json"
"""In that folder: digests of the adapter and its base."""


def find_start(args: TrainArguments) -> str | None:
    """The folder of the starting model; None for the tiny one, which the run makes.

    Raises UsageError for a model that the run cannot use, before data and weights are read. A
    checkpoint is hashed as a whole: call it on one rank.
    """
    named, flag = _named_start(args)
    if named == TINY:
        return None
    path = find_checkpoint(named, flag)
    model = empty_model(lineage(path)[-1])
    try:
        check_model(model, attention=args.attn_implementation)
    except UsageError as error:
        raise UsageError(f"{flag} {path}: {error}") from None
    tokenizer = Checkpoint.open(path, **_given_bounds(args)).tokenizer
    check_vocabulary(path, tokenizer, model)
    for stage in args.trained_stages:
        peft, freeze_vit = args.tuning_of(stage)
        if peft:
            frozen = frozen_modules(model, freeze_vit=freeze_vit)
            check_targets(model, lora_targets(args), excluded=frozen)
    return str(path)


def open_start(run: RunContext, texts: Texts, found: str | None) -> Checkpoint:
    """The model that `find_start` found, or a tiny random model in output_dir/base.

    An adapter is merged into its base, in output_dir/start.
    """
    args, folder = run.args, run.folder
    if found is not None:
        path = Path(found)
    else:
        path = folder.path / "base"
        made_new = "sft" in args.stage_names and args.resume_from_checkpoint is None
        if folder.prepares_inputs and (made_new or not (path / "tokenizer.json").is_file()):
            path = folder.scratch_dir / "base"
            write_tiny_model(args, path, texts)
        path = find_checkpoint(path, _named_start(args)[1])
    if is_adapter(path):
        adapter, path = path, folder.path / START
        if folder.prepares_inputs:
            path = merge_adapter(adapter, folder.scratch_dir / START, dtype=run.dtype)
    return Checkpoint.open(path.resolve(), **_given_bounds(args))


def _given_bounds(args: TrainArguments) -> dict[str, Any]:
    return {"min_pixels": args.min_pixels, "max_pixels": args.max_pixels}


def _named_start(args: TrainArguments) -> tuple[str, str]:
    """The starting model as it was named, and the flag."""
    if args.sft_checkpoint is not None:
        return args.sft_checkpoint, "--sft_checkpoint"
    return args.model_name_or_path, "--model_name_or_path"


def lora_targets(args: TrainArguments) -> str | list[str]:
    """`lora_target_modules` as `add_lora` takes it."""
    names = [name.strip() for name in args.lora_target_modules.split(",")]
    return names[0] if names == ["all-linear"] else [name for name in names if name]


def write_tiny_model(args: TrainArguments, path: Path, texts: Texts) -> None:
    """A random model of real classes, its tokenizer trained on the text of the training split."""
    tokenizer = train_tokenizer(texts.training_answers())
    if texts.has_images():
        images = ImageProcessor.create(**_given_bounds(args))
        save_model(tiny_model(tokenizer, seed=args.seed), path, tokenizer=tokenizer, images=images)
    else:
        save_model(tiny_text_model(tokenizer, seed=args.seed), path, tokenizer=tokenizer)


def merge_adapter(adapter: Path, target: Path, *, dtype: torch.dtype) -> Path:
    """`target`, holding the adapter merged into its base with tokenizer and image processor.

    The sum is made in float32 and rounded once, to `dtype`. The result of an earlier call is reused
    if it came from the same adapter and base.
    """
    origin = _origin(adapter, dtype)
    try:
        if json.loads((target / ORIGIN).read_text(encoding="utf-8")) == origin:
            return target
    except (OSError, ValueError):
        pass
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    checkpoint = Checkpoint.open(adapter)
    whole: Any = merge(checkpoint.load(dtype=torch.float32, device=torch.device("cpu")))
    try:
        checkpoint.save(whole.to(dtype), partial)
        write_json(partial / ORIGIN, origin)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _origin(adapter: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The inputs of the merged model: digests of the adapter, size and time of its base."""
    _, *below = lineage(adapter)
    digests = {name: digest_file(adapter / name) for name in (CONFIG, WEIGHTS)}
    files = [file for folder in below for file in sorted(folder.glob("*.safetensors"))]
    weights = {str(f.resolve()): [f.stat().st_size, f.stat().st_mtime_ns] for f in files}
    return {
        "adapter": str(adapter.resolve()),
        "digests": digests,
        "bases": [str(folder.resolve()) for folder in below],
        "weights": weights,
        "dtype": str(dtype),
    }

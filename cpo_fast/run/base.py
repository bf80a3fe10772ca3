"""The model that a stage starts from: a folder, or a tiny random one made for the occasion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cpo_fast.data.preference_values import words
from cpo_fast.errors import UsageError
from cpo_fast.model.adapters import check_targets
from cpo_fast.model.build import frozen_modules, save_model, tiny_model, tiny_text_model
from cpo_fast.model.images import ImageProcessor
from cpo_fast.model.lineage import is_adapter, lineage
from cpo_fast.model.supported import check_model, check_vocabulary, empty_model
from cpo_fast.model.tokenizer import train_tokenizer
from cpo_fast.run.arguments import TrainArguments
from cpo_fast.run.corpus import Texts
from cpo_fast.run.find_checkpoint import find_checkpoint
from cpo_fast.run.flag_rules import TINY
from cpo_fast.run.named_model import companions, merged_adapter
from cpo_fast.run.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


START = "start"
"""The folder of a starting model that was merged of an adapter and its base."""


@dataclass(frozen=True)
class Base:
    """Where a model lies, with its tokenizer and, if it can see, its image processor."""

    path: Path
    tokenizer: PreTrainedTokenizerBase
    images: ImageProcessor | None

    @property
    def pixels(self) -> Callable[..., Any] | None:
        return self.images.pixels if self.images else None


def check_start(args: TrainArguments) -> None:
    """UsageError for a starting model that the run could not use, before any data is read.

    Nothing of its weights is read. The tiny model is the run's own and needs no check.
    """
    named, flag = _start(args)
    if named == TINY:
        return
    path = find_checkpoint(named, flag)
    model = empty_model(lineage(path)[-1])
    try:
        check_model(model, attention=args.attn_implementation)
    except UsageError as error:
        raise UsageError(f"{flag} {path}: {error}") from None
    tokenizer, _ = companions(path, min_pixels=args.min_pixels, max_pixels=args.max_pixels)
    check_vocabulary(path, tokenizer, model)
    for prefix in ("sft_", ""):
        if (prefix.rstrip("_") or "cpo") in args.stage_names and getattr(args, f"{prefix}use_peft"):
            frozen = frozen_modules(model, freeze_vit=getattr(args, f"{prefix}freeze_vit"))
            check_targets(model, lora_targets(args), excluded=frozen)


def base_model(args: TrainArguments, folder: RunFolder, texts: Texts) -> Base:
    """`--sft_checkpoint`, `--model_name_or_path`, or a tiny random model in output_dir/base.

    An adapter is merged into its base, in output_dir/start.
    """
    named, flag = _start(args)
    if named == TINY:
        path = folder.path / "base"
        made_new = "sft" in args.stage_names and args.resume_from_checkpoint is None
        if folder.makes and (made_new or not (path / "tokenizer.json").is_file()):
            path = folder.made / "base"
            write_tiny_model(args, path, texts)
    path = find_checkpoint(path if named == TINY else named, flag)
    if is_adapter(path):
        adapter, path = path, folder.path / START
        if folder.makes:
            dtype = torch.bfloat16 if args.bf16 else torch.float32
            path = merged_adapter(adapter, folder.made / START, dtype=dtype)
    found = companions(path, min_pixels=args.min_pixels, max_pixels=args.max_pixels)
    return Base(path.resolve(), *found)


def _start(args: TrainArguments) -> tuple[str, str]:
    """The starting model as it was named, and the flag."""
    if args.sft_checkpoint is not None:
        return args.sft_checkpoint, "--sft_checkpoint"
    return args.model_name_or_path, "--model_name_or_path"


def lora_targets(args: TrainArguments) -> str | list[str]:
    """`--lora_target_modules` as `add_lora` takes it."""
    names = [name.strip() for name in args.lora_target_modules.split(",")]
    return names[0] if names == ["all-linear"] else [name for name in names if name]


def write_tiny_model(args: TrainArguments, path: Path, texts: Texts) -> None:
    """A random model of real classes, its tokenizer trained on the text of the training split."""
    said = [
        words(answer)
        for one in (*texts.sft["train"], *texts.cpo["train"])
        for answer in (one.chosen, *one.rejected)
    ]
    tokenizer = train_tokenizer(said)
    if texts.has_images():
        images = ImageProcessor.create(min_pixels=args.min_pixels, max_pixels=args.max_pixels)
        save_model(tiny_model(tokenizer, seed=args.seed), path, tokenizer=tokenizer, images=images)
    else:
        save_model(tiny_text_model(tokenizer, seed=args.seed), path, tokenizer=tokenizer)

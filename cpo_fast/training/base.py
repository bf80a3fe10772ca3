"""The model that a stage starts from: a folder, or a tiny random one made for the occasion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpo_fast.data.preference_values import words
from cpo_fast.errors import UsageError
from cpo_fast.model.build import load_tokenizer, save_model, tiny_model, tiny_text_model
from cpo_fast.model.images import ImageProcessor
from cpo_fast.model.tokenizer import train_tokenizer
from cpo_fast.training.arguments import TrainArguments
from cpo_fast.training.corpus import Texts
from cpo_fast.training.flag_rules import TINY
from cpo_fast.training.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Base:
    """Where a model lies, with its tokenizer and, if it can see, its image processor."""

    path: Path
    tokenizer: PreTrainedTokenizerBase
    images: ImageProcessor | None

    @property
    def pixels(self) -> Callable[..., Any] | None:
        return self.images.pixels if self.images else None


def base_model(args: TrainArguments, folder: RunFolder, texts: Texts) -> Base:
    """`--sft_checkpoint`, `--model_name_or_path`, or a tiny random model in output_dir/base."""
    path = Path(args.sft_checkpoint or args.model_name_or_path)
    if str(path) == TINY:
        path = folder.path / "base"
        made_new = "sft" in args.stage_names and args.resume_from_checkpoint is None
        if folder.makes and (made_new or not (path / "tokenizer.json").is_file()):
            path = folder.made / "base"
            write_tiny_model(args, path, texts)
    if not path.is_dir():
        raise UsageError(f"{path}: no such model folder (--model_name_or_path)")
    sees = (path / "preprocessor_config.json").is_file()
    bounds = {"min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
    images = ImageProcessor.load(path, **bounds) if sees else None
    return Base(path.resolve(), load_tokenizer(path), images)


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

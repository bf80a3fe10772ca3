"""Token lengths of a data set under a tokenizer, before training."""

from __future__ import annotations

import json
import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpo_fast.data.files import open_regular
from cpo_fast.data.images import image_size
from cpo_fast.data.labels import diagnosis, question, thought
from cpo_fast.data.patients import patients_of
from cpo_fast.data.pixels import MAX_PIXELS, MIN_PIXELS, visual_tokens
from cpo_fast.data.processor_files import image_processor_settings, pixel_bounds
from cpo_fast.data.tokens import no_image_support, token_ids
from cpo_fast.errors import RecordError, UsageError, first_line
from cpo_fast.types import ImageRef, Preference, Study

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUANTILES = {"min": 0.0, "p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


def quantiles(values: array[int]) -> dict[str, int]:
    """Quantiles of `values` by rank (the smallest value >= a share q of them); {} without
    values."""
    ranked = sorted(values)
    if not ranked:
        return {}
    places = {name: math.ceil(q * len(ranked) - 1e-9) for name, q in _QUANTILES.items()}
    return {name: ranked[max(place, 1) - 1] for name, place in places.items()}


def _read_pixel_bounds(folder: str) -> tuple[int, int]:
    """The bounds of the image processor in `folder`, else Qwen2.5-VL's."""
    try:
        found = image_processor_settings(folder)
        low, high = pixel_bounds(found[1]) if found else (None, None)
        return int(low or MIN_PIXELS), int(high or MAX_PIXELS)
    except (OSError, ValueError, TypeError):
        return MIN_PIXELS, MAX_PIXELS


def _takes_images(folder: str) -> bool:
    """Whether the model in a folder takes images; True for a folder with only a tokenizer."""
    try:
        with open_regular(str(Path(folder) / "config.json")) as file:
            return "vision_config" in json.loads(file.read(1_000_000))
    except (OSError, ValueError, TypeError):
        return True


def has_tokenizer(folder: Path) -> bool:
    names = ("tokenizer.json", "vocab.json", "tokenizer.model")
    return any((folder / name).is_file() for name in names)


def load_tokenizer(path: str | Path, *, local: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, with or without a chat template (plain text needs none).

    `path` is a folder or, unless `local`, a hub name. No remote code runs. Raises UsageError.
    """
    remedy = "give the folder of a model or of its tokenizer"
    # transformers would create an empty tokenizer from config.json alone.
    if (local or Path(path).is_dir()) and not has_tokenizer(Path(path)):
        raise UsageError(f"no tokenizer in {path}; {remedy}")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(path), local_files_only=local, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"no tokenizer in {path}: {first_line(error)}; {remedy}") from error


def as_preference(record: Study | Preference, max_images: int) -> Preference:
    """The record as a preference; a study as its SFT sample, with up to `max_images` images."""
    if isinstance(record, Preference):
        return record
    images = record.images[:max_images]
    answer = thought(record.report.text, diagnosis(record.labels))
    patients = patients_of({"patient_id": record.patient_id}, images)
    return Preference(
        record.study_id, question(len(images)), answer, images=images, patients=patients
    )


@dataclass
class Lengths:
    """Counts the tokens of records; `facts` is the part of summary.json.

    An image counts its visual tokens. The length of a sample is its prompt and its longest answer.
    A record with an unreadable image is omitted.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = None
    max_images: int = 1
    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS
    sees: bool = True
    tokens: dict[str, array[int]] = field(
        default_factory=lambda: {
            name: array("L") for name in ("prompt", "chosen", "rejected", "whole")
        }
    )
    over: int = 0

    @classmethod
    def of_model(
        cls, folder: str, *, max_length: int | None = None, max_images: int = 1
    ) -> Lengths:
        """Tokenizer and image bounds of a model's folder. Raises UsageError."""
        low, high = _read_pixel_bounds(folder)
        tokenizer = load_tokenizer(folder, local=True)
        return cls(tokenizer, max_length, max_images, low, high, _takes_images(folder))

    def _images(self, images: tuple[ImageRef, ...]) -> int:
        bounds = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        return sum(visual_tokens(*image_size(ref), **bounds) - 1 for ref in images)

    def add(self, record: Study | Preference) -> None:
        """Count one record. Raises RecordError as `token_ids`."""
        one = as_preference(record, self.max_images)
        if one.images and not self.sees:
            raise no_image_support()
        ids = token_ids(one, self.tokenizer)
        try:
            prompt = len(ids.prompt) + self._images(one.images)
            own = [
                prompt
                if own_ids is None and images is None
                else len(own_ids or ids.prompt)
                + self._images(one.images if images is None else images)
                for own_ids, images in zip(
                    ids.rejected_prompts,
                    one.rejected_images or (None,) * len(one.rejected),
                    strict=True,
                )
            ]
        except RecordError:
            return
        whole = max(
            prompt + len(ids.chosen),
            *(start + len(answer) for start, answer in zip(own, ids.rejected, strict=True)),
            0,
        )
        self.tokens["prompt"].append(prompt)
        self.tokens["chosen"].append(len(ids.chosen))
        self.tokens["rejected"].extend(map(len, ids.rejected))
        self.tokens["whole"].append(whole)
        self.over += self.max_length is not None and whole > self.max_length

    def facts(self) -> dict[str, Any]:
        counted = len(self.tokens["whole"])
        found: dict[str, Any] = {
            "tokens": {name: quantiles(values) for name, values in self.tokens.items() if values}
        }
        if self.max_length is not None:
            found["over_max_length"] = {
                "max_length": self.max_length,
                "records": self.over,
                "share": round(self.over / counted, 6) if counted else 0.0,
            }
        return found

"""Decode the images of a pack; groups with a failed image are separated from the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from cpo_fast.data.images import add_path
from cpo_fast.data.pixels import MERGE
from cpo_fast.errors import RecordError
from cpo_fast.packing.plan import Pack
from cpo_fast.types import ImageRef, Pixels, PreferenceGroup, Prompt

Decoded = dict[ImageRef, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class DecodedPack:
    """The parts of a pack with decoded images, these images, and the omitted groups."""

    pack: Pack
    decoded: Decoded
    failed: tuple[tuple[int, RecordError], ...]  # (index of the group, error)


def readable(
    groups: Sequence[PreferenceGroup],
    pack: Pack,
    pixels: Pixels | None,
    image_token_id: int | None = None,
) -> DecodedPack:
    """Decode the images of `pack`, each once. An image fails with a RecordError of `pixels`, or
    with "image-changed" if its number of tokens differs from the prompt's.
    """
    decoded: Decoded = {}
    usable, failed = [], []
    for index, which in pack:
        group = groups[index]
        try:
            decode_images(group.prompts, pixels, decoded, image_token_id)
            usable.append((index, which))
        except RecordError as error:
            failed.append((index, error))
    return DecodedPack(tuple(usable), decoded, tuple(failed))


def decode_images(
    prompts: Iterable[Prompt],
    pixels: Pixels | None,
    decoded: Decoded,
    image_token_id: int | None = None,
) -> None:
    """Add the images of `prompts` to `decoded`. Raises RecordError as `readable`, with the image's
    path in its detail.
    """
    if pixels is None:
        return
    for prompt in prompts:
        for image in prompt.images:
            if image not in decoded:
                try:
                    decoded[image] = pixels(image)
                except RecordError as error:
                    raise add_path(image, error) from None
        if prompt.images and image_token_id is not None:
            grids = [decoded[image][1] for image in prompt.images]
            tokens = sum(int(grid.prod()) // MERGE**2 for grid in grids)
            if prompt.input_ids.count(image_token_id) != tokens:
                detail = "the size has changed since the prompt was made"
                raise add_path(prompt.images[0], RecordError("image-changed", detail))

"""Digests of data and models, for the cache of reference log-probs and for resumed runs."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from cpo_fast.training.checkpoint import digest_file
from cpo_fast.types import ImageRef, PreferenceGroup, Prompt

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc has it from Python 3.12 on

    from cpo_fast.model.checkpoint import Checkpoint
    from cpo_fast.model.packed import PackedModel

IMAGE_HEAD = 65536  # bytes of an image file that are hashed, besides its size
# Configuration keys that do not change what the model computes.
INCIDENTAL = {
    *("transformers_version", "use_cache", "dtype", "torch_dtype", "architectures"),
    *("base_model_name_or_path", "peft_version"),  # of an adapter
}


def digest(pieces: Iterable[Buffer]) -> str:
    """SHA-256 of the concatenated pieces."""
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def data_bytes(groups: Sequence[PreferenceGroup]) -> Iterator[bytes]:
    images = {image: image_bytes(image) for image in list_images(groups)}
    for group in groups:
        yield from group_bytes(group, images)


def list_images(groups: Sequence[PreferenceGroup]) -> list[ImageRef]:
    """Every image once, in the order of the groups."""
    prompts = (prompt for group in groups for prompt in group.prompts)
    return list(dict.fromkeys(image for prompt in prompts for image in prompt.images))


def group_bytes(group: PreferenceGroup, images: Mapping[ImageRef, bytes]) -> Iterator[bytes]:
    """Tokens of prompts and answers, and `images[image]` for each image."""

    def prompt_bytes(prompt: Prompt) -> Iterator[bytes]:
        yield token_bytes(prompt.input_ids)
        for image in prompt.images:
            yield images[image]

    yield f"group {len(group.rejected)}\n".encode()
    yield from prompt_bytes(group.prompt)
    yield token_bytes(group.chosen)
    for k, rejected in enumerate(group.rejected):
        own = group.rejected_prompts[k] if group.rejected_prompts else None
        if own is not None:
            yield b"own prompt\n"
            yield from prompt_bytes(own)
        yield token_bytes(rejected)


def token_bytes(ids: Sequence[int]) -> bytes:
    return f"{len(ids)} tokens\n".encode() + array("q", ids).tobytes()


def image_bytes(image: ImageRef, head_bytes: int = IMAGE_HEAD) -> bytes:
    """A digest of the path, the size and the first bytes of an image file."""
    if image.data is not None:
        return hashlib.sha256(image.data).digest()
    try:
        with (Path(image.root) / image.path).open("rb") as file:
            head = file.read(head_bytes)
            size = file.seek(0, os.SEEK_END)
    except OSError:  # the feed rejects it as missing
        head, size = b"", -1
    return hashlib.sha256(f"{image.path}\n{size}\n".encode() + head).digest()


def model_bytes(model: PackedModel, adapters_off: bool) -> Iterator[Buffer]:
    """Configuration and weights, under their names without peft."""
    whole: Any = model.model
    yield json_bytes(drop_incidental(whole.config.to_dict()))
    named = [(n, p) for n, p in whole.named_parameters() if not (adapters_off and "lora_" in n)]
    for name, parameter in tqdm(named, desc="hash weights", unit="tensor", disable=None):
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        yield f"{plain} {parameter.dtype} {list(parameter.shape)}\n".encode()
        flat = parameter.detach().cpu().contiguous().flatten()
        yield memoryview(flat.view(torch.uint8).numpy())


def processor_settings(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The settings of the image processor; None for a model without images."""
    return checkpoint.images.processor.to_dict() if checkpoint.images else None


def drop_incidental(config: Any) -> Any:
    if isinstance(config, dict):
        return {
            name: drop_incidental(value)
            for name, value in config.items()
            if not str(name).startswith("_") and name not in INCIDENTAL
        }
    return config


def digest_models(folders: Sequence[Path]) -> str:
    """Digest of the weight and configuration files of the models in these folders.

    The weights are read whole, several files at a time; a stage reads them anyway.
    """
    weights = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    with ThreadPoolExecutor(4) as pool:  # hashing releases the GIL
        sums = list(pool.map(digest_file, weights))
    found: list[Any] = [[path.name, total] for path, total in zip(weights, sums, strict=True)]
    for folder in folders:
        for name in ("config.json", "adapter_config.json"):
            path = folder / name
            if path.is_file():
                found.append([name, drop_incidental(json.loads(path.read_text(encoding="utf-8")))])
    return digest([json_bytes(found)])

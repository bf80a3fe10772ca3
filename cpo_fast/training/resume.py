"""What a stage was begun with, and whether a run that is resumed still has it.

trainer_state.json of every checkpoint holds it under "begun_with": digests of the samples in their
order, of the starting model, the tokenizer and the image processor, and the flags.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpo_fast.errors import UsageError
from cpo_fast.training.arguments import TrainArguments
from cpo_fast.training.checkpoint import read_state
from cpo_fast.training.digests import (
    IMAGE_HEAD,
    digest,
    files_digest,
    group_bytes,
    image_bytes,
    images_of,
    json_bytes,
)
from cpo_fast.training.distributed import World
from cpo_fast.types import PreferenceGroup

if TYPE_CHECKING:
    from cpo_fast.training.base import Base

BEGUN_WITH = "begun_with"
MANY_IMAGES = 10_000  # of more images, so many are opened, the others count by path and size
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
DATA_FLAGS = (
    "dataset",
    "dataset_format",
    "image_root",
    "concept_graph",
    "counterfactuals",
    "model_name_or_path",
    "sft_checkpoint",
)
"""Flags that name data or a model: with --allow_changed_data they may change as what they name."""
MAY_CHANGE = (
    *BATCH,
    *(f"sft_{name}" for name in BATCH),
    "resume_from_checkpoint",
    "allow_changed_data",
    "report_to",
    "dry_run",
    "ddp_timeout",
    "fsdp",
    "overwrite_output_dir",
    "output_dir",
    "stages",
    "max_minutes",
    "preset",
    "save_steps",
    "save_total_limit",
    "dataloader_num_workers",
    "eval_batch_size",
    "num_examples",
    "print_example",
)
"""Flags that do not change what a resumed run computes (of the batch only the product counts)."""


def check_flags(place: Path, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """UsageError naming the flags of a resumed run that are not those of the run that was begun.

    Both have the values of config.json; a flag that the earlier version did not have counts with
    its default.
    """
    defaults = {f.name: f.default for f in fields(TrainArguments)}
    allowed = (*MAY_CHANGE, *(DATA_FLAGS if now["allow_changed_data"] else ()))
    changed = [
        name
        for name, default in defaults.items()
        if name not in allowed and now[name] != earlier.get(name, default)
    ]
    advice = "resume with the same flags, or start again in another --output_dir"
    if changed and set(changed) <= set(DATA_FLAGS):
        advice += ", or go on with other data by --allow_changed_data true"
    for prefix in ("sft_", ""):
        before, after = (
            math.prod(flags.get(prefix + name, 0) for name in BATCH) * flags.get("world_size", 1)
            for flags in (earlier, now)
        )
        if before != after:
            changed.append(
                f"{prefix}{BATCH[0]} x {prefix}{BATCH[1]} x processes ({before}, now {after})"
            )
    if changed:
        raise UsageError(f"{place} was written with other values of {', '.join(changed)}: {advice}")


def checked_start(
    stage: str,
    flags: Mapping[str, Any],
    base: Base,
    model: Sequence[Path],
    train: Sequence[PreferenceGroup],
    held_out: Sequence[PreferenceGroup],
    resume: Path | None,
    world: World,
) -> dict[str, Any]:
    """What the stage begins with, for its checkpoints; rank 0 finds out and compares.

    `model` are the folders that the starting model is made of, `flags` those of config.json. Raises
    UsageError when the checkpoint `resume` was begun with something else, unless
    `allow_changed_data` is among the flags: then what differs is said, and kept under "changes".
    """

    def find() -> dict[str, Any]:
        now = {
            "training data": data_facts(train),
            "held-out data": data_facts(held_out),
            "starting model": {"path": str(model[0]), "digest": files_digest(model)},
            "tokenizer": {"digest": _tokenizer_digest(base)},
            "image processor": {"digest": _processor_digest(base)},
            "flags": dict(flags),
            "changes": [],
        }
        if resume is None:
            return now
        then = read_state(resume).get(BEGUN_WITH)
        if then is None:
            print(
                f"{stage}: {resume} was written by an earlier version: whether data, starting "
                "model and tokenizer are those that it was begun with cannot be checked"
            )
            return now
        check_flags(resume, then["flags"], flags)
        changes = differences(then, now)
        if changes and not flags["allow_changed_data"]:
            raise UsageError(
                f"{resume} was begun with something else than this run has: {'; '.join(changes)}. "
                "Resume with what it was begun with, start again in another --output_dir, or go on "
                "all the same by --allow_changed_data true"
            )
        if changes:
            print(f"{stage}: goes on from {resume.name} with changes: {'; '.join(changes)}")
        return now | {"changes": [*then["changes"], *changes]}

    return world.on_main(find)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two stages' beginnings, in words."""
    found = []
    for name in ("training data", "held-out data"):
        before, after = then[name], now[name]
        if before["digest"] == after["digest"]:
            continue
        counts = f"{before['samples']} samples then, {after['samples']} now"
        if before["in_any_order"] == after["in_any_order"]:
            found.append(f"{name}: the same {after['samples']} samples in another order")
        elif before["samples"] == after["samples"]:
            found.append(f"{name}: {counts}, with other content")
        else:
            found.append(f"{name}: {counts}")
    if then["starting model"]["digest"] != now["starting model"]["digest"]:
        paths = [one["starting model"]["path"] for one in (then, now)]
        where = paths[0] if paths[0] == paths[1] else f"{paths[0]} then, {paths[1]} now"
        found.append(f"starting model: other weights or configuration ({where})")
    for name in ("tokenizer", "image processor"):
        if then[name]["digest"] != now[name]["digest"]:
            found.append(f"{name}: other files")
    return found


def data_facts(groups: Sequence[PreferenceGroup]) -> dict[str, Any]:
    """How many samples there are, and digests of them in their order and in any order.

    An image counts by its path and its size, up to `MANY_IMAGES` of them, evenly spread, by their
    first bytes, too (opening 200,000 radiographs takes longer than starting a run should).
    """
    shown = images_of(groups)
    stride = -(-len(shown) // MANY_IMAGES) or 1
    images = {
        image: image_bytes(image, IMAGE_HEAD if index % stride == 0 else 0)
        for index, image in enumerate(shown)
    }
    sums = []
    for group in groups:
        one = hashlib.sha256(json_bytes([group.source, group.weight]))
        for piece in group_bytes(group, images):
            one.update(piece)
        sums.append(one.digest())
    return {
        "samples": len(groups),
        "digest": digest(sums),
        "in_any_order": digest(sorted(sums)),
    }


def _tokenizer_digest(base: Base) -> str:
    tokenizer: Any = base.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return digest([json_bytes([whole, tokenizer.chat_template])])


def _processor_digest(base: Base) -> str:
    return digest([json_bytes(base.images.processor.to_dict() if base.images else None)])

"""What a stage was begun with, and whether a run that is resumed still has it.

trainer_state.json of every checkpoint holds it under "begun_with": digests of the samples in their
order, of the starting model, the tokenizer and the image processor, and the flags.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpo_fast.counting import counted
from cpo_fast.errors import UsageError
from cpo_fast.run.same_flags import check_flags
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
    from cpo_fast.run.base import Base

BEGUN_WITH = "begun_with"
MANY_IMAGES = 10_000  # of more images, so many are opened, the others count by path and size


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
        counts = f"{counted(before['samples'], 'sample')} then, {after['samples']} now"
        if before["in_any_order"] == after["in_any_order"]:
            found.append(f"{name}: the same {counted(after['samples'], 'sample')} in another order")
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

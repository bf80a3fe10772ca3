"""The inputs that a stage began with, compared when it is resumed.

trainer_state.json of every checkpoint holds them under "begun_with": the flags, and digests of the
samples in order, the starting model, the tokenizer and the image processor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpo_fast.counting import counted
from cpo_fast.errors import UsageError
from cpo_fast.run.digests import (
    IMAGE_HEAD,
    digest,
    digest_models,
    group_bytes,
    image_bytes,
    json_bytes,
    list_images,
    processor_settings,
)
from cpo_fast.run.same_flags import check_flags
from cpo_fast.training.checkpoint import BEGUN_WITH, read_state
from cpo_fast.training.distributed import World
from cpo_fast.types import PreferenceGroup

if TYPE_CHECKING:
    from cpo_fast.model.checkpoint import Checkpoint

MANY_IMAGES = 10_000  # images that are opened; the others count by path and size


def check_beginning(
    stage: str,
    flags: Mapping[str, Any],
    checkpoint: Checkpoint,
    model: Sequence[Path],
    train: Sequence[PreferenceGroup],
    held_out: Sequence[PreferenceGroup],
    resume: Path | None,
    world: World,
) -> dict[str, Any]:
    """The inputs of the stage, as its checkpoints store them; computed and compared by rank 0.

    `model`: the folders of the starting model. `flags`: as in config.json. Raises UsageError
    when the stage of checkpoint `resume` began with something else, unless the flags allow changed
    data: then the differences are printed and stored under "changes".
    """

    def find() -> dict[str, Any]:
        now = {
            "training data": digest_data(train),
            "held-out data": digest_data(held_out),
            "starting model": {"path": str(model[0]), "digest": digest_models(model)},
            "tokenizer": {"digest": _digest_tokenizer(checkpoint)},
            "image processor": {"digest": digest([json_bytes(processor_settings(checkpoint))])},
            "flags": dict(flags),
            "changes": [],
        }
        if resume is None:
            return now
        then = read_state(resume).get(BEGUN_WITH)
        if then is None:
            print(
                f"{stage}: {resume} was written by an earlier version: data, starting model and "
                "tokenizer cannot be compared with its start"
            )
            return now
        check_flags(resume, then["flags"], flags)
        changes = list_differences(then, now)
        if changes and not flags["allow_changed_data"]:
            raise UsageError(
                f"{resume} began with other inputs than this run has: {'; '.join(changes)}. Resume "
                "with the same inputs, start again in another --output_dir, or continue anyway "
                "with --allow_changed_data true"
            )
        if changes:
            print(f"{stage}: continues from {resume.name} with changes: {'; '.join(changes)}")
        return now | {"changes": [*then["changes"], *changes]}

    return world.on_main(find)


def list_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between two beginnings of a stage, as text."""
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


def digest_data(groups: Sequence[PreferenceGroup]) -> dict[str, Any]:
    """The number of samples, and digests of them in order and in any order.

    Images count by path and size; up to `MANY_IMAGES` of them, evenly spread, also by their first
    bytes (opening 200,000 radiographs would delay the start too long).
    """
    shown = list_images(groups)
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


def _digest_tokenizer(checkpoint: Checkpoint) -> str:
    tokenizer: Any = checkpoint.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return digest([json_bytes([whole, tokenizer.chat_template])])

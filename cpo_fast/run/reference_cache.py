"""Reference log-probabilities, computed once in large packs without a backward and cached.

`reference_log_probs.safetensors` in the run folder holds one float32 sum per response, in the order
of the groups: chosen, rejected_1 .. rejected_K. Its metadata is the key: digests of data, reference
model and the settings that change a value. A file with another key is not used. It is computed in
parts, each complete or absent, so that a killed run continues where it stopped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from cpo_fast.errors import RecordError, UsageError
from cpo_fast.loss import linear_logprobs
from cpo_fast.loss.segments import segment_sums
from cpo_fast.model.checkpoint import Checkpoint
from cpo_fast.model.packed import PackedModel
from cpo_fast.packing import Step, plan_epoch
from cpo_fast.run.digests import data_bytes, digest, json_bytes, model_bytes, processor_settings
from cpo_fast.training.checkpoint import RESUME
from cpo_fast.training.feed import StepFeed, load_steps
from cpo_fast.training.interrupt import Interrupted, StopRequest
from cpo_fast.types import PackedBatch, PreferenceGroup, RejectedRecord

PART = 256  # groups per part
PACKS = 4  # without a backward only one layer's activations are alive, so packs can be larger


@dataclass
class ReferenceCache:
    """Reference log-probs of `model` for the groups of one stage.

    `adapters_off`: the reference is the model without its adapters. `overwrite`: replace a file
    with another key instead of refusing it.
    """

    folder: Path
    model: PackedModel
    adapters_off: bool
    checkpoint: Checkpoint
    device: torch.device
    stop: StopRequest
    packing_length: int
    num_workers: int = 0
    impl: str | None = None
    overwrite: bool = False
    rejected: dict[int, RejectedRecord] = field(default_factory=dict)  # by index of the group

    @property
    def path(self) -> Path:
        return self.folder / "reference_log_probs.safetensors"

    @property
    def parts(self) -> Path:
        return self.folder / "reference_log_probs.parts"

    def fill(self, groups: Sequence[PreferenceGroup]) -> list[PreferenceGroup]:
        """The groups with their `ref_logps`, from the file or computed.

        A group whose image does not decode gets none and is listed in `rejected`. Raises UsageError
        when the file or a part of it has another key, and Interrupted on a stop request.
        """
        if not groups:
            return []
        key = build_cache_key(self.model, groups, self.checkpoint, adapters_off=self.adapters_off)
        values = self._read(self.path, key)
        if values is None:
            values = self._compute(groups, key)
            _write(self.path, values, key)
            shutil.rmtree(self.parts)
        ends = list(accumulate((1 + len(group.rejected) for group in groups), initial=0))
        filled = []
        for index, (group, start, end) in enumerate(zip(groups, ends, ends[1:], strict=False)):
            own = values[start:end]
            if own.isnan().any():
                self.rejected.setdefault(index, self._reject_cached(group))
                filled.append(group)
            else:
                filled.append(replace(group, ref_logps=tuple(own.tolist())))
        return filled

    def _reject_cached(self, group: PreferenceGroup) -> RejectedRecord:
        """The record of a group without values in the file of an earlier run."""
        detail = f"its image failed when {self.path.name} was made; delete it to recompute"
        error = RecordError("no-reference-logps", detail)
        return RejectedRecord.of(group.id, group.origin, error, stage="cpo")

    def _read(self, path: Path, key: dict[str, str]) -> torch.Tensor | None:
        """The values of a file with this key; None if the file is missing."""
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                found = file.metadata() or {}
                values = file.get_tensor("logps")
        except SafetensorError as error:
            raise UsageError(f"{path} is damaged ({error}); delete it") from None
        if differing := [name for name in key if found.get(name) != key[name]]:
            if self.overwrite:
                path.unlink()
                return None
            raise UsageError(
                f"{path} was computed with other {' and '.join(differing)} than this run has: "
                "delete it to compute it again, pass --overwrite_output_dir true, or choose "
                "another --output_dir"
            )
        return values

    @torch.no_grad()
    def _compute(self, groups: Sequence[PreferenceGroup], key: dict[str, str]) -> torch.Tensor:
        """One value per response of all groups, [sum of (1 + K)] float32; NaN: its image failed."""
        self.parts.mkdir(mode=0o700, exist_ok=True)
        firsts = range(0, len(groups), PART)
        files = {first: self.parts / f"part-{first:09d}.safetensors" for first in firsts}
        done: dict[int, torch.Tensor] = {}
        for first, path in files.items():
            if (values := self._read(path, key)) is not None:
                done[first] = values
        # Group ids can repeat; indices cannot, and come back in the segments' names.
        numbered = [replace(group, id=str(index)) for index, group in enumerate(groups)]
        steps: list[Step] = []
        ends: dict[int, int] = {}  # last step of a part -> the part
        for first in firsts:
            if first not in done:
                steps += self._plan_part(groups, first)
                ends[len(steps)] = first
        checkpoint = self.checkpoint
        feed = StepFeed(numbered, steps, checkpoint.pixels, checkpoint.image_token_id, "cpo")
        loader = load_steps(feed, num_workers=self.num_workers if steps else 0)
        self.model.model.eval()
        found: dict[str, float] = {}
        bar = tqdm(loader, total=len(steps), desc="reference", unit="pack", disable=None)
        for number, step in enumerate(bar, start=1):
            for record in step.rejected:
                index = int(record.id)
                self.rejected[index] = replace(record, id=groups[index].id)
            for batch in step.batches:
                sums = self._score(batch.to(self.device))
                found |= zip(batch.segment_names, sums.tolist(), strict=True)
            if number in ends:
                first = ends[number]
                part = range(first, min(first + PART, len(groups)))
                names = [name for index in part for name in _list_segments(index, groups[index])]
                done[first] = torch.tensor([found.get(name, float("nan")) for name in names])
                _write(files[first], done[first], key)
                found.clear()
            if self.stop.pending() and number < len(steps):
                raise Interrupted(
                    f"stopped by {self.stop.reason} in the reference's pack {number} of "
                    f"{len(steps)}; {RESUME}"
                )
        return torch.cat([done[first] for first in firsts])

    def _plan_part(self, groups: Sequence[PreferenceGroup], first: int) -> list[Step]:
        """The packs of the part that starts at group `first`, one step per pack."""
        part = groups[first : first + PART]
        (step,) = plan_epoch(
            part,
            pairs_per_step=sum(len(group.rejected) for group in part),
            packing_length=PACKS * self.packing_length,
            seed=0,
            epoch=0,
            shuffle=False,
        )
        packs = [tuple((first + index, which) for index, which in pack) for pack in step]
        return [Step((pack,), sum(len(which) for _, which in pack)) for pack in packs]

    def _score(self, batch: PackedBatch) -> torch.Tensor:
        """[S] summed log-probs of the batch's segments, float32 on the CPU."""
        weight, bias = self.model.head(reference=self.adapters_off)
        hidden = self.model.hidden(batch, reference=self.adapters_off)
        logps = linear_logprobs(hidden, weight, batch.labels, bias=bias, impl=self.impl)
        return segment_sums(logps, batch.segment_ids, batch.num_segments).float().cpu()


def _list_segments(index: int, group: PreferenceGroup) -> list[str]:
    rejected = range(1, len(group.rejected) + 1)
    return [f"{index}/chosen", *(f"{index}/rejected_{k}" for k in rejected)]


def _write(path: Path, values: torch.Tensor, key: dict[str, str]) -> None:
    """Write a file atomically."""
    partial = path.with_suffix(".partial")
    save_file({"logps": values.contiguous()}, partial, metadata=key)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(path)


# --- the key -------------------------------------------------------------------------------------


def build_cache_key(
    model: PackedModel,
    groups: Sequence[PreferenceGroup],
    checkpoint: Checkpoint,
    *,
    adapters_off: bool,
) -> dict[str, str]:
    """SHA-256 digests of "data", "model" and "settings".

    The data are token ids, so the tokenizer counts only through them.
    An image counts by its path, its size and its first bytes (reading 200,000 radiographs whole
    takes longer than starting a run should), together with the image processor's settings.
    """
    settings = {
        "attention": model.attention,
        "dtype": str(model.model.dtype),
        "device": model.model.device.type,
        "images": processor_settings(checkpoint),
    }
    return {
        "data": digest(data_bytes(groups)),
        "model": digest(model_bytes(model, adapters_off)),
        "settings": digest([json_bytes(settings)]),
    }

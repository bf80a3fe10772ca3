"""A pack of groups -> PackedBatch: tokens, branch layout, mRoPE positions, scored rows, pixels.

The layout [prompt | chosen | rejected_1 .. rejected_K] computes a prompt once for all of its
responses. Every branch continues the positions from the end of its prompt, as in an unpacked
sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from cpo_fast.counting import counted
from cpo_fast.data.pixels import MERGE
from cpo_fast.errors import RecordError, UsageError
from cpo_fast.packing.plan import Pack
from cpo_fast.types import ImageRef, PackedBatch, Pixels, PreferenceGroup, Prompt


def prompt_positions(
    input_ids: torch.Tensor, grids: Sequence[torch.Tensor], image_token_id: int | None
) -> torch.Tensor:
    """mRoPE positions [3, N] of a prompt [N]; rows are temporal, height, width.

    A text token advances all three by one. An image of t x h x w merged patches has its coordinates
    as offsets and advances them by max(h, w) (Qwen2-VL, arXiv 2409.12191, section 2.1). Raises
    RecordError ("image-placeholder-mismatch") if the runs of placeholders do not match the grids.
    """
    if not grids:
        return torch.arange(len(input_ids)).expand(3, -1)
    is_image = torch.eq(input_ids, -1 if image_token_id is None else image_token_id)
    pieces = []
    token, position = 0, 0
    for grid in grids:
        t, h, w = (int(x) for x in grid)
        h, w = h // MERGE, w // MERGE
        start = token + int(is_image[token:].to(torch.uint8).argmax())  # end of the preceding text
        end = start + t * h * w
        if not bool(is_image[start:end].all()) or end > len(input_ids):
            raise RecordError(
                "image-placeholder-mismatch",
                f"an image needs {counted(t * h * w, 'token')}, the prompt has another number",
            )
        pieces.append(torch.arange(position, position + start - token).expand(3, -1))
        position += start - token
        axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        pieces.append(position + torch.stack(axes).flatten(1))
        position += max(h, w)
        token = end
    if bool(is_image[token:].any()):
        raise RecordError(
            "image-placeholder-mismatch", "the prompt has more placeholders than the images need"
        )
    pieces.append(torch.arange(position, position + len(input_ids) - token).expand(3, -1))
    return torch.cat(pieces, dim=1)


@dataclass(slots=True)
class _Row:
    """The row of tokens under construction; lists are concatenated at the end."""

    image_token_id: int | None
    pixels: Pixels | None
    input_ids: list[torch.Tensor] = field(default_factory=list)
    positions: list[torch.Tensor] = field(default_factory=list)
    study_index: list[torch.Tensor] = field(default_factory=list)
    branch_index: list[torch.Tensor] = field(default_factory=list)
    score_rows: list[torch.Tensor] = field(default_factory=list)
    labels: list[torch.Tensor] = field(default_factory=list)
    segment_names: list[str] = field(default_factory=list)
    pixel_values: list[torch.Tensor] = field(default_factory=list)
    grids: list[torch.Tensor] = field(default_factory=list)
    image_index: dict[ImageRef, int] = field(default_factory=dict)
    image_order: list[int] = field(default_factory=list)
    length: int = 0
    study: int = -1
    branch: int = 0
    prompt_end: int = 0  # index of the token after the open prompt
    next_position: int = 0

    def _append(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        self.input_ids.append(ids)
        self.positions.append(positions)
        self.study_index.append(torch.full_like(ids, self.study))
        self.branch_index.append(torch.full_like(ids, self.branch))
        self.length += len(ids)

    def _image(self, ref: ImageRef) -> int:
        """Index of an image, loaded on first use."""
        if ref not in self.image_index:
            if self.pixels is None:
                raise UsageError("the data has images, but collate has no pixels function")
            values, grid = self.pixels(ref)
            self.image_index[ref] = len(self.grids)
            self.pixel_values.append(values)
            self.grids.append(grid)
        return self.image_index[ref]

    def open_prompt(self, prompt: Prompt) -> None:
        """Append a prompt with its images; the following branches belong to it."""
        images = [self._image(ref) for ref in prompt.images]
        self.image_order += images
        grids = [self.grids[image] for image in images]
        ids = torch.tensor(prompt.input_ids)
        positions = prompt_positions(ids, grids, self.image_token_id)
        self.study += 1
        self.branch = 0
        self._append(ids, positions)
        self.prompt_end = self.length
        self.next_position = int(positions.max()) + 1

    def add_branch(self, response: Sequence[int], name: str) -> int:
        """Append a response to the open prompt, with all tokens scored; returns its segment."""
        ids = torch.tensor(response)
        self.branch += 1
        # Token i is predicted by the preceding state, the first one by the last of the prompt.
        before = torch.arange(self.length - 1, self.length + len(ids) - 1)
        before[0] = self.prompt_end - 1
        self.score_rows.append(before)
        self.labels.append(ids)
        span = torch.arange(self.next_position, self.next_position + len(ids))
        self._append(ids, span.expand(3, -1))
        self.segment_names.append(name)
        return len(self.segment_names) - 1


def collate(
    groups: Sequence[PreferenceGroup],
    pack: Pack,
    *,
    pixels: Pixels | None = None,
    image_token_id: int | None = None,
    share_prompt: bool = True,
) -> PackedBatch:
    """The tensors of one pack, on the CPU; a part without rejected responses has its chosen (SFT).

    A rejected response with its own prompt (a perception pair) is laid out as a separate study.
    `pixels` and `image_token_id` are required if a prompt has an image; an image is loaded and
    encoded once per pack. Without `share_prompt` every response has its own copy of the prompt:
    equal numbers with more work, as an oracle.
    Raises UsageError for an empty pack, RecordError if placeholders and images do not match.
    """
    if not pack:
        raise UsageError("an empty pack cannot be collated; skip it")
    row = _Row(image_token_id, pixels)
    pairs: list[tuple[int, int]] = []
    weights: list[float] = []
    sources: list[str] = []
    ref_logps: list[float] = []  # by segment
    logical_tokens = 0
    for index, which in pack:
        group = groups[index]
        own_prompts = group.rejected_prompts or (None,) * len(group.rejected)
        row.open_prompt(group.prompt)
        chosen = row.add_branch(group.chosen, f"{group.id}/chosen")
        chosen_tokens = len(group.prompt.input_ids) + len(group.chosen)
        # Branches of the open prompt come first, then perception pairs with their prompts.
        rejected = {}
        ref_logps += group.ref_logps[:1]
        for k in sorted(which, key=lambda k: own_prompts[k] is not None):
            own = own_prompts[k]
            if own is not None or not share_prompt:
                row.open_prompt(own or group.prompt)
            rejected[k] = row.add_branch(group.rejected[k], f"{group.id}/rejected_{k + 1}")
            ref_logps += group.ref_logps[k + 1 : k + 2]
        for k in which:
            pairs.append((chosen, rejected[k]))
            weights.append(group.weight)
            sources.append(group.sources[k])
            prompt = own_prompts[k] or group.prompt
            logical_tokens += chosen_tokens + len(prompt.input_ids) + len(group.rejected[k])
        if not which:
            logical_tokens += chosen_tokens
    cached = len(ref_logps) == len(row.segment_names)
    segments = [torch.full_like(labels, s) for s, labels in enumerate(row.labels)]
    return PackedBatch(
        input_ids=torch.cat(row.input_ids),
        position_ids=torch.cat(row.positions, dim=1),
        study_index=torch.cat(row.study_index),
        branch_index=torch.cat(row.branch_index),
        score_rows=torch.cat(row.score_rows),
        labels=torch.cat(row.labels),
        segment_ids=torch.cat(segments),
        pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        pair_weights=torch.tensor(weights, dtype=torch.float32),
        pair_sources=tuple(sources),
        segment_names=tuple(row.segment_names),
        num_segments=len(row.segment_names),
        logical_tokens=logical_tokens,
        pixel_values=torch.cat(row.pixel_values) if row.pixel_values else None,
        image_grid_thw=torch.stack(row.grids) if row.grids else None,
        image_order=None if row.image_order == [*range(len(row.grids))] else tuple(row.image_order),
        ref_logps=torch.tensor(ref_logps, dtype=torch.float32) if cached else None,
    )

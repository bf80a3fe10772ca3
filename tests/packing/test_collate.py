"""The tensors of a pack against the definition of PackedBatch."""

from __future__ import annotations

import pytest
import torch

from cpo_fast.errors import RecordError, UsageError
from cpo_fast.packing import collate, encode_all, image_token_id
from cpo_fast.packing.collate import prompt_positions
from cpo_fast.testing.samples import (
    image,
    images,
    mixed,
    preference,
    tokenizer,
    vision_language_model,
)


def encode_and_collate(samples, pack=None, **options):
    groups = encode_all(samples, tokenizer(), images().grid, max_length=1000).groups
    pack = pack or tuple((i, tuple(range(len(g.rejected)))) for i, g in enumerate(groups))
    pad = image_token_id(tokenizer())
    options = {"pixels": images().pixels, "image_token_id": pad, **options}
    return groups, collate(groups, pack, **options)


def test_every_segment_can_be_reconstructed():
    """Row, study and branch determine prompt, response and scored rows of each segment."""
    groups, batch = encode_and_collate(mixed())
    by_id = {group.id: group for group in groups}
    assert len(batch.segment_names) == batch.num_segments == 15
    for segment, name in enumerate(batch.segment_names):
        owner, role = name.split("/")
        group = by_id[owner]
        prompt, response = group.prompt, group.chosen
        if role != "chosen":
            k = int(role.removeprefix("rejected_")) - 1
            response = group.rejected[k]
            prompt = (group.rejected_prompts[k] if group.rejected_prompts else None) or prompt
        rows = batch.score_rows[batch.segment_ids == segment]
        assert tuple(batch.labels[batch.segment_ids == segment].tolist()) == response
        study = batch.study_index[rows[0]]
        is_prompt = (batch.study_index == study) & (batch.branch_index == 0)
        assert tuple(batch.input_ids[is_prompt].tolist()) == prompt.input_ids
        assert rows[0] == is_prompt.nonzero()[-1]  # the first token is scored from the prompt
        branch = (batch.study_index == study) & (batch.branch_index == batch.branch_index[rows[1]])
        assert tuple(batch.input_ids[branch].tolist()) == response
        assert rows[1:].tolist() == branch.nonzero()[:-1, 0].tolist()
        start = int(batch.position_ids[:, is_prompt].max()) + 1
        want = torch.arange(start, start + len(response)).expand(3, -1)
        assert torch.equal(batch.position_ids[:, branch], want)


def test_pairs_weights_sources_and_counts():
    groups, batch = encode_and_collate(mixed())
    names = [tuple(batch.segment_names[s] for s in pair) for pair in batch.pairs.tolist()]
    assert names == [
        (f"{g.id}/chosen", f"{g.id}/rejected_{k + 1}")
        for g in groups
        for k in range(len(g.rejected))
    ]
    assert batch.pair_sources.count("perception") == 1
    assert batch.pair_weights.tolist() == [1.0] * 10
    assert batch.image_grid_thw.shape == (6, 3)  # each prompt's images once
    assert batch.pixel_values.shape == (int(batch.image_grid_thw.prod(1).sum()), 1176)
    logical = 0
    for g in groups:
        for k, rejected in enumerate(g.rejected):
            own = (g.rejected_prompts[k] if g.rejected_prompts else None) or g.prompt
            logical += len(g.prompt.input_ids) + len(g.chosen) + len(own.input_ids) + len(rejected)
    assert batch.logical_tokens == logical


def test_sft_samples_are_segments_without_pairs():
    _, batch = encode_and_collate([preference("a", 0, image(56, 56)), preference("b", 0)])
    assert batch.pairs.shape == (0, 2) and batch.pair_weights.shape == (0,)
    assert batch.segment_names == ("a/chosen", "b/chosen")
    assert batch.logical_tokens == len(batch.input_ids)


def test_pack_with_part_of_a_group():
    _, batch = encode_and_collate([preference("a", 3)], pack=((0, (2,)),))
    assert batch.segment_names == ("a/chosen", "a/rejected_3")


def test_image_is_loaded_once_per_pack():
    loaded = []

    def pixels(ref):
        loaded.append(ref)
        return images().pixels(ref)

    a, b = image(100, 80), image(60, 60)
    samples = [preference("a", 2, a, perception=b), preference("b", 2, b)]
    _, plain = encode_and_collate(samples[1:], pixels=pixels)
    assert plain.image_order is None and loaded == [b]
    loaded.clear()
    split = ((0, (0,)), (1, (0, 1)), (0, (1,)))
    _, batch = encode_and_collate(samples, pack=split, pixels=pixels)
    assert loaded == [a, b] and batch.image_order == (0, 1, 1, 0)
    _, unshared = encode_and_collate(samples[1:], share_prompt=False)
    assert unshared.image_order == (0, 0, 0) and len(unshared.image_grid_thw) == 1
    assert unshared.study_index.max() == 2 and unshared.segment_names == plain.segment_names
    assert torch.equal(unshared.labels, plain.labels)


@pytest.mark.parametrize("pictures", [(), ((100, 80),), ((56, 56), (120, 60)), ((112, 28),)])
def test_prompt_positions_equal_transformers(pictures):
    groups, batch = encode_and_collate([preference("a", 0, *[image(*size) for size in pictures])])
    ids = torch.tensor([groups[0].prompt.input_ids])
    pad = image_token_id(tokenizer())
    want, _ = vision_language_model().model.get_rope_index(
        ids, (ids == pad).int(), image_grid_thw=batch.image_grid_thw
    )
    grids = [] if batch.image_grid_thw is None else list(batch.image_grid_thw)
    assert torch.equal(prompt_positions(ids[0], grids, pad), want[:, 0])


def test_mismatched_placeholders_are_refused():
    groups = encode_all(
        [preference("a", 1, image(100, 80))], tokenizer(), lambda _: (1, 4, 4), max_length=1000
    ).groups
    with pytest.raises(RecordError, match="image-placeholder-mismatch"):
        collate(
            groups,
            ((0, (0,)),),
            pixels=images().pixels,
            image_token_id=image_token_id(tokenizer()),
        )
    with pytest.raises(UsageError, match="pixels"):
        collate(groups, ((0, (0,)),))
    with pytest.raises(UsageError, match="empty pack"):
        collate(groups, ())

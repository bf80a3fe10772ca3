"""Worker processes decode images and build packs ahead of the step, with equal results."""

from __future__ import annotations

import os
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from cpo_fast.errors import RecordError
from cpo_fast.packing import encode_all, image_token_id, plan_epoch
from cpo_fast.testing.samples import image, images, preference, tokenizer
from cpo_fast.training.feed import StepFeed, load_steps

STUDIES = 8


class Noted:
    """Decodes images and logs the decoding process to a file; one image is damaged."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self, ref):
        with self.file.open("a") as file:
            file.write(f"{os.getpid()} {ref.path}\n")
        if ref == image(56, 61, seed=6):
            raise RecordError("image-unreadable", "cut short")
        return images().pixels(ref)

    def lines(self) -> list[tuple[int, str]]:
        text = self.file.read_text() if self.file.exists() else ""
        return [(int(pid), name) for pid, name in (line.split() for line in text.splitlines())]


@pytest.fixture
def feed(tmp_path):
    samples = [preference(str(i), 2, image(56, 55 + i, seed=i)) for i in range(STUDIES)]
    groups = encode_all(samples, tokenizer(), images().grid, max_length=1000).groups
    steps = plan_epoch(groups, pairs_per_step=2, packing_length=1000, seed=0, epoch=0)
    return StepFeed(groups, steps, Noted(tmp_path / "decoded"), image_token_id(tokenizer()))


def test_batches_do_not_depend_on_workers(feed):
    alone = list(load_steps(feed, num_workers=0))
    ahead = list(load_steps(feed, num_workers=2))
    assert len(alone) == len(ahead) == STUDIES
    for mine, theirs in zip(alone, ahead, strict=True):
        assert mine.rejected == theirs.rejected
        for one, other in zip(mine.batches, theirs.batches, strict=True):
            for field in fields(one):
                a, b = getattr(one, field.name), getattr(other, field.name)
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
    assert [r.id for step in ahead for r in step.rejected] == ["6"]  # the damaged image, once


def test_workers_decode_images_ahead(feed):
    steps = load_steps(feed, num_workers=1)
    next(steps)  # while one step is computed
    deadline = time.monotonic() + 600
    while len(feed.pixels.lines()) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    lines = feed.pixels.lines()
    assert len(lines) >= 3  # the current step and two ahead
    assert {pid for pid, _ in lines} and os.getpid() not in {pid for pid, _ in lines}
    order = [feed.groups[step.packs[0][0][0]].prompt.images[0].path for step in feed.steps]
    assert [name for _, name in lines] == order[: len(lines)]


def test_loader_starts_at_the_given_step(feed):
    def rows(**options):
        return [[b.input_ids for b in step.batches] for step in load_steps(feed, **options)]

    want, got = rows(num_workers=0)[5:], rows(num_workers=1, start=5)
    for mine, theirs in zip(got, want, strict=True):
        assert len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))

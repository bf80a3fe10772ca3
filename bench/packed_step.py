"""Our optimiser step over all pairs of a Work, with time per phase, tokens and FLOPs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch

from bench.batches import prepare_batches
from bench.step_data import Work
from cpo_fast.loss import cpo_loss
from cpo_fast.model.flops import FlopCounter
from cpo_fast.model.packed import PackedModel
from cpo_fast.packing import collate, image_token_id, plan_epoch
from cpo_fast.packing.plan import Pack, part_tokens
from cpo_fast.types import PackedBatch, PreferenceGroup

Mode = Literal["shared", "unshared", "unpacked"]


class Phases:
    """Seconds per phase of a step; the policy's exclude the vision tower's.

    On a GPU, phase boundaries synchronise the device while `on`, which costs time.
    """

    def __init__(self, packed: PackedModel, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.device = device
        self.on = device.type == "cpu"
        if packed.vision is not None:
            packed.vision.register_forward_pre_hook(lambda *_: self._add_vision(-1))
            packed.vision.register_forward_hook(lambda *_: self._add_vision(+1))

    def _read_clock(self) -> float:
        if self.on and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _add_vision(self, sign: int) -> None:
        now = self._read_clock()
        self.seconds["vision"] += sign * now
        self.seconds["policy"] -= sign * now

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begun = self._read_clock()
        yield
        self.seconds[name] += self._read_clock() - begun

    def compute_shares(self) -> dict[str, float]:
        total = sum(self.seconds.values())
        return {name: seconds / total for name, seconds in self.seconds.items()}


class PackedStep:
    """A call runs one optimiser step: preprocessing, policy and reference forward, loss, backward,
    AdamW (with learning rate 0, so that all calls are equal); returns the mean loss. For a GPU,
    worker processes prepare batches during the step, as in a training run.

    `mode` "unshared" recomputes the prompt for prompt + chosen and prompt + rejected of every pair,
    like peers, but still encodes the image once per study. "unpacked" computes one study at a time.
    """

    def __init__(
        self,
        packed: PackedModel,
        work: Work,
        *,
        packing_length: int,
        mode: Mode = "shared",
        loss_impl: str | None = None,
    ) -> None:
        self.packed = packed
        self.work = work
        self.shared = mode != "unshared"
        self.loss_impl = loss_impl
        trained = [p for p in packed.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0)
        self.pairs = work.pairs
        (step,) = plan_epoch(
            work.groups, pairs_per_step=self.pairs, packing_length=packing_length, seed=0, epoch=0
        )
        self.packs = list(step)
        if mode == "unshared":
            self.packs = unshare_packs(work.groups, step, packing_length)
        elif mode == "unpacked":
            self.packs = [(part,) for pack in step for part in pack]
        self.device = packed.head()[0].device
        self._count = FlopCounter(packed)
        self._batches = prepare_batches(self._collate, self.packs, self.device)
        self.phases = Phases(packed, self.device)
        self.clear()

    def clear(self) -> None:
        """Reset counts and times."""
        self.tokens, self.flops = 0, 0.0
        self.phases.seconds.clear()

    def _collate(self, pack: Pack) -> PackedBatch:
        return collate(
            self.work.groups,
            pack,
            pixels=self.work.images.pixels,
            image_token_id=image_token_id(self.work.tokenizer),
            share_prompt=self.shared,
        )

    def _next_batch(self) -> PackedBatch:
        batch = next(self._batches)
        # Counted on the host: on the device, counting would synchronise.
        self.tokens += len(batch.input_ids)
        self.flops += self._count(batch).total
        return batch.to(self.device)

    def __call__(self) -> float:
        total = torch.zeros((), device=self.device)
        for _ in self.packs:
            with self.phases("data"):
                batch = self._next_batch()
            with self.phases("policy"):
                hidden = self.packed.hidden(batch)
            with self.phases("reference"):
                reference = self.packed.hidden(batch, reference=True)
            with self.phases("loss"):
                weight, bias = self.packed.head()
                out = cpo_loss(
                    hidden,
                    weight,
                    batch.labels,
                    batch.segment_ids,
                    batch.pairs,
                    ref_hidden=reference,
                    bias=bias,
                    num_segments=batch.num_segments,
                    impl=self.loss_impl,
                )
                loss = out.losses.sum() / self.pairs
            with self.phases("backward"):
                loss.backward()
            total += loss.detach()
        with self.phases("optimiser"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return total.item()


def unshare_packs(
    groups: Sequence[PreferenceGroup], packs: Sequence[Pack], packing_length: int
) -> list[Pack]:
    """Packs in which every pair has a separate prompt. A study's pairs stay together; a pack takes
    as many studies as fit the budget."""
    out: list[Pack] = []
    room = 0
    for index, which in (part for pack in packs for part in pack):
        pairs = tuple((index, (k,)) for k in which)
        prompt = len(groups[index].prompt.input_ids)  # part_tokens counts it once per part
        size = sum(part_tokens(groups, pair) + prompt for pair in pairs)
        if not out or size > room:
            out.append(())
            room = packing_length
        out[-1] += pairs
        room -= size
    return out

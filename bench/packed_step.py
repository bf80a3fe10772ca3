"""One optimiser step of ours over all pairs of a Work, with its phases clocked and counted."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch

from bench.ahead import ahead
from bench.step_data import Work
from cpo_fast.loss import cpo_loss
from cpo_fast.model.flops import FlopCounter
from cpo_fast.model.packed import PackedModel
from cpo_fast.packing import collate, image_token_id, plan_epoch
from cpo_fast.packing.plan import Pack, part_tokens
from cpo_fast.types import PackedBatch, PreferenceGroup

Mode = Literal["shared", "unshared", "unpacked"]


class Phases:
    """Seconds of each part of a step; the vision tower's are taken out of the policy's.

    On a GPU the limits of phases wait for the device, which takes time: there, only while `on`.
    """

    def __init__(self, packed: PackedModel, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.device = device
        self.on = device.type == "cpu"
        if packed.vision is not None:
            packed.vision.register_forward_pre_hook(lambda *_: self._vision(-1))
            packed.vision.register_forward_hook(lambda *_: self._vision(+1))

    def _now(self) -> float:
        if self.on and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _vision(self, sign: int) -> None:
        now = self._now()
        self.seconds["vision"] += sign * now
        self.seconds["policy"] -= sign * now

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begun = self._now()
        yield
        self.seconds[name] += self._now() - begun

    def shares(self) -> dict[str, float]:
        total = sum(self.seconds.values())
        return {name: seconds / total for name, seconds in self.seconds.items()}


class PackedStep:
    """Call it for one optimiser step: preprocessing, policy and reference forward, loss, backward,
    AdamW (with a learning rate of 0, so that every call computes the same); returns the mean loss.
    For a GPU, worker processes prepare batches while it computes, as in a training run.

    `mode` "unshared" computes prompt + chosen and prompt + rejected anew for every pair, as peers
    do; only the image is still encoded once per study. "unpacked" computes one study at a time.
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
            self.packs = unshared_packs(work.groups, step, packing_length)
        elif mode == "unpacked":
            self.packs = [(part,) for pack in step for part in pack]
        self.device = packed.head()[0].device
        self._count = FlopCounter(packed)
        self._batches = ahead(self._collated, self.packs, self.device)
        self.phases = Phases(packed, self.device)
        self.clear()

    def clear(self) -> None:
        """Forget what was counted and clocked so far."""
        self.tokens, self.flops = 0, 0.0
        self.phases.seconds.clear()

    def _collated(self, pack: Pack) -> PackedBatch:
        return collate(
            self.work.groups,
            pack,
            pixels=self.work.images.pixels,
            image_token_id=image_token_id(self.work.tokenizer),
            share_prompt=self.shared,
        )

    def _batch(self) -> PackedBatch:
        batch = next(self._batches)
        # Counted before the batch goes to the device, whose answers one would have to wait for.
        self.tokens += len(batch.input_ids)
        self.flops += self._count(batch).total
        return batch.to(self.device)

    def __call__(self) -> float:
        total = torch.zeros((), device=self.device)
        for _ in self.packs:
            with self.phases("data"):
                batch = self._batch()
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


def unshared_packs(
    groups: Sequence[PreferenceGroup], packs: Sequence[Pack], packing_length: int
) -> list[Pack]:
    """Every pair by itself, the pairs of a study together, as many studies as fit the budget."""
    out: list[Pack] = []
    room = 0
    for index, which in (part for pack in packs for part in pack):
        pairs = tuple((index, (k,)) for k in which)
        prompt = len(groups[index].prompt.input_ids)  # shared in a part, but not here
        size = sum(part_tokens(groups, pair) + prompt for pair in pairs)
        if not out or size > room:
            out.append(())
            room = packing_length
        out[-1] += pairs
        room -= size
    return out

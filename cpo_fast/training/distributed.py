"""The processes of a run as torchrun starts them: rank, collectives, shared decisions.

Every process runs the same program on its own packs. Numbers and decisions (weights, stop requests,
metrics) are exchanged over gloo as CPU tensors, gradients over NCCL on CUDA. With one process every
function is the identity and nothing is initialised.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cpo_fast.errors import CpoFastError, UsageError, first_line

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """This process's rank among `size` processes."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Rank 0 prints, prepares the data and writes every file."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks, in float64."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        with self._translate_errors():
            dist.all_reduce(tensor)
        return tensor.tolist()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on at least one rank; the result is equal on all ranks."""
        return self.sum([float(flag)])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """The JSON value of every rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self._translate_errors():
            dist.all_gather(sizes, torch.tensor([content.numel()]))
            longest = max(int(size) for size in sizes)
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: content.numel()] = content
            all_content = [torch.zeros_like(padded) for _ in range(self.size)]
            dist.all_gather(all_content, padded)
        return [
            json.loads(one[: int(size)].numpy().tobytes())
            for one, size in zip(all_content, sizes, strict=True)
        ]

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Run `work` on rank 0 and return its result, a JSON value, on all ranks.

        If it fails, rank 0 raises its error and the other ranks raise CpoFastError.
        """
        if self.size == 1:
            return work()
        done: dict[str, Any] = {}
        failure: Exception | None = None
        if self.is_main:
            try:
                done = {"result": work()}
            except Exception as error:
                failure = error
        done = self.gather(done)[0]
        if failure is not None:
            raise failure
        if "result" not in done:
            raise CpoFastError("rank 0 stopped; see its error message")
        return done["result"]

    def main_first(self, work: Callable[[], Result]) -> Result:
        """Run `work` on rank 0, then on the other ranks, which can use the files it wrote."""
        done: list[Result] = []

        def first() -> None:
            done.append(work())

        self.on_main(first)
        return done[0] if done else work()

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum the gradients over all ranks in place, with one all-reduce per dtype.

        A parameter without a gradient on any rank keeps None: AdamW skips it, as in one process.
        """
        if self.size == 1:
            return
        present = self.sum([float(p.grad is not None) for p in parameters])
        kinds: dict[torch.dtype, list[torch.Tensor]] = {}
        for parameter, count in zip(parameters, present, strict=True):
            if not count:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            kinds.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in kinds.values():
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            with self._translate_errors():
                dist.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's and NCCL's errors are RuntimeErrors
            raise CpoFastError(
                "lost contact with the other processes of the run: one of them died or did not "
                f"answer for ddp_timeout seconds; see its error message ({first_line(error)})"
            ) from error


@contextmanager
def join_processes(timeout_seconds: float) -> Iterator[World]:
    """Join the processes that torchrun started; without torchrun, a world of one process.

    Ranks other than 0 print errors only. Raises UsageError when the processes do not connect within
    the timeout or the environment is incomplete.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes did not connect: "
            f"{error}; start the run with torchrun"
        ) from error
    world = World(dist.get_rank(), dist.get_world_size())
    if not world.is_main:
        _silence()
    yield world
    dist.destroy_process_group()  # not after an error: it can wait for a dead process


class _NoTerminal(io.TextIOWrapper):
    """stderr without progress bars, which are drawn on terminals only."""

    def isatty(self) -> bool:
        return False


def _silence() -> None:
    sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = _NoTerminal(sys.stderr.buffer, encoding="utf-8", line_buffering=True)

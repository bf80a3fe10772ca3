"""The default CUDA workspace for logits, by counting waves tile by tile."""

from __future__ import annotations

import pytest
import torch

from cpo_fast.loss.chunked import chunk_rows, padded
from cpo_fast.loss.workspace import limit

HEADS = {"7B": (3584, 152064), "3B": (2048, 151936), "0.5B": (896, 151936)}  # D, V


def waves(rows: int, columns: int, multiprocessors: int = 132) -> int:
    """Waves of a GEMM of 128 x 256 tiles, assigned one after another."""
    done, busy = 0, 0
    for _ in range(0, rows, 128):
        for _ in range(0, columns, 256):
            busy += 1
            if busy == multiprocessors:
                done, busy = done + 1, 0
    return done + (busy > 0)


def chunks_of(T: int, D: int, V: int) -> list[int]:
    rows = chunk_rows(T, V, D, 2, 132, limit(torch.device("cuda")))
    return [min(rows, T - start) for start in range(0, T, rows)]


@pytest.mark.parametrize("name", list(HEADS))
@pytest.mark.parametrize("T", [8192, 16384])
def test_chunks_take_no_more_waves_than_all_rows_at_once(
    name: str, T: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CPO_FAST_WORKSPACE_MIB", raising=False)
    D, V = HEADS[name]
    parts = chunks_of(T, D, V)
    assert sum(waves(rows, D) for rows in parts) == waves(T, D)
    assert sum(waves(rows, V) for rows in parts) == waves(T, V)


@pytest.mark.parametrize("name", ["7B", "0.5B"])
def test_the_room_leaves_the_promised_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 1.2 GiB extra at T = 8192: logits, the unscaled gradient and the gradient."""
    monkeypatch.delenv("CPO_FAST_WORKSPACE_MIB", raising=False)
    D, V = HEADS[name]
    logits = max(chunks_of(8192, D, V)) * padded(V) * 2
    assert logits + 2 * 8192 * D * 2 <= 1.2 * 2**30

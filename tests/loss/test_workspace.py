"""The default CUDA workspace for logits: GEMM waves are counted tile by tile."""

from __future__ import annotations

import pytest
import torch

from cpo_fast.loss.chunked import chunk_rows, padded_columns
from cpo_fast.loss.workspace import limit

HEADS = {"7B": (3584, 152064), "3B": (2048, 151936), "0.5B": (896, 151936)}  # D, V


def count_waves(rows: int, columns: int, multiprocessors: int = 132) -> int:
    """Waves of a GEMM whose 128 x 256 tiles are assigned in order."""
    done, busy = 0, 0
    for _ in range(0, rows, 128):
        for _ in range(0, columns, 256):
            busy += 1
            if busy == multiprocessors:
                done, busy = done + 1, 0
    return done + (busy > 0)


def split_rows(T: int, D: int, V: int) -> list[int]:
    rows = chunk_rows(T, V, D, 2, 132, limit(torch.device("cuda")))
    return [min(rows, T - start) for start in range(0, T, rows)]


@pytest.mark.parametrize("name", list(HEADS))
@pytest.mark.parametrize("T", [8192, 16384])
def test_chunks_take_no_more_waves_than_all_rows_at_once(
    name: str, T: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CPO_FAST_WORKSPACE_MIB", raising=False)
    D, V = HEADS[name]
    parts = split_rows(T, D, V)
    assert sum(count_waves(rows, D) for rows in parts) == count_waves(T, D)
    assert sum(count_waves(rows, V) for rows in parts) == count_waves(T, V)


@pytest.mark.parametrize("name", ["7B", "0.5B"])
def test_workspace_stays_within_the_documented_memory(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At T = 8192, logits, unscaled gradient and gradient take at most 1.2 GiB."""
    monkeypatch.delenv("CPO_FAST_WORKSPACE_MIB", raising=False)
    D, V = HEADS[name]
    logits = max(split_rows(8192, D, V)) * padded_columns(V) * 2
    assert logits + 2 * 8192 * D * 2 <= 1.2 * 2**30

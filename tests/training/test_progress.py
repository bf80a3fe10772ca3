"""Progress of a run: lines, spikes, throughput, MFU, time shares."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cpo_fast.training import bar, clock
from cpo_fast.training.bar import StageBar, format_duration
from cpo_fast.training.clock import Clock
from cpo_fast.training.distributed import World
from cpo_fast.training.watch import MIN_STEPS, Watch
from cpo_fast.types import PackedBatch


def test_plain_progress_lines_without_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr(bar.time, "monotonic", lambda: now)
    shown = StageBar("cpo", total=100, done=40, shows=True)
    for _ in range(60):
        now += 60.0 if shown.done < 42 else 5.0  # the first steps are slow
        shown.update(0.5)
    shown.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("cpo: step 41 of 100, loss 0.5000")
    assert lines[2] == "cpo: step 48 of 100, loss 0.5000, 5 s/step, 4 min 20 s left"
    assert lines[-1] == "cpo: step 100 of 100, loss 0.5000, 5 s/step"
    assert 10 <= len(lines) <= 13


def test_other_ranks_print_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    shown = StageBar("cpo", total=1, done=0, shows=False)
    shown.update(0.5)
    shown.close()
    assert capsys.readouterr() == ("", "")


def test_format_duration() -> None:
    assert [format_duration(s) for s in (0.4, 59, 61, 7380)] == [
        "0 s",
        "59 s",
        "1 min 01 s",
        "2 h 03 min",
    ]


def test_spike_is_counted_and_slow_descent_is_not() -> None:
    watch, rng = Watch(), random.Random(0)
    for step in range(400):
        watch.update(2.0 - step / 400 + rng.gauss(0, 0.05), 1.0)
    assert watch.loss_spikes == 0
    watch.row()
    for _ in range(3):
        watch.update(6.0, 40.0)
        watch.update(1.0, 1.0)
    row = watch.row()
    assert row == {"loss_spikes": 3, "loss_max": 6.0, "grad_norm_max": 40.0}
    assert watch.row() == {"loss_spikes": 3}


def test_first_steps_count_no_spike() -> None:
    watch = Watch()
    for loss in [1.0] * (MIN_STEPS - 1) + [50.0]:
        watch.update(loss, 1.0)
    assert watch.loss_spikes == 0


def batch(tokens: int) -> PackedBatch:
    ids = SimpleNamespace(numel=lambda: tokens)
    return cast(
        PackedBatch, SimpleNamespace(pairs=range(2), input_ids=ids, logical_tokens=3 * tokens)
    )


def test_end_of_feed_is_not_data_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now)

    def feed() -> Iterator[int]:
        nonlocal now
        for step in range(4):
            now += 1.0
            yield step
        now += 50.0  # workers end

    counted = Clock(World())
    for _ in counted.time_waiting(feed()):
        now += 3.0
        counted.count_step([batch(100)])
    assert counted.stage()["time"] == {"data": 0.25}


def test_rates_mfu_and_time_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now)
    counted = Clock(World(), flops=lambda b: 10.0 * b.input_ids.numel(), peak=500.0)
    for _ in range(4):
        for name, seconds in (("forward", 1.0), ("backward", 2.0), ("optimiser", 0.5)):
            with counted.phase(name):
                now += seconds
        with counted.exclude("checkpoint"):
            now += 100.0  # not part of the throughput
        now += 0.5
        counted.count_step([batch(100)])
    row: dict[str, Any] = counted.row()
    assert row["pairs_per_second"] == 0.5 and row["tokens_per_second_per_gpu"] == 25.0
    assert row["logical_tokens_per_second"] == 75.0
    assert row["mfu"] == 0.5  # 1000 FLOP in 4 s of 500 FLOP/s
    assert row["time/backward"] == 0.5 and row["time/other"] == 0.125
    assert row["peak_memory_gib"] > 0
    stage = counted.stage()
    assert stage["seconds_per_checkpoint"] == 100.0
    assert stage["time"] == {"forward": 0.25, "backward": 0.5, "optimiser": 0.125}

"""What the GPU check measures, and in which order: with stand-ins for clocks, graphs and devices,
as none of it can be timed here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import loss_peers
from bench.gpu import (
    ceilings,
    correctness,
    loss,
    report,
    sections,
    timing,
    tuning,
)
from bench.gpu.cases import VENDOR_SETTINGS
from bench.gpu.predictions import Span
from bench.gpu.units import NotHere, Setting
from bench.gpu.variants import using

pytestmark = pytest.mark.complete

GPU = Setting("cuda", False, "")
MINE = ["triton lean", "cuda rows", "cuda fused", "reference"]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variant of a GPU seems to run here; units are only listed."""
    for module in (loss, correctness):
        monkeypatch.setattr(module, "variants", lambda device: MINE)


def keys(units: list[Any]) -> list[str]:
    return [unit.key for unit in units]


# --- order ----------------------------------------------------------------------------------------


def test_the_full_check_times_the_headline_first_and_peers_last(card: None) -> None:
    found = keys(loss.units(GPU))
    assert len(found) == len(set(found))
    headline = "7B T=8192, frozen head, reference on-line: "
    assert found[:3] == [headline + name for name in MINE[:3]]
    for T in loss.TOKENS:
        for model in loss.HEADS:
            here = [key for key in found if key.startswith(f"{model} T={T}, ")]
            providers = [key.rpartition(": ")[2] for key in here]
            last_of_ours = max(i for i, name in enumerate(providers) if name in report.OURS)
            eager = [i for i, name in enumerate(providers) if name == "eager"]
            peers = [i for i, name in enumerate(providers) if name in loss.PEER_ORDER]
            assert last_of_ours < min(eager) < max(eager) < min(peers)
    assert {*loss.PEER_ORDER, loss.EAGER, loss.QUACK} == set(loss_peers.PEERS)


def test_the_first_plan_measures_ours_then_profiles_then_log_probs(card: None) -> None:
    found = loss.headline_units(GPU)
    assert [unit.phase for unit in found] == ["loss"] * 3 + ["profile"] * 3 + ["loss"] * 3
    assert [unit.variant for unit in found[-3:]] == [*MINE[:3]]
    assert {unit.variant for unit in found[3:6]} == {"profiler"}, "it may hang without them"
    heads = keys(loss.heads_units(GPU))
    assert heads[0] == "7B T=8192, trained head, reference on-line: triton lean"
    assert [key.partition(",")[0] for key in heads] == [
        *["7B T=8192"] * 3, *["3B T=8192"] * 3, *["0.5B T=8192"] * 3,
    ]  # fmt: skip
    names = [key.rpartition(": ")[2] for key in keys(loss.peers_units(GPU))]
    peers = ["trl chunked", "Liger fused DPO", "cut-cross-entropy"]
    assert names == ["eager"] * 2 + peers + ["eager"] * 2 + peers, "the one that may hang last"


def test_red_and_hung_variants_are_not_timed_and_the_fastest_comes_first(card: None) -> None:
    setting = Setting(
        "cuda", False, "", red=("triton lean",), hung=("cuda fused",), best=("cuda fused",)
    )
    assert loss.sound(setting) == ["cuda fused", "cuda rows"]
    found = loss.headline_units(setting)
    assert not any(unit.variant == "triton lean" for unit in found)
    profiles = keys([unit for unit in found if unit.phase == "profile"])
    assert [key.rpartition(": ")[2] for key in profiles] == ["cuda rows"]
    assert not any(setting.runs(unit) for unit in found if unit.variant == "cuda fused")


def test_device_rules_begin_with_the_fastest_and_the_winner_with_what_tells_most(
    card: None,
) -> None:
    setting = Setting("cuda", False, "", best=("cuda rows", "triton lean", "reference"))
    rules = correctness.rules_units(setting)
    count = len(correctness.DEVICE_RULES) + 1
    assert [unit.variant for unit in rules] == ["cuda rows"] * count + ["triton lean"] * count
    names = {unit.key.partition(": ")[2] for unit in rules}
    assert {"a captured graph", "T x V past 2^31", "same bits every run"} <= names
    winner = correctness.winner_units(setting)
    assert {unit.variant for unit in winner} == {"cuda rows"}
    every = [unit for unit in correctness.units(setting) if unit.variant == "cuda rows"]
    assert sorted(keys(winner)) == sorted(keys(every)), "nothing is left out"
    assert "D=3584" in "".join(keys(winner[:5])) and "bfloat16" in winner[0].key
    assert any(word in winner[-1].key for word in ("float16", "float32"))


def test_the_products_at_every_chunk_are_measured_under_both_settings() -> None:
    figures = ceilings.head_products("cpu", True, 8)
    want = {f"{name}, {how}" for name in ("H W^T", "P W") for how in VENDOR_SETTINGS}
    assert set(figures["flops_per_second"]) == want and figures["rows"] == 8
    found = keys(ceilings.machine_units(GPU))
    assert found[0] == "machine" and "float16 product" not in found[:2]
    rows = [key for key in found if key.startswith("products")]
    assert len(rows) == len(ceilings.ROWS) == 7 and {3328, 3584} < set(ceilings.ROWS)
    record = {"phase": "products", "status": "ok", **figures}
    assert "P W, fp32 sums" in sections.products([record])[1]


# --- the floor and the clock ----------------------------------------------------------------------


def test_the_faster_floor_of_two_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    allowed = "allow_bf16_reduced_precision_reduction"

    def floor() -> None:
        seen.append(bool(getattr(torch.backends.cuda.matmul, allowed)))

    def in_turn(runs: dict[str, Any], device: str, rounds: int) -> dict[str, Any]:
        for run in runs.values():
            run()
        medians = {"floor, vendor default": 2.0, "floor, fp32 sums": 1.6, "op": 2.4}
        return {name: {"median": medians[name]} for name in runs}

    monkeypatch.setattr(loss, "in_turn", in_turn)
    before = bool(getattr(torch.backends.cuda.matmul, allowed))
    figures = loss.beside_floor(floor, lambda: None, 8e12, "cpu", 3)
    assert seen == [before, False]
    assert figures["floors"] == {"vendor default": 2.0, "fp32 sums": 1.6}
    assert figures["floor_seconds"] == 1.6 and figures["ratio_to_floor"] == 2.4 / 1.6
    assert figures["floor_flops_per_second"] == 8e12 / 1.6
    assert figures["timed_by"] == timing.EVENTS, "the host runs ahead of a large op"
    assert "1600.000 ms with fp32 sums" in sections.floors(figures)


def test_small_sizes_are_timed_by_replayed_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        def replay(self) -> None: ...

    captured = []
    monkeypatch.setattr(timing, "captured", lambda run: captured.append(run) or Graph())
    monkeypatch.setattr(
        timing, "in_turn", lambda runs, device, rounds: {n: {"median": 1.0} for n in runs}
    )
    figures = loss.beside_floor(lambda: None, lambda: None, 1e12, "cuda", 3)
    assert len(captured) == 3 and figures["timed_by"] == timing.GRAPHS
    assert "fresh_process" not in figures

    def fails(run: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(timing, "captured", fails)
    figures = loss.beside_floor(lambda: None, lambda: None, 1e12, "cuda", 3)
    assert figures["timed_by"].startswith("events; no graph: RuntimeError: operation not permitted")
    assert figures["seconds"] == 1.0 and figures["fresh_process"] is True
    assert "Timed by events" in sections.floors(figures)


def test_log_probs_alone_take_the_public_function(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def linear_logprobs(*arguments: Any, impl: str) -> torch.Tensor:
        called.append(impl)
        return torch.zeros(1)

    monkeypatch.setattr(loss, "linear_logprobs", linear_logprobs)
    for provider in ("triton lean", "cpu"):
        called.clear()
        figures = loss.lse_only(provider, "tiny", (8, 16, 50), "cpu", 3)
        assert set(called) == {provider.partition(" ")[0]}
        assert figures["provider"] == provider and figures["case"] == loss.LSE_ONLY


def test_a_path_of_cuda_is_forced() -> None:
    from cpo_fast.loss import cuda

    with using("triton lean") as impl:
        assert impl == "triton"
    with using("cuda fused") as impl:
        assert impl == "cuda" and cuda._forced == "fused"


# --- peers, settings ------------------------------------------------------------------------------


def test_liger_is_not_compiled_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def module(online: bool, compiled: bool) -> Any:
        asked.append(compiled)
        return lambda *_, **__: (torch.zeros(()),)

    monkeypatch.setattr(loss_peers, "_liger_module", module)
    hidden = torch.zeros(8, 4)
    for is_cuda in (True, False):
        states = SimpleNamespace(is_cuda=is_cuda, shape=hidden.shape, view=hidden.view)
        problem: Any = SimpleNamespace(
            online=True, hidden=states, ref_hidden=hidden, weight=hidden, labels=torch.zeros(8)
        )
        loss_peers.liger(problem)
    assert asked == [False, True]


def test_settings_are_fixed_beforehand_and_each_says_what_is_expected(card: None) -> None:
    rooms = {t.room_mib for t in tuning.TUNINGS if t.room_mib and t.model == "7B"}
    assert rooms == {1024, 1190, 2048, 4096}
    assert all(len(t.expected) > 20 for t in tuning.TUNINGS)
    from bench.gpu.kit import VARIANTS

    assert set(tuning.BUILDS) <= set(VARIANTS)
    found = tuning.units(GPU)
    assert [unit.phase for unit in found[:3]] == ["loss"] * 3, "as it is, first"
    assert {unit.phase for unit in found[3:]} == {"tuning"}
    assert len(found) + len(tuning.build_units(GPU)) == 3 + len(tuning.TUNINGS)
    # A room is tried on another variant where its own is red; a tile and a build are not.
    red = Setting("cuda", False, "", red=("triton lean", "cuda fused"))
    providers = {unit.key.rpartition(": ")[2] for unit in tuning.units(red)[1:]}
    assert providers == {"cuda rows"} and tuning.build_units(red) == []


def test_a_room_and_a_tile_are_in_force_while_it_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import os

    from cpo_fast.kernels import lean_rows

    seen = []

    def measure(*arguments: Any) -> dict[str, Any]:
        room = os.environ.get("CPO_FAST_WORKSPACE_MIB")
        seen.append((arguments[0], arguments[1], room, lean_rows._forced))
        return {"seconds": 1.0, "ratio_to_floor": 1.1}

    monkeypatch.setattr(loss, "measure", measure)
    monkeypatch.delenv("CPO_FAST_WORKSPACE_MIB", raising=False)
    for one in tuning.TUNINGS[4], next(t for t in tuning.TUNINGS if t.tile):
        figures = tuning.measure(one, "triton lean", GPU)
        assert figures["expected"] == one.expected and figures["provider"] == "triton lean"
    assert seen == [("triton lean", "0.5B", "1024", None), ("triton lean", "7B", None, (512, 16))]
    monkeypatch.delenv("CPO_FAST_GPU_KIT", raising=False)
    with pytest.raises(NotHere, match="kit"):
        tuning.measure(tuning.TUNINGS[-1], "cuda fused", GPU)


def test_predicted_stands_beside_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def predicted(device: str, provider: str, case: str, model: str) -> Span | None:
        asked.append((device, provider, case, model))
        return Span(36.0, 37.5) if provider == "triton lean" else None

    monkeypatch.setattr(report, "predicted", predicted)
    one = {
        "phase": "loss", "key": "k: triton lean", "status": "ok", "provider": "triton lean",
        "model": "7B", "case": "frozen head, reference on-line", "tokens": 8192, "hidden": 3584,
        "vocabulary": 152064, "seconds": 0.0365, "ratio_to_floor": 1.07, "floor_seconds": 0.034,
        "floor_flops_per_second": 7.9e14, "errors": {}, "unit_seconds": 1.0,
        "times": {"op": {"least": 0.036, "most": 0.037}},
    }  # fmt: skip
    machine = {
        "phase": "environment", "status": "ok", "key": "machine", "unit_seconds": 1.0,
        "device": "NVIDIA H100", "commit": "abc", "changed_files": 0, "versions": {},
    }  # fmt: skip
    other = {**one, "tokens": 1024}, {**one, "provider": "eager"}
    data = {"started": "now", "records": [machine, one, *other], "not_run": []}
    assert "predicted 36 to 37.5 ms" in report.short(data)
    assert report.render(data).count("| 36 to 37.5 |") == 1, "not for other sizes and providers"
    assert asked[0] == ("NVIDIA H100", "triton lean", "frozen head, reference on-line", "7B")
    monkeypatch.setattr(report, "predicted", lambda *_: None)
    assert "predicted 36" not in report.short(data)

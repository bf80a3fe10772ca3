"""What the GPU check measures, and in which order, with fake clocks, graphs and devices: tests time
nothing."""

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
from bench.gpu.variants import force_variant
from tests.bench.records import GPU, list_keys, make_machine, make_timing

pytestmark = pytest.mark.complete

MINE = ["triton lean", "cuda rows", "cuda fused", "reference"]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists units as if every GPU variant were available."""
    for module in (loss, correctness):
        monkeypatch.setattr(module, "list_variants", lambda device: MINE)


# --- order ----------------------------------------------------------------------------------------


def test_the_full_check_times_the_headline_first_and_peers_last(card: None) -> None:
    found = list_keys(loss.list_units(GPU))
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
    found = loss.list_headline_units(GPU)
    assert [unit.phase for unit in found] == ["loss"] * 3 + ["profile"] * 3 + ["loss"] * 3
    assert [unit.variant for unit in found[-3:]] == MINE[:3]
    assert {unit.variant for unit in found[3:6]} == {"profiler"}, "its timeout affects no variant"
    heads = list_keys(loss.list_head_units(GPU))
    assert heads[0] == "7B T=8192, trained head, reference on-line: triton lean"
    assert [key.partition(",")[0] for key in heads] == [
        *["7B T=8192"] * 3, *["3B T=8192"] * 3, *["0.5B T=8192"] * 3,
    ]  # fmt: skip
    names = [key.rpartition(": ")[2] for key in list_keys(loss.list_peer_units(GPU))]
    peers = ["trl chunked", "Liger fused DPO", "cut-cross-entropy"]
    assert names == ["eager"] * 2 + peers + ["eager"] * 2 + peers, "the peer that can hang is last"


def test_red_and_hung_variants_are_not_timed_and_the_fastest_comes_first(card: None) -> None:
    setting = Setting(
        "cuda", False, "", red=("triton lean",), hung=("cuda fused",), best=("cuda fused",)
    )
    assert loss.list_sound(setting) == ["cuda fused", "cuda rows"]
    found = loss.list_headline_units(setting)
    assert not any(unit.variant == "triton lean" for unit in found)
    profiles = list_keys([unit for unit in found if unit.phase == "profile"])
    assert [key.rpartition(": ")[2] for key in profiles] == ["cuda rows"]
    assert not any(setting.runs(unit) for unit in found if unit.variant == "cuda fused")


def test_fastest_variant_and_most_informative_checks_come_first(
    card: None,
) -> None:
    setting = Setting("cuda", False, "", best=("cuda rows", "triton lean", "reference"))
    rules = correctness.list_rule_units(setting)
    count = len(correctness.DEVICE_RULES) + 1
    assert [unit.variant for unit in rules] == ["cuda rows"] * count + ["triton lean"] * count
    names = {unit.key.partition(": ")[2] for unit in rules}
    assert {"a captured graph", "T x V past 2^31", "same bits every run"} <= names
    winner = correctness.list_winner_units(setting)
    assert {unit.variant for unit in winner} == {"cuda rows"}
    every = [unit for unit in correctness.list_units(setting) if unit.variant == "cuda rows"]
    assert sorted(list_keys(winner)) == sorted(list_keys(every)), "every check is listed"
    assert "D=3584" in "".join(list_keys(winner[:5])) and "bfloat16" in winner[0].key
    assert any(word in winner[-1].key for word in ("float16", "float32"))


def test_products_are_measured_with_both_settings() -> None:
    figures = ceilings.measure_head_products("cpu", True, 8)
    want = {f"{name}, {how}" for name in ("H W^T", "P W") for how in VENDOR_SETTINGS}
    assert set(figures["flops_per_second"]) == want and figures["rows"] == 8
    found = list_keys(ceilings.list_machine_units(GPU))
    assert found[0] == "machine" and "float16 product" not in found[:2]
    rows = [key for key in found if key.startswith("products")]
    assert len(rows) == len(ceilings.ROWS) == 7 and {3328, 3584} < set(ceilings.ROWS)
    record = {"phase": "products", "status": "ok", **figures}
    assert "P W, fp32 sums" in sections.make_products_part([record])[1]


# --- the floor and the clock ----------------------------------------------------------------------


def test_the_faster_floor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    allowed = "allow_bf16_reduced_precision_reduction"

    def floor() -> None:
        seen.append(bool(getattr(torch.backends.cuda.matmul, allowed)))

    def time_in_turn(runs: dict[str, Any], device: str, rounds: int) -> dict[str, Any]:
        for run in runs.values():
            run()
        medians = {"floor, vendor default": 2.0, "floor, fp32 sums": 1.6, "op": 2.4}
        return {name: {"median": medians[name]} for name in runs}

    monkeypatch.setattr(loss, "time_in_turn", time_in_turn)
    before = bool(getattr(torch.backends.cuda.matmul, allowed))
    figures = loss.time_beside_floor(floor, lambda: None, 8e12, "cpu", 3)
    assert seen == [before, False]
    assert figures["floors"] == {"vendor default": 2.0, "fp32 sums": 1.6}
    assert figures["floor_seconds"] == 1.6 and figures["ratio_to_floor"] == 2.4 / 1.6
    assert figures["floor_flops_per_second"] == 8e12 / 1.6
    assert figures["timed_by"] == timing.EVENTS, "a large op is not bound by launches"
    assert "1600.000 ms with fp32 sums" in sections.describe_floors(figures)


def test_small_sizes_are_timed_by_replayed_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        def replay(self) -> None: ...

    runs = []
    monkeypatch.setattr(timing, "capture_graph", lambda run: runs.append(run) or (Graph(), None))
    monkeypatch.setattr(
        timing, "time_in_turn", lambda runs, device, rounds: {n: {"median": 1.0} for n in runs}
    )
    figures = loss.time_beside_floor(lambda: None, lambda: None, 1e12, "cuda", 3)
    assert len(runs) == 3 and figures["timed_by"] == timing.GRAPHS
    assert "fresh_process" not in figures

    def fail(run: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(timing, "capture_graph", fail)
    figures = loss.time_beside_floor(lambda: None, lambda: None, 1e12, "cuda", 3)
    assert figures["timed_by"].startswith("events; no graph: RuntimeError: operation not permitted")
    assert figures["seconds"] == 1.0 and figures["fresh_process"] is True
    assert "Timed by events" in sections.describe_floors(figures)


def test_log_probs_alone_use_the_public_function(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def linear_logprobs(*arguments: Any, impl: str) -> torch.Tensor:
        called.append(impl)
        return torch.zeros(1)

    monkeypatch.setattr(loss, "linear_logprobs", linear_logprobs)
    for provider in ("triton lean", "cpu"):
        called.clear()
        figures = loss.measure_lse(provider, "tiny", (8, 16, 50), "cpu", 3)
        assert set(called) == {provider.partition(" ")[0]}
        assert figures["provider"] == provider and figures["case"] == loss.LSE_ONLY


def test_a_cuda_path_is_forced() -> None:
    from cpo_fast.loss import cuda

    with force_variant("triton lean") as impl:
        assert impl == "triton"
    with force_variant("cuda fused") as impl:
        assert impl == "cuda" and cuda._forced == "fused"


# --- peers, settings ------------------------------------------------------------------------------


def test_liger_is_not_compiled_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def build_liger(online: bool, compiled: bool) -> Any:
        asked.append(compiled)
        return lambda *_, **__: (torch.zeros(()),)

    monkeypatch.setattr(loss_peers, "_build_liger", build_liger)
    hidden = torch.zeros(8, 4)
    for is_cuda in (True, False):
        states = SimpleNamespace(is_cuda=is_cuda, shape=hidden.shape, view=hidden.view)
        problem: Any = SimpleNamespace(
            online=True, hidden=states, ref_hidden=hidden, weight=hidden, labels=torch.zeros(8)
        )
        loss_peers.compute_liger(problem)
    assert asked == [False, True]


def test_tuning_settings_are_fixed_and_have_expectations(card: None) -> None:
    rooms = {t.room_mib for t in tuning.TUNINGS if t.room_mib and t.model == "7B"}
    assert rooms == {1024, 1190, 2048, 4096}
    assert all(len(t.expected) > 20 for t in tuning.TUNINGS)
    from bench.gpu.kit import VARIANTS

    assert set(tuning.BUILDS) <= set(VARIANTS)
    found = tuning.list_units(GPU)
    assert [unit.phase for unit in found[:3]] == ["loss"] * 3, "defaults first"
    assert {unit.phase for unit in found[3:]} == {"tuning"}
    assert len(found) + len(tuning.list_build_units(GPU)) == 3 + len(tuning.TUNINGS)
    # If a setting's variant is red, only workspace sizes are timed with another variant.
    red = Setting("cuda", False, "", red=("triton lean", "cuda fused"))
    providers = {unit.key.rpartition(": ")[2] for unit in tuning.list_units(red)[1:]}
    assert providers == {"cuda rows"} and tuning.list_build_units(red) == []


def test_workspace_and_tile_are_set_during_a_measurement(
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


def test_reports_list_predictions_with_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def predict(device: str, provider: str, case: str, model: str) -> Span | None:
        asked.append((device, provider, case, model))
        return Span(36.0, 37.5) if provider == "triton lean" else None

    monkeypatch.setattr(report, "predict", predict)
    one = make_timing("triton lean", 36.5, ratio_to_floor=1.07)
    machine = make_machine("NVIDIA H100", commit="abc")
    other = {**one, "tokens": 1024}, {**one, "provider": "eager"}
    data = {"started": "now", "records": [machine, one, *other], "not_run": []}
    assert "predicted 36 to 37.5 ms" in report.make_summary(data)
    assert report.render(data).count("| 36 to 37.5 |") == 1, "none for other sizes and providers"
    assert asked[0] == ("NVIDIA H100", "triton lean", "frozen head, reference on-line", "7B")
    monkeypatch.setattr(report, "predict", lambda *_: None)
    assert "predicted 36" not in report.make_summary(data)

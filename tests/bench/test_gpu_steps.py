"""Training steps of the GPU check, their profiles, and attention against float32, with a fake card
where needed."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import step_sizes
from bench.gpu import attention, kernel_times, report, sections, steps
from bench.gpu.cases import CLASSES
from bench.gpu.units import NotHere, Setting
from cpo_fast.model import windows
from cpo_fast.model.packed import PackedModel
from tests.bench.records import GPU, list_keys

pytestmark = pytest.mark.complete

ROOT = Path(__file__).resolve().parents[2]
MAIN = ("ours, fused", "ours")
MADE = ("auto", "auto, fused", "gathered", "varlen")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replaces bench.step_sizes.run on a card of 80 GB; its calls: (size, peers, with_ours,
    options)."""
    calls: list[Any] = []

    def run(size: str, **options: Any) -> dict[str, Any]:
        on_measured = options.pop("on_measured")
        given = {
            k: options[k] for k in ("attention", "compile", "fused", "trl_batch") if k in options
        }
        calls.append((size, options["peers"], options["with_ours"], given))
        kinds = (*(("ours",) if options["with_ours"] else ()), *options["peers"])
        figures = {"loss": 0.6931, "pairs_per_second": 1.0, "seconds": 2.0}
        if on_measured is not None:
            on_measured(kinds[0], lambda: calls.append("profiled") or 0.0)
        return {"size": size, "steps": {kind: dict(figures) for kind in kinds}}

    monkeypatch.setattr(step_sizes, "run", run)
    monkeypatch.setattr(steps, "is_missing", lambda name: False)
    monkeypatch.setattr(steps, "release", lambda device: steps._measured.clear() or 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=80e9)
    )
    return calls


def test_each_kind_of_step_is_a_separate_unit(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = steps.list_plan_units(GPU)
    assert [(unit.key, unit.limit) for unit in found] == [
        ("imports", 60),
        ("7B: ours, fused", 60),
        ("profile of the step of 7B: ours, fused", 30),
        ("7B: ours", 60),
        ("profile of the step of 7B: ours", 30),
        ("7B: trl in batches of 4", 70),  # eight pairs of trl do not fit 80 GB at 7B
        ("3B: ours, fused", 50),
        ("3B: ours", 50),
        ("3B: trl in batches of 8", 50),
        ("7B: ours, gathered", 50),
        ("7B: ours, flex", 50),
    ]
    timed = [unit for unit in found if unit.phase == "steps"]
    names = [next(iter(unit.run()["steps"])) for unit in timed]
    assert names == [
        *("ours, fused", "ours", "trl", "ours, fused", "ours", "trl"),
        *("ours, gathered", "ours, flex"),
    ]
    assert calls == [  # other options keep PackedModel's defaults
        ("7B", (), True, {"fused": True}),
        ("7B", (), True, {}),
        ("7B", ("trl",), False, {"trl_batch": 4}),
        ("3B", (), True, {"fused": True}),
        ("3B", (), True, {}),
        ("3B", ("trl",), False, {"trl_batch": 8}),
        ("7B", (), True, {"attention": "gathered"}),
        ("7B", (), True, {"attention": "flex"}),
    ]
    whole = [
        key.partition(": ")[2].partition(" ")[0] for key in list_keys(steps.list_units(GPU)[1:])
    ]
    assert whole == ["ours"] * 2 + ["ours,", "ours", "ours,"] + ["trl"] * 4 + [
        *("unshared", "unshared", "ours,")
    ]

    trl = found[5]

    def fail(size: str, **options: Any) -> dict[str, Any]:
        return {"size": size, "steps": {"trl": {"error": "OutOfMemoryError: too large"}}}

    monkeypatch.setattr(step_sizes, "run", fail)
    with pytest.raises(RuntimeError, match="too large"):
        trl.run()
    monkeypatch.setattr(steps, "is_missing", lambda name: name == "trl")
    with pytest.raises(NotHere, match="trl is not installed"):
        trl.run()


@pytest.mark.parametrize(
    ("red", "hung", "want"),
    [
        # A timed-out check is also red; the default and its variants are still timed.
        (("auto", "flex"), ("auto", "flex"), [*MAIN, *MAIN, "ours, gathered"]),
        (("auto, fused",), (), ["ours", "ours", "ours, gathered", "ours, flex"]),
        (("auto",), (), ["ours, gathered", "ours, gathered", "ours, flex"]),
    ],
)
def test_steps_with_wrong_attention_are_omitted(
    red: tuple[str, ...], hung: tuple[str, ...], want: list[str], calls: list[Any]
) -> None:
    names = (tuple(f"attention {name}" for name in found) for found in (red, hung))
    setting = Setting("cuda", False, "", *names)
    found = [unit.key for unit in steps.list_plan_units(setting) if unit.phase == "steps"]
    assert [key.partition(": ")[2] for key in found if "trl" not in key] == want


def test_a_step_uses_the_default_attention() -> None:
    run, model = (
        inspect.signature(made).parameters["attention"].default
        for made in (step_sizes.run, PackedModel)
    )
    assert run == model == "auto"


def test_a_step_is_profiled_with_the_model_that_was_timed(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def profile(run: Any, device: str, **options: Any) -> dict[str, Any]:
        run()
        asked.append(options)
        return {"seconds": 1.5, "classes": {}, "kernels": []}

    monkeypatch.setattr(kernel_times, "profile", profile)
    _, timed, profiled, *others = steps.list_plan_units(GPU)
    with pytest.raises(NotHere, match="not timed"):
        profiled.run()  # in a fresh process
    timed.run()
    figures = profiled.run()
    assert figures["provider"] == "ours, fused"
    assert (figures["seconds"], figures["wall_seconds"]) == (1.5, 2.0)
    assert calls[-1] == "profiled" and asked == [{"calls": 1, "warm": False, "host": False}]
    assert profiled.variant == "profiler" and not steps._measured
    with pytest.raises(NotHere, match="not timed"):
        profiled.run()
    monkeypatch.setattr(steps, "release", lambda device: 20_000_000_000)
    assert others[3].run()["fresh_process"], "a process that holds memory is replaced"


def test_kernels_are_classified_by_name() -> None:
    names = {
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT": "products",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas": "products",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>(...)": "products",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(...)": "products",
        "void gemmSN_NN_kernel<float, 128, 2, 4, 8, 2, 4>(...)": "products",
        "triton_tem_fused_mm_3": "products",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64>>()": "attention",
        "void pytorch_flash::flash_bwd_convert_dq_kernel<...>()": "attention",
        "fmha_cutlassB_bf16_aligned_64x64_k128_dropout_sm80(...)": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob": "attention",
        "triton_tem_fused_flex_attention_0": "attention",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<"
        "c10::BFloat16>>(int)": "elementwise",
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<"
        "at::native::BinaryFunctor<float, float, float, MulFunctor>>>": "elementwise",
        "void at::native::vectorized_elementwise_kernel<4, rsqrt_kernel_cuda>": "elementwise",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...>": "elementwise",
        "triton_poi_fused__to_copy_mul_silu_2": "elementwise",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>": "reductions",
        "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0": "reductions",
        "triton_per_fused_mean_1": "reductions",
        "void (anonymous namespace)::softmax_warp_forward<float, float, 10>": "reductions",
        "Memcpy DtoD (Device -> Device)": "copies and casts",
        "Memset (Device)": "copies and casts",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda("
        "at::TensorIteratorBase&)::{lambda()#3}>": "copies and casts",
        "void at::native::vectorized_elementwise_kernel<4, at::native::"
        "bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)>": "copies and casts",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<...>": "copies and casts",
        "void at::native::vectorized_elementwise_kernel<4, FillFunctor<float>>": "copies and casts",
        "void at::native::indexSelectLargeIndex<c10::BFloat16, long>": "copies and casts",
        "lean_rows_kernel": "ours",
        "segment_sums_kernel_0d1d2d": "ours",
        "void cpo::(anonymous namespace)::row_cluster<__nv_bfloat16, true>(cpo::Rows)": "ours",
        "_ZN3cpo12_GLOBAL__N_19row_scaleE": "ours",
        "void at::native::(anonymous namespace)::distribution_nullary": "other",
    }
    assert {name: kernel_times.classify_kernel(name) for name in names} == names
    assert set(names.values()) == set(CLASSES)


def test_every_triton_kernel_of_ours_is_listed() -> None:
    text = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    here = set(re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE))
    assert len(here) >= 6 and here == set(kernel_times.OURS)


def test_a_profile_adds_up_by_class() -> None:
    x, calls = torch.randn(64, 64), []

    def run() -> None:
        calls.append(1)
        ((x @ x) + 1).softmax(-1)

    found = kernel_times.profile(run, "cpu", calls=2, warm=False)
    assert len(calls) == 2 and set(found["classes"]) == set(CLASSES)
    assert sum(found["classes"].values()) == pytest.approx(found["seconds"])
    assert all(found["classes"][kind] > 0 for kind in ("products", "elementwise", "reductions"))


def test_steps_of_ours_and_of_trl_are_compared_across_records() -> None:
    def make_record(key: str, **figures: Any) -> dict[str, Any]:
        base = {"phase": "steps", "status": "ok", "size": "7B", "key": key, "device": "H100"}
        return {**base, "steps": figures, "pairs": 32, "dtype": "bfloat16", "attention": "sdpa"}

    def make_ours(name: str, rate: float, mfu: float, loss: float = 0.69) -> dict[str, Any]:
        figures = {"pairs_per_second": rate, "mfu": mfu, "loss": loss}
        return make_record(f"7B: {name}", **{name: figures})

    records = [
        make_ours("ours", 9.0, 0.5),
        make_record("7B: trl in batches of 8", trl={"pairs_per_second": 2.0}),
        make_record("7B: trl in batches of 4", trl={"pairs_per_second": 2.5}),
    ]
    what = "step of 7B, best of ours (ours)"
    assert report.list_targets(records) == [
        [f"{what}: MFU", ">= 45 %", "50%"],
        [f"{what} v trl", ">= 3 x", "3.60 x"],
    ]
    assert report.list_targets(records[:1]) == [[f"{what}: MFU", ">= 45 %", "50%"]]
    assert report.list_targets(records[1:]) == []
    # Our fastest step counts unless its loss or attention is wrong.
    more = [make_ours("ours, compiled", 10.0, 0.6), make_ours("ours, flex", 12.0, 0.7)]
    failed = {
        "phase": "correctness", "key": "attention flex: against float32", "reason": "wrong",
        "status": "failed",
    }  # fmt: skip
    found = [*records, *more, failed, make_ours("ours, gathered", 20.0, 0.9, loss=0.8)]
    assert report.list_targets(found) == [
        ["step of 7B, best of ours (ours, compiled): MFU", ">= 45 %", "60%"],
        ["step of 7B, best of ours (ours, compiled) v trl", ">= 3 x", "4.00 x"],
    ]
    title, _, table = sections.make_steps_part([*records, *more])
    assert title == "## Steps of 7B"
    names = [line.split(" | ")[0] for line in table.splitlines()[2:]]
    assert names == [
        *("| ours", "| trl in batches of 8", "| trl in batches of 4", "| ours, compiled"),
        "| ours, flex",
    ]


@pytest.mark.parametrize("name", ["auto", "gathered"])
def test_attention_is_compared_with_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = attention.check(name, "cpu", True)
    assert len(figures["errors"]) == 4 and max(figures["errors"].values()) < 1e-5
    known = attention.prepare("cpu")
    assert len(known.batch.image_grid_thw.unique(dim=0)) == 3, "images of different sizes"
    # The check fails for a pack whose first answer sees one token less.
    blind = dataclasses.replace(known.batch, branch_index=known.batch.branch_index.clone())
    first = int((known.batch.branch_index == 1).nonzero()[0])
    blind.branch_index[first] = 0
    monkeypatch.setattr(
        attention, "prepare", lambda device: dataclasses.replace(known, batch=blind)
    )
    with pytest.raises(AssertionError, match=r"error .*, allowed 1.00e-04"):
        attention.check(name, "cpu", True)


def test_the_truth_uses_transformers_window_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known, calls = attention.prepare("cpu"), []
    attend = windows.Windows.attend
    monkeypatch.setattr(
        windows.Windows, "attend", lambda *a, **k: calls.append(1) or attend(*a, **k)
    )
    attention.compute_outputs(known.model, known.batch, attention="sdpa", own_windows=True)
    assert not calls
    attention.compute_outputs(known.model, known.batch)
    assert calls


def test_unsupported_attention_is_skipped() -> None:
    imports, *found = attention.list_units(Setting("cpu", True, ""))
    assert imports.run() == {} and list_keys(found)[0] == "attention auto: against float32"
    assert {unit.phase for unit in found} == {"correctness"}
    assert [unit.variant for unit in found] == [
        f"attention {name}" for name in (*MADE, "flex", "auto, compiled")
    ]
    for unit in (found[1], *found[3:]):
        with pytest.raises(NotHere):
            unit.run()


@pytest.mark.slow
def test_a_peer_without_ours() -> None:
    options: dict[str, Any] = {"device": "cpu", "studies": 1, "side": 56, "rounds": 1}
    found = step_sizes.run("tiny", peers=("unpacked",), with_ours=False, **options)
    assert list(found["steps"]) == ["unpacked"]
    assert "ours_is_faster_by" not in found["steps"]["unpacked"]

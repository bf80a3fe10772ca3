"""Thinking and perception counterfactuals in one run (CPO++): weights and metrics per source."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cpo_fast.data import open_studies
from cpo_fast.errors import DataError, UsageError
from cpo_fast.model.build import add_lora
from cpo_fast.model.packed import PackedModel
from cpo_fast.packing import collate, encode_all, image_token_id
from cpo_fast.run.corpus import select_sources
from cpo_fast.testing.runs import parse_arguments, read_rows, read_rows_without_timing
from cpo_fast.testing.samples import image, images, preference, tokenizer, vision_language_model
from cpo_fast.train import main
from cpo_fast.training.objectives import CPOObjective
from cpo_fast.types import PackedBatch, PreferenceGroup
from tests.run.test_whole_runs import train

BOTH = {"thinking": 1.0, "perception": 1.0}
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
           "logps/chosen", "logps/rejected", "nll_loss")  # fmt: skip


@pytest.fixture(scope="module")
def model() -> PackedModel:
    made = add_lora(vision_language_model(), r=4, alpha=8)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return PackedModel(made)


@pytest.fixture(scope="module")
def groups() -> list[PreferenceGroup]:
    """Three thinking pairs and two perception pairs, one of these in a thinking group."""
    samples = [
        preference("a", 2, image(100, 80), words=3),
        preference("b", 1, image(60, 60), perception=image(120, 60)),
        preference("c", 2, image(80, 120), perception=image(56, 56)),
    ]
    return encode_all(samples, tokenizer(), images().grid, max_length=500).groups


def packed(groups: list[PreferenceGroup], *which: tuple[int, tuple[int, ...]]) -> PackedBatch:
    pad = image_token_id(tokenizer())
    return collate(groups, which, pixels=images().pixels, image_token_id=pad)


def everything(groups: list[PreferenceGroup]) -> PackedBatch:
    return packed(groups, (0, (0, 1)), (1, (0,)), (2, (0, 1)))


def row_of(objective: CPOObjective, batch: PackedBatch) -> dict[str, float]:
    with torch.no_grad():
        sums = objective.sum_losses(batch)[1]
        return objective.average({name: float(v) for name, v in sums.items()})


def adds_up(row: dict[str, float], weights: dict[str, float], prefix: str = "") -> None:
    """Metrics per source, weighted by pairs (the loss also by weight), sum to the total."""
    pairs = {name: row[f"{prefix}pairs/{name}"] for name in weights}
    held = [name for name, count in pairs.items() if count]
    for metric in METRICS:
        total = sum(pairs[name] * row[f"{prefix}{metric}/{name}"] for name in held)
        want = row[prefix + metric]
        assert total / sum(pairs.values()) == pytest.approx(want, rel=1e-6, abs=1e-7), metric
    shares = {name: weights[name] * pairs[name] for name in held}
    total = sum(share * row[f"{prefix}loss/{name}"] for name, share in shares.items())
    assert total / sum(shares.values()) == pytest.approx(row[f"{prefix}loss"], rel=1e-6)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "plackett_luce"])
def test_metrics_per_source_add_up_to_the_total(model: Any, groups: Any, loss_type: str) -> None:
    batch = everything(groups)
    assert sorted(batch.pair_sources) == ["perception"] * 2 + ["thinking"] * 3
    row = row_of(CPOObjective(model, loss_type=loss_type, source_weights=BOTH), batch)
    assert (row["pairs/thinking"], row["pairs/perception"]) == (3, 2)
    if loss_type != "plackett_luce":  # its loss is per group
        adds_up(row, BOTH)
    plain = row_of(CPOObjective(model, loss_type=loss_type), batch)
    assert {name: row[name] for name in plain} == plain  # weights of 1 have no effect


def test_source_weights_with_and_without_normalising(model: Any, groups: Any) -> None:
    weights = {"thinking": 0.5, "perception": 2.0}
    batch = everything(groups)
    normal = row_of(CPOObjective(model, source_weights=weights), batch)
    adds_up(normal, weights)
    scaled = row_of(CPOObjective(model, source_weights=weights, normalize=False), batch)
    own = [normal["loss/thinking"], normal["loss/perception"]]
    assert scaled["loss"] == pytest.approx((3 * 0.5 * own[0] + 2 * 2.0 * own[1]) / 5, rel=1e-6)
    doubled = {name: 2 * weight for name, weight in weights.items()}
    again = row_of(CPOObjective(model, source_weights=doubled), batch)
    assert again["loss"] == pytest.approx(normal["loss"], rel=1e-6)


def test_source_with_zero_weight_has_no_loss_and_gradient(model: Any, groups: Any) -> None:
    def gradients(objective: CPOObjective, batch: PackedBatch) -> tuple[float, list[torch.Tensor]]:
        model.model.zero_grad()
        loss = objective.sum_losses(batch)[0] / objective.weigh(batch)
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.model.parameters() if p.requires_grad]

    zero = CPOObjective(model, source_weights={"thinking": 1.0, "perception": 0.0})
    loss, found = gradients(zero, everything(groups))
    thinking = packed(groups, (0, (0, 1)), (2, (1,)))
    assert set(thinking.pair_sources) == {"thinking"}
    want, wanted = gradients(CPOObjective(model), thinking)
    assert loss == pytest.approx(want, rel=1e-6)
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)


def test_pairs_of_other_sources_are_left_out_and_counted(capsys: Any) -> None:
    given = [
        preference("a", 2, image(9, 9)),
        preference("b", 3, image(9, 9), perception=image(8, 8)),
        preference("c", 1, image(9, 9), perception=image(8, 8)),
    ]
    kept = select_sources(given, {"thinking": 1.0})
    assert [len(one.rejected) for one in kept] == [2, 2, 0]
    assert kept[1].rejected == given[1].rejected[1:] and not any(kept[1].rejected_images)
    assert "2 perception pairs left out" in capsys.readouterr().out
    assert select_sources(given, BOTH) == given


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--counterfactual_sources", "thinking,vision"],
            "vision: choose from thinking,perception",
        ),
        (["--thinking_weight", "-1"], "--thinking_weight -1: must be a finite"),
        (["--perception_weight", "nan"], "--perception_weight nan: must be"),
        (["--counterfactual_sources", "perception", "--perception_weight", "0"], "no pair is left"),
    ],
)
def test_unknown_sources_are_named(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_arguments(flags)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CPO with one source; the other runs use its SFT model."""
    folder = tmp_path_factory.mktemp("sources") / "plain"
    assert train(folder, "--stages", "graph,counterfactual,sft,cpo") == 0
    return folder


def cpo_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows_without_timing(folder) if row["stage"] == "cpo"]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "cpo" / "checkpoint-4" / "adapter_model.safetensors")


@pytest.mark.slow
def test_one_zero_weight_gives_plain_cpo_bit_for_bit(plain: Path, tmp_path: Path) -> None:
    flags = ["--counterfactual_sources", "thinking,perception", "--perception_weight", "0",
             "--sft_checkpoint", str(plain / "sft/checkpoint-6")]  # fmt: skip
    assert train(tmp_path / "zero", "--stages", "graph,counterfactual,cpo", *flags) == 0
    assert cpo_rows(tmp_path / "zero") == cpo_rows(plain)
    for name, value in adapter(plain).items():
        assert torch.equal(adapter(tmp_path / "zero")[name], value), name


@pytest.mark.slow
def test_phantom_run_with_both_sources(plain: Path, tmp_path: Path) -> None:
    weights = {"thinking": 1.0, "perception": 0.5}
    flags = ["--counterfactual_sources", "thinking,perception", "--perception_weight", "0.5",
             "--sft_checkpoint", str(plain / "sft/checkpoint-6")]  # fmt: skip
    stages = "graph,counterfactual,cpo,evaluate"
    assert train(tmp_path, "--stages", stages, *flags) == 0
    logged = [row for row in read_rows(tmp_path) if "loss" in row]
    assert len(logged) == 4 and any(row["pairs/perception"] for row in logged)
    for row in logged:
        assert row["pairs/thinking"] + row["pairs/perception"] == 8
        adds_up(row, weights)
    (*_, evaluated) = [row for row in read_rows(tmp_path) if "eval_loss" in row]
    adds_up(evaluated, weights, "eval_")
    summary = json.loads((tmp_path / "summary.json").read_text())
    counts = summary["data"]["counterfactual_sources"]
    passed = summary["data"]["counterfactuals"]["passed"]
    assert counts["perception"] > 50 and sum(counts.values()) == passed
    held_out = summary["evaluation"]["preference"]["cpo"]
    parts = held_out["sources"]
    assert parts["thinking"]["pairs"] + parts["perception"]["pairs"] == held_out["pairs"]
    before = summary["evaluation"]["preference"]["sft"]  # --sft_checkpoint is the reference
    assert before["pairs"] == held_out["pairs"] and before["sources"].keys() == parts.keys()
    page = (tmp_path / "report.html").read_text()
    assert "margin by source" in page and "CPO, perception" in page
    lines = [json.loads(line) for line in (tmp_path / "counterfactuals.jsonl").open()]
    split_of = {study.patient_id: study.split for study in open_studies(str(tmp_path / "data"))}
    for line in lines:
        if line["kind"] == "perception":  # an image of another patient of the same split
            (path,) = line["rejected_images"]
            assert (tmp_path / path).is_file()
            other, own = Path(path).parts[3], line["patient_id"]
            assert other != own and split_of[other] == split_of[own]


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["sigmoid", "plackett_luce"])
def test_swift_file_with_rejected_images(plain: Path, tmp_path: Path, loss_type: str) -> None:
    lines = [json.loads(line) for line in (plain / "counterfactuals.jsonl").open()]
    data = tmp_path / "swift.jsonl"
    with data.open("w") as file:
        for line, next_line, other in zip(lines, lines[1:], lines[2:], strict=False):
            chosen = {"role": "assistant", "content": f"<think> {line['report']} </think>"}
            row = {
                "id": line["study_id"],
                "messages": [{"role": "user", "content": "<image>What is seen?"}, chosen],
                "images": line["images"],
            }
            if next_line["study_id"] == line["study_id"]:  # two rows of one group
                for one in (line, next_line):
                    text = {"rejected_response": f"<think> {one['counterfactual']} </think>"}
                    file.write(json.dumps(row | text) + "\n")
                file.write(json.dumps(row | {"rejected_images": other["images"]}) + "\n")
    command = ["--dataset", str(data), "--image_root", str(plain), "--stages", "cpo",
               "--sft_checkpoint", str(plain / "sft/checkpoint-6"), "--max_pixels", "12544",
               "--max_steps", "2", "--per_device_train_batch_size", "6",
               "--gradient_accumulation_steps", "1", "--dataloader_num_workers", "0",
               "--loss_type", loss_type, "--output_dir", str(tmp_path / "out")]  # fmt: skip
    assert main(command) == 0
    found = [row for row in read_rows(tmp_path / "out") if "loss" in row]
    assert all(row["pairs/thinking"] + row["pairs/perception"] == 6 for row in found)
    assert any(row["pairs/thinking"] and row["pairs/perception"] for row in found)
    assert found[0]["loss/perception"] == pytest.approx(math.log(2), abs=1e-6)
    joint = found[0]["loss/thinking"]  # log(1 + K) for K rejected together, some groups are split
    assert joint == pytest.approx(math.log(2), abs=1e-6) if loss_type == "sigmoid" else joint > 0.8


def test_perception_requires_images(tmp_path: Path, capsys: Any) -> None:
    from cpo_fast.run.context import RunContext
    from cpo_fast.run.corpus import build_texts, read_corpus
    from cpo_fast.training.distributed import World
    from tests.counterfactual.samples import INFLATED, NORMAL, write_open_i

    data = write_open_i(tmp_path / "reports", (NORMAL, INFLATED))
    args = parse_arguments(
        ["--dataset", str(data), "--output_dir", str(tmp_path / "out"),
         "--counterfactual_sources", "thinking,perception"]
    )  # fmt: skip
    run = RunContext(args, World())
    with pytest.raises(DataError, match="no perception counterfactual passes"):
        build_texts(run, read_corpus(run))

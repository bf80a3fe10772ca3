"""Small whole runs: all stages, repetition, faults, single stages."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cpo_fast.errors import UsageError
from cpo_fast.run.run_folder import RunFolder
from cpo_fast.testing.runs import parse_arguments, read_rows, read_rows_without_timing
from cpo_fast.train import main
from cpo_fast.training.checkpoint import find_damage

pytestmark = pytest.mark.slow

SMALL = [
    "--max_pixels", "12544", "--packing_length", "1500", "--dataloader_num_workers", "0",
    "--sft_use_peft", "false", "--sft_per_device_train_batch_size", "8",
    "--sft_gradient_accumulation_steps", "1", "--sft_max_steps", "6",
    "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--max_steps", "4",
    "--learning_rate", "1e-3", "--sft_learning_rate", "1e-3", "--eval_steps", "2",
    "--max_new_tokens", "8", "--max_eval_samples", "6", "--lora_dropout", "0",
]  # fmt: skip


def train(folder: Path, *flags: str) -> int:
    return main(["--dataset", "phantom", "--num_studies", "90", "--output_dir", str(folder), *SMALL,
                 *flags])  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "a"
    assert train(folder) == 0
    return folder


def test_run_writes_the_documented_files(finished: Path) -> None:
    for name in (
        "config.json", "metrics.jsonl", "summary.json", "report.html", "counterfactuals.jsonl",
        "concept_graph.json", "rejected_records.jsonl", "sft/checkpoint-6/model.safetensors",
        "cpo/checkpoint-4/adapter_model.safetensors", "cpo/checkpoint-4/adapter_config.json",
        "cpo/checkpoint-4/tokenizer.json", "cpo/checkpoint-4/preprocessor_config.json",
    ):  # fmt: skip
        assert (finished / name).is_file(), name
    page = (Path(__file__).parents[2] / "docs/index.md").read_text(encoding="utf-8")
    listed = page.split("## What a run leaves")[1].split("```")[1]
    left = {path.name for path in finished.iterdir()}
    assert {"base", "data"} <= left
    assert not [name for name in left | {"manifest.json", "merged"} if name not in listed]
    assert not list(finished.rglob("*.bin")) and not list(finished.rglob("*.pt"))
    assert finished.stat().st_mode & 0o777 == 0o700
    for model in ("sft/checkpoint-6", "cpo/checkpoint-4"):
        card = (finished / model / "README.md").read_text(encoding="utf-8")
        assert card.startswith("---\nlibrary_name: ") and "### Diagnosis, overall" in card
        assert find_damage(finished / model) is None
    for private in ("counterfactuals.jsonl", "evaluation.json", "report.html"):
        assert (finished / private).stat().st_mode & 0o777 == 0o600


def test_export_of_a_run_has_a_model_card(finished: Path, tmp_path: Path) -> None:
    from cpo_fast.export import main as export

    flags = ["--merge", str(finished / "cpo" / "checkpoint-4"), "--output_dir", str(tmp_path / "m")]
    assert export(flags) == 0
    card = (tmp_path / "m" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n")
    assert "| Records read | 90 |" in card and "### Diagnosis, overall" in card


def test_policy_equals_reference_at_the_first_step(finished: Path) -> None:
    first = next(row for row in read_rows(finished) if row["stage"] == "cpo")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0


def test_metrics_have_standard_names(finished: Path) -> None:
    logged = [row for row in read_rows(finished) if row["stage"] == "cpo" and "loss" in row]
    assert [row["step"] for row in logged] == [1, 2, 3, 4]
    expected = {"loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "rewards/chosen",
                "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
                "logps/rejected", "nll_loss", "tokens_per_second_per_gpu",
                "pairs_per_second"}  # fmt: skip
    assert expected <= logged[-1].keys()
    evaluated = [row for row in read_rows(finished) if "eval_loss" in row and row["stage"] == "cpo"]
    assert [row["step"] for row in evaluated] == [2, 4]
    assert "eval_rewards/accuracies" in evaluated[0]


def test_summary_has_the_documented_keys(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert {"stages", "evaluation", "data", "versions"} <= summary.keys()
    cpo = summary["stages"]["cpo"]
    assert {"steps", "seconds", "pairs_per_second", "physical_tokens_per_second",
            "logical_tokens_per_second", "final"} <= cpo.keys()  # fmt: skip
    assert cpo["logical_tokens_per_second"] > cpo["physical_tokens_per_second"]
    assert 0 < cpo["packing_efficiency"] <= 1
    assert summary["data"]["read"] == 90
    assert set(summary["evaluation"]["classification"]) == {"majority", "untrained", "sft", "cpo"}


def test_checkpoints_load_in_transformers_and_peft(finished: Path) -> None:
    from peft import PeftModel
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    sft = finished / "sft" / "checkpoint-6"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(sft)
    tokenizer = AutoTokenizer.from_pretrained(finished / "cpo" / "checkpoint-4")
    tuned = PeftModel.from_pretrained(model, finished / "cpo" / "checkpoint-4")
    ids = tokenizer("FINDINGS: The heart", return_tensors="pt").input_ids
    with torch.no_grad():
        adapted = tuned(input_ids=ids).logits
        with tuned.disable_adapter():
            reference = tuned(input_ids=ids).logits
        again = Qwen2_5_VLForConditionalGeneration.from_pretrained(sft)(input_ids=ids).logits
    assert torch.equal(reference, again)  # adapters off is the SFT model, not the base
    assert not torch.equal(adapted, reference)


@pytest.mark.complete
def test_the_same_command_gives_the_same_metrics(finished: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "b") == 0
    assert read_rows_without_timing(tmp_path / "b") == read_rows_without_timing(finished)


def test_second_run_does_not_overwrite_checkpoints(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(finished, "--stages", "sft") == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err
    assert (finished / "sft" / "checkpoint-6" / "model.safetensors").is_file()


@pytest.mark.parametrize(("stages", "kept"), [("cpo", False), ("evaluate", True)])
def test_figures_of_retrained_models_are_removed(tmp_path: Path, stages: str, kept: bool) -> None:
    before: dict[str, Any] = {"stages": {"sft": {}, "evaluate": {}}}
    before |= {
        "evaluation": {"preference": {}},
        "data": {"read": 3, "counterfactuals": {"made": 2}},
    }
    (tmp_path / "summary.json").write_text(json.dumps(before))
    (tmp_path / "evaluation.json").write_text("{}")
    flags = ["--dataset", "phantom", "--output_dir", str(tmp_path), "--stages", stages]
    folder = RunFolder(parse_arguments(flags))
    folder.add_data(counterfactuals={"read": 1})
    folder.add_data(counterfactuals={"unreadable": 1})
    assert folder.summary["data"]["counterfactuals"] == {"read": 1, "unreadable": 1}
    assert "read" not in folder.summary["data"]  # of the earlier run
    assert ("evaluation" in folder.summary) is kept
    assert ("evaluate" in folder.summary["stages"]) is kept and "sft" in folder.summary["stages"]
    assert (tmp_path / "evaluation.json").exists() is kept


def test_run_does_not_replace_foreign_results(tmp_path: Path) -> None:
    held = {"config.json": ('{"suite": null}', "results of cpo-fast evaluate"),
            "summary.json": ('{"data": {}}', "results of cpo-fast data check")}  # fmt: skip
    for name, (text, what) in held.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(text)
        with pytest.raises(UsageError, match=f"{folder} holds {what}"):
            RunFolder(parse_arguments(["--dataset", "phantom", "--output_dir", str(folder)]))
        assert (folder / name).read_text() == text


def test_cpo_only_run_uses_files_of_an_earlier_run(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "cpo")
    assert train(folder, "--stages", "cpo") == 0
    cpo = [row for row in read_rows_without_timing(folder) if row["stage"] == "cpo"]
    assert cpo == [row for row in read_rows_without_timing(finished) if row["stage"] == "cpo"]
    assert [row for row in read_rows_without_timing(folder) if row["stage"] == "sft"]


@pytest.mark.parametrize(
    "flag",
    ["--no_packing", "--gradient_checkpointing", "--precompute_ref_log_probs"],
)
def test_packing_and_memory_options_do_not_change_the_losses(
    finished: Path, tmp_path: Path, flag: str
) -> None:
    folder = tmp_path / "d"
    flags = ["--stages", "cpo", "--sft_checkpoint", str(finished / "sft" / "checkpoint-6")]
    given = ["--counterfactuals", str(finished / "counterfactuals.jsonl")]
    assert train(folder, *flags, *given, flag, "--eval_steps", "0") == 0
    plain, found = (
        [row["loss"] for row in read_rows(run) if row["stage"] == "cpo" and "loss" in row]
        for run in (finished, folder)
    )
    assert plain[3] < plain[2] < plain[1] < plain[0]
    assert found == pytest.approx(plain, rel=1e-4)


def test_lora_sft_is_merged_before_cpo(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    assert train(folder, "--sft_use_peft", "true", "--sft_freeze_vit", "--stages",
                 "graph,counterfactual,sft,cpo", "--sft_learning_rate", "1e-2") == 0  # fmt: skip
    config = json.loads((folder / "cpo" / "checkpoint-4" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((folder / "sft" / "merged").resolve())
    first = next(row for row in read_rows(folder) if row["stage"] == "cpo")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_full_tuning_keeps_a_frozen_reference(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "f"
    flags = ["--stages", "cpo", "--sft_checkpoint", str(finished / "sft" / "checkpoint-6")]
    given = ["--counterfactuals", str(finished / "counterfactuals.jsonl")]
    assert train(folder, *flags, *given, "--use_peft", "false", "--learning_rate", "1e-4") == 0
    logged = [row for row in read_rows(folder) if "loss" in row]
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert (folder / "cpo" / "checkpoint-4" / "model.safetensors").is_file()


def test_undecodable_image_is_listed_and_left_out(finished: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(finished / "data", data)
    images = sorted(data.rglob("*.jpg"))
    for image in images[:3]:
        image.write_bytes(image.read_bytes()[:800])  # a header without image data
    images[3].write_bytes(b"not an image")
    folder = tmp_path / "g"
    status = main(["--dataset", str(data), "--output_dir", str(folder), *SMALL, "--stages",
                   "graph,counterfactual,sft,cpo", "--max_bad_fraction", "0.2"])  # fmt: skip
    assert status == 0
    listed = [json.loads(x) for x in (folder / "rejected_records.jsonl").read_text().splitlines()]
    reasons = {record["reason"] for record in listed}
    assert reasons and all(reason.startswith("image-") for reason in reasons)
    summary = json.loads((folder / "summary.json").read_text())
    assert sum(summary["data"]["rejected"].values()) == len(listed)


def test_too_many_bad_records_stop_the_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(finished / "data", data)
    for image in sorted(data.rglob("*.jpg"))[:40]:
        image.write_bytes(b"")
    status = main(["--dataset", str(data), "--output_dir", str(tmp_path / "h"), *SMALL])
    error = capsys.readouterr().err
    assert status == 1
    assert "--max_bad_fraction" in error and "rejected_records.jsonl" in error


def test_a_preference_file_needs_no_graph(finished: Path, tmp_path: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    lines = [
        {"prompt": f"Report {i}?", "chosen": f"The lungs are clear, {i}.", "rejected": "Pneumonia."}
        for i in range(60)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = tmp_path / "i"
    assert main(["--dataset", str(source), "--output_dir", str(folder), *SMALL]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["data"]["kind"] == "trl" and summary["data"]["read"] == 60
    cpo, sft = (summary["evaluation"]["preference"][name] for name in ("cpo", "sft"))
    assert cpo["pairs"] == sft["pairs"] >= 1 and "accuracy" not in sft
    data = summary["data"]
    for stage in ("sft", "cpo"):
        assert data["trained_on"][stage] + data["held_out"][stage] == data["used"]
        (card,) = (folder / stage).glob("checkpoint-*/README.md")
        assert f"| Records trained on | {data['trained_on'][stage]} |" in card.read_text()


def test_no_report_text_in_metrics_summary_or_rejected_records(finished: Path) -> None:
    reports = [json.loads(x) for x in (finished / "counterfactuals.jsonl").read_text().splitlines()]
    sentences = {s.strip() for r in reports for s in r["report"].split(".") if len(s) > 25}
    for name in ("metrics.jsonl", "summary.json", "rejected_records.jsonl", "config.json"):
        text = (finished / name).read_text(encoding="utf-8")
        assert not [s for s in sentences if s in text], name
